"""The codec of a data set, kept beside it and opened again by its name."""

import re
from typing import Any

from etils import epath

from perceiver_ar import paths
from perceiver_ar.data import image, music, text, tokens
from perceiver_ar.errors import UserError

_WITH_FILES = (text.SentencePieceCodec.kind, text.TokenizersCodec.kind)
_MUSIC = {f'events{number}': number for number in music.VOCABULARIES}


def open_codec(
  vocabulary: tokens.Vocabulary,
  layout: dict[str, Any],
  folder: epath.PathLike,
) -> tokens.Codec:
  """The codec that the data set in this folder was prepared with.

  Raises:
    UserError: its file is not the one that the vocabulary names, or is no
      file of this folder.
  """
  folder = epath.Path(folder)
  is_name = re.fullmatch(r'[^/\\]+', vocabulary.file)
  if vocabulary.kind in _WITH_FILES and (
    not is_name or vocabulary.file in ('.', '..')
  ):
    raise UserError(
      f'{folder}: vocabulary {vocabulary.kind!r} is said to be in the file '
      f'{vocabulary.file!r}, which is none of this folder; prepare the data '
      'set again'
    )
  codec = _open(vocabulary, layout, folder)
  if (codec.vocab_size, codec.sha256) != (vocabulary.size, vocabulary.sha256):
    raise UserError(
      f'{folder}: the vocabulary is not the one that the manifest names (size '
      f'{codec.vocab_size}, not {vocabulary.size}, or another checksum); '
      'prepare the data set again'
    )
  return codec


def save_codec(
  codec: tokens.Codec, folder: epath.PathLike
) -> tokens.Vocabulary:
  """Writes what `open_codec` needs to open it again, if it is not there."""
  if codec.file:
    target = epath.Path(folder) / codec.file
    if not (target.exists() and target.read_bytes() == codec.model):
      paths.write_whole(target, codec.model)
  return tokens.vocabulary(codec)


def _open(
  vocabulary: tokens.Vocabulary, layout: dict[str, Any], folder: epath.Path
) -> tokens.Codec:
  kind, file = vocabulary.kind, folder / vocabulary.file
  if kind == 'bytes':
    return text.ByteCodec()
  if kind == 'sentencepiece':
    return text.SentencePieceCodec(file)
  if kind == 'tokenizers':
    return text.TokenizersCodec(file)
  if kind == 'ids':
    return text.IdsCodec(vocabulary.size)
  if kind == 'pixels':
    return image.ImageCodec(layout)
  if kind in _MUSIC:
    return music.MusicCodec(_MUSIC[kind])
  known = ('bytes', 'sentencepiece', 'tokenizers', 'ids', 'pixels', *_MUSIC)
  raise UserError(
    f'{folder}: vocabulary {kind!r} is unknown; it must be one of '
    f'{", ".join(known)}'
  )
