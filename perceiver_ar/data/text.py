"""Text to tokens and back, without losing a character.

Every codec leaves 0 PAD, 1 EOS and 2 SOS (subwords: 3 unknown as well) to the
trainer, and decodes whatever a model samples.
"""

import dataclasses
import hashlib
import io
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Protocol

import numpy as np
from etils import epath

from perceiver_ar.errors import UserError

PAD, EOS, SOS = 0, 1, 2
NUM_RESERVED = 3
_UNKNOWN = 3  # of sentencepiece; byte fallback leaves it without use
MODEL_FILE = 'sentencepiece.model'
SPACE_MARK = '\u2581'  # how sentencepiece writes a blank
# Fixed, because the pieces depend on it in the last bit.
_TRAINER_THREADS = 4
_LINE_CHARACTERS = 1_000  # sentencepiece leaves out lines beyond 4192 bytes


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """How a prepared data set names its codec."""

  kind: str  # bytes, sentencepiece, ids
  size: int
  sha256: str
  file: str  # in its folder; '' if the kind says it all


class Codec(Protocol):
  """What turns text into tokens (without SOS and EOS) and back.

  `forbidden` are the ids that a sampler must never emit; `separator` stands
  between the texts of neighbouring tokens.
  """

  kind: str
  vocab_size: int
  sha256: str
  forbidden: tuple[int, ...]
  separator: str

  def encode(self, text: str) -> np.ndarray: ...

  def decode(self, ids: Sequence[int] | np.ndarray) -> str: ...


class ByteCodec:
  """The UTF-8 bytes, each three higher."""

  kind = 'bytes'
  vocab_size = 256 + NUM_RESERVED
  sha256 = hashlib.sha256(b'utf-8 bytes + 3').hexdigest()
  forbidden: tuple[int, ...] = (PAD, SOS)
  separator = ''

  def encode(self, text: str) -> np.ndarray:
    data = np.frombuffer(text.encode(), np.uint8)
    return data.astype(np.int32) + NUM_RESERVED

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    ids_T = np.asarray(ids, np.int64)
    data = ids_T[ids_T >= NUM_RESERVED] - NUM_RESERVED
    return data.astype(np.uint8).tobytes().decode(errors='replace')


class SentencePieceCodec:
  """Subwords of a sentencepiece model that `train_sentencepiece` wrote."""

  kind = 'sentencepiece'
  forbidden: tuple[int, ...] = (PAD, SOS, _UNKNOWN)
  separator = ''

  def __init__(self, model_path: epath.PathLike):
    self.model = _read(model_path)
    self.sha256 = hashlib.sha256(self.model).hexdigest()
    self._load()
    processor = self._processor
    reserved = (
      processor.pad_id(),
      processor.eos_id(),
      processor.bos_id(),
      processor.unk_id(),
    )
    if reserved != (PAD, EOS, SOS, _UNKNOWN):
      raise UserError(
        f'{model_path} has pad, eos, bos, unk = {reserved}, not (0, 1, 2, 3); '
        'train the vocabulary with tools/prepare_text.py'
      )
    self.vocab_size = processor.vocab_size()

  def _load(self) -> None:
    spm = _import_sentencepiece()
    try:
      self._processor = spm.SentencePieceProcessor(model_proto=self.model)
    except RuntimeError as error:
      raise UserError(
        f'the sentencepiece model cannot be read ({error}); prepare the data '
        'set again'
      ) from error

  def encode(self, text: str) -> np.ndarray:
    if SPACE_MARK in text:
      at = text.index(SPACE_MARK)
      raise UserError(
        f'character {at} is U+2581, which sentencepiece uses for a blank; '
        'replace it, or use --vocabulary=bytes'
      )
    return np.asarray(self._processor.encode(text), np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._processor.decode([int(i) for i in ids if i > _UNKNOWN])


class IdsCodec:
  """Decimal ids between blanks: for tokens that stand for no text."""

  kind = 'ids'
  forbidden: tuple[int, ...] = (PAD, SOS)
  separator = ' '

  def __init__(self, vocab_size: int):
    self.vocab_size = vocab_size
    self.sha256 = hashlib.sha256(f'{vocab_size} ids'.encode()).hexdigest()

  def encode(self, text: str) -> np.ndarray:
    ids = []
    for word in text.split():
      known = re.fullmatch('[0-9]{1,18}', word)
      if not known or not NUM_RESERVED <= int(word) < self.vocab_size:
        raise UserError(
          f'{word!r} is no token; this data has no text, so write ids from '
          f'{NUM_RESERVED} to {self.vocab_size - 1} with blanks between them'
        )
      ids.append(int(word))
    return np.asarray(ids, np.int32)

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return ' '.join(str(int(i)) for i in ids if i >= NUM_RESERVED)


def open_codec(vocabulary: Vocabulary, folder: epath.PathLike) -> Codec:
  """The codec that the data set in this folder was prepared with."""
  codec: Codec
  if vocabulary.kind == 'bytes':
    codec = ByteCodec()
  elif vocabulary.kind == 'sentencepiece':
    codec = SentencePieceCodec(epath.Path(folder) / vocabulary.file)
  elif vocabulary.kind == 'ids':
    codec = IdsCodec(vocabulary.size)
  else:
    raise UserError(
      f'{folder}: vocabulary {vocabulary.kind!r} is unknown; it must be '
      'bytes, sentencepiece or ids'
    )
  if (codec.vocab_size, codec.sha256) != (vocabulary.size, vocabulary.sha256):
    raise UserError(
      f'{folder}: the vocabulary is not the one that the manifest names (size '
      f'{codec.vocab_size}, not {vocabulary.size}, or another checksum); '
      'prepare the data set again'
    )
  return codec


def save_codec(codec: Codec, folder: epath.PathLike) -> Vocabulary:
  """Writes what `open_codec` needs to open it again."""
  file = ''
  if isinstance(codec, SentencePieceCodec):
    file = MODEL_FILE
    target = epath.Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    (target / file).write_bytes(codec.model)
  return Vocabulary(
    kind=codec.kind, size=codec.vocab_size, sha256=codec.sha256, file=file
  )


def train_sentencepiece(
  texts: Iterable[str], vocab_size: int, path: epath.PathLike
) -> None:
  """Writes a unigram model that encodes any text without loss."""
  spm = _import_sentencepiece()
  model = io.BytesIO()
  try:
    spm.SentencePieceTrainer.train(
      sentence_iterator=_lines(texts),
      model_writer=model,
      vocab_size=vocab_size,
      model_type='unigram',
      normalization_rule_name='identity',
      remove_extra_whitespaces=False,
      add_dummy_prefix=False,
      allow_whitespace_only_pieces=True,
      byte_fallback=True,
      character_coverage=0.9999,
      user_defined_symbols=['\n'],
      split_digits=True,
      pad_id=PAD,
      eos_id=EOS,
      bos_id=SOS,
      unk_id=_UNKNOWN,
      num_threads=_TRAINER_THREADS,
      minloglevel=2,
    )
  except RuntimeError as error:
    raise UserError(_why_not_trained(vocab_size, str(error))) from error
  epath.Path(path).write_bytes(model.getvalue())


def _why_not_trained(vocab_size: int, error: str) -> str:
  # Its own words name its own options, and the place in its source.
  if too_high := re.search(r'<= ([0-9]+)', error):
    return (
      f'--vocab_size={vocab_size} is too large for this text; use at most '
      f'--vocab_size={too_high[1]}, or --vocabulary=bytes'
    )
  if too_low := re.search(r'[0-9]+ vs ([0-9]+)', error):
    return (
      f'--vocab_size={vocab_size} is too small for the characters of this '
      f'text; use at least --vocab_size={too_low[1]}, or --vocabulary=bytes'
    )
  return (
    f'sentencepiece cannot train --vocab_size={vocab_size} on this text '
    f'({error.strip().splitlines()[-1]}); try another size, or '
    '--vocabulary=bytes'
  )


def _lines(texts: Iterable[str]) -> Iterator[str]:
  for text in texts:
    for line in text.split('\n'):
      for start in range(0, len(line), _LINE_CHARACTERS):
        yield line[start : start + _LINE_CHARACTERS]


def _import_sentencepiece():
  try:
    import sentencepiece
  except ImportError as error:
    raise UserError(
      'subwords need the package sentencepiece; install it with pip install '
      "'perceiver-ar[prepare]'"
    ) from error
  return sentencepiece


def _read(path: epath.PathLike) -> bytes:
  try:
    return epath.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f'vocabulary file {path} cannot be read ({error.strerror}); prepare the '
      'data set again'
    ) from error


class TextStream:
  """Writes sampled tokens to a file as text while they come in.

  A character may be cut between two writes, so the last tokens wait as long
  as they do not decode by themselves.
  """

  _LONGEST = 3  # tokens that a cut character can leave behind, as bytes

  def __init__(self, path: epath.PathLike, codec: Codec):
    self._file = epath.Path(path).open('w', encoding='utf-8')
    self._codec = codec
    self._waiting: list[int] = []
    self._is_empty = True

  def write(self, ids: Sequence[int] | np.ndarray) -> None:
    self._waiting += [int(i) for i in ids]
    for cut in range(self._LONGEST + 1):
      ready = self._waiting[: len(self._waiting) - cut]
      if not self._codec.decode(ready).endswith('\ufffd'):
        self._flush(ready)
        return
    # Bytes that are no text; a character may still begin among the last.
    self._flush(self._waiting[: -self._LONGEST])

  def close(self) -> None:
    self._flush(self._waiting)
    self._file.close()

  def _flush(self, ids: list[int]) -> None:
    if content := self._codec.decode(ids):
      joint = '' if self._is_empty else self._codec.separator
      self._file.write(joint + content)
      self._file.flush()
      self._is_empty = False
    self._waiting = self._waiting[len(ids) :]
