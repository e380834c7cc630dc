"""Text to tokens and back, without losing a character.

Every codec leaves 0 PAD, 1 EOS and 2 SOS to the trainer, refuses a text that
its tokens would not give back, and decodes whatever a model samples.
"""

import abc
import hashlib
import re
from collections.abc import Sequence

import numpy as np
from etils import epath

from perceiver_ar.data.tokens import EOS, NUM_RESERVED, PAD, SOS
from perceiver_ar.errors import UserError

SENTENCEPIECE_FILE = 'sentencepiece.model'
TOKENIZER_FILE = 'tokenizer.json'
UNKNOWN = 3  # of our sentencepiece; byte fallback leaves it without use
_MOST_SUBWORDS = 2**21  # eight times what the largest models have
_REPLACEMENT = '\ufffd'  # where bytes are no text


class TextCodec(abc.ABC):
  """A codec (see `tokens.Codec`) whose artifacts are UTF-8 text files.

  `separator` stands between the texts of neighbouring tokens.
  """

  kind: str
  vocab_size: int
  sha256: str
  forbidden: tuple[int, ...] = (PAD, SOS)
  suffix = '.txt'
  file = ''
  model = b''
  separator = ''

  @abc.abstractmethod
  def encode(self, text: str) -> np.ndarray:
    """The tokens [T] int32 of a text; a UserError if any of it were lost."""

  @abc.abstractmethod
  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    """The text of any ids; those that stand for none are skipped."""

  def decode_further(self, ids: Sequence[int] | np.ndarray) -> str:
    """What the ids add to a text that they go on from."""
    return self.decode(ids)

  def read(self, data: bytes) -> np.ndarray:
    return self.encode(as_text(data))

  def write(self, ids: Sequence[int] | np.ndarray) -> tuple[bytes, int]:
    ids_T = np.asarray(ids, np.int64)
    content = self.decode(ids_T)
    symbols_T = self._symbols(ids_T)
    num_repairs = int((ids_T >= NUM_RESERVED).sum()) - len(symbols_T)
    if _REPLACEMENT in content and not self._gives(content, symbols_T):
      num_repairs += content.count(_REPLACEMENT)
    return content.encode(), num_repairs

  def _symbols(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    """The ids that stand for text."""
    ids_T = np.asarray(ids, np.int64)
    is_symbol_T = (ids_T >= NUM_RESERVED) & (ids_T < self.vocab_size)
    return ids_T[is_symbol_T & ~np.isin(ids_T, self.forbidden)]

  def _gives(self, text: str, symbols_T: np.ndarray) -> bool:
    """Whether the ids are those of the text, which then has that character."""
    try:
      return np.array_equal(self.encode(text), symbols_T)
    except UserError:
      return False


def as_text(data: bytes) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f'it is not UTF-8: byte {error.start} is {data[error.start]:#04x}; '
      'convert it (iconv -f WINDOWS-1252 -t UTF-8, say), or move it elsewhere'
    ) from error


class ByteCodec(TextCodec):
  """The UTF-8 bytes, each three higher."""

  kind = 'bytes'
  vocab_size = 256 + NUM_RESERVED
  sha256 = hashlib.sha256(b'utf-8 bytes + 3').hexdigest()

  def encode(self, text: str) -> np.ndarray:
    data = np.frombuffer(text.encode(), np.uint8)
    return data.astype(np.int32) + NUM_RESERVED

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    data = self._symbols(ids) - NUM_RESERVED
    return data.astype(np.uint8).tobytes().decode(errors='replace')


class IdsCodec(TextCodec):
  """Decimal ids between blanks: for tokens that stand for no text."""

  kind = 'ids'
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
    return ' '.join(str(i) for i in self._symbols(ids))


class SubwordCodec(TextCodec):
  """What subwords of any library have in common; ids may be moved up."""

  _offset: int

  def __init__(self, path: epath.PathLike):
    self.model = _read(path)
    self.sha256 = hashlib.sha256(self.model).hexdigest()

  @abc.abstractmethod
  def _to_ids(self, text: str) -> list[int]:
    """As the library counts them."""

  @abc.abstractmethod
  def _to_text(self, ids: list[int]) -> str: ...

  def encode(self, text: str) -> np.ndarray:
    ids_T = np.asarray(self._to_ids(text), np.int32) + self._offset
    back = self.decode(ids_T)
    if back != text:
      pairs = zip(text, back, strict=False)
      at = next((i for i, (a, b) in enumerate(pairs) if a != b), len(back))
      raise UserError(
        f'its character {at}, {text[at : at + 1]!r}, does not survive the '
        f'{self.kind} vocabulary; replace it, or prepare the data with '
        '--vocabulary=bytes'
      )
    return ids_T

  def decode(self, ids: Sequence[int] | np.ndarray) -> str:
    return self._to_text((self._symbols(ids) - self._offset).tolist())

  def decode_further(self, ids: Sequence[int] | np.ndarray) -> str:
    # A decoder may take a blank off the start of a text.
    first = self._to_ids('a')
    further = (self._symbols(ids) - self._offset).tolist()
    return self._to_text(first + further)[len(self._to_text(first)) :]


class SentencePieceCodec(SubwordCodec):
  """Subwords of a sentencepiece model, of ours or of the user's own.

  A model that has our reserved ids keeps its ids; those of another are three
  higher.
  """

  kind = 'sentencepiece'
  file = SENTENCEPIECE_FILE

  def __init__(self, path: epath.PathLike):
    super().__init__(path)
    spm = import_sentencepiece()
    try:
      processor = spm.SentencePieceProcessor(model_proto=self.model)
      # Of no model, or of pieces that are no text, only this says so.
      processor.encode('a')
      processor.id_to_piece(list(range(processor.vocab_size())))
    except Exception as error:  # of a damaged one, anything
      raise UserError(
        f'{path} is no sentencepiece model ({error}); check the file, or '
        'prepare the data set again'
      ) from error
    self._processor = processor
    reserved = (
      processor.pad_id(),
      processor.eos_id(),
      processor.bos_id(),
      processor.unk_id(),
    )
    is_ours = reserved == (PAD, EOS, SOS, UNKNOWN)
    self._offset = 0 if is_ours else NUM_RESERVED
    self.vocab_size = processor.vocab_size() + self._offset
    without_text = {
      i + self._offset
      for i in range(processor.vocab_size())
      if processor.is_unknown(i)
      or processor.is_control(i)
      or processor.is_unused(i)
    }
    self.forbidden = tuple(sorted({PAD, SOS} | without_text - {EOS}))

  def _to_ids(self, text: str) -> list[int]:
    return self._processor.encode(text)

  def _to_text(self, ids: list[int]) -> str:
    return self._processor.decode(ids)


class TokenizersCodec(SubwordCodec):
  """Subwords of a Hugging Face tokenizer.json, all ids three higher.

  Texts that look like special tokens are plain text; the tokens themselves
  are neither encoded nor sampled.
  """

  kind = 'tokenizers'
  file = TOKENIZER_FILE
  _offset = NUM_RESERVED

  def __init__(self, path: epath.PathLike):
    super().__init__(path)
    try:
      import tokenizers
    except ImportError as error:
      raise UserError(
        'a tokenizer.json needs the package tokenizers; install it with pip '
        "install 'perceiver-ar[prepare]'"
      ) from error
    try:
      tokenizer = tokenizers.Tokenizer.from_str(self.model.decode())
    except Exception as error:  # it raises nothing narrower
      raise UserError(
        f'{path} is no tokenizer.json ({error}); check the file, or prepare '
        'the data set again'
      ) from error
    tokenizer.no_truncation()
    tokenizer.no_padding()
    if getattr(tokenizer.model, 'dropout', None):
      tokenizer.model.dropout = None  # the same text, the same tokens
    tokenizer.encode_special_tokens = True
    self._tokenizer = tokenizer
    known = set(tokenizer.get_vocab(with_added_tokens=True).values())
    self.vocab_size = max(known, default=-1) + 1 + self._offset
    if self.vocab_size > _MOST_SUBWORDS:
      raise UserError(
        f'{path} has ids up to {max(known)}, and no vocabulary has more than '
        f'{_MOST_SUBWORDS:,}; check the file, or prepare the data set again'
      )
    added = tokenizer.get_added_tokens_decoder()
    usable = known - {i for i, token in added.items() if token.special}
    unknown = getattr(tokenizer.model, 'unk_token', None)
    if unknown is not None:
      usable -= {tokenizer.token_to_id(unknown)}
    symbols = {i + self._offset for i in usable} | {EOS}
    self.forbidden = tuple(sorted(set(range(self.vocab_size)) - symbols))

  def _to_ids(self, text: str) -> list[int]:
    return self._tokenizer.encode(text, add_special_tokens=False).ids

  def _to_text(self, ids: list[int]) -> str:
    return self._tokenizer.decode(ids, skip_special_tokens=True)


def import_sentencepiece():
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
      f'vocabulary file {path} cannot be read ({error.strerror}); check the '
      'name, or prepare the data set again'
    ) from error


class TextStream:
  """Writes sampled tokens to a file as text while they come in.

  A character may be cut between two writes, so the last tokens wait as long
  as they do not decode by themselves.
  """

  _LONGEST = 3  # tokens that a cut character can leave behind, as bytes

  def __init__(self, path: epath.PathLike, codec: TextCodec):
    self._file = epath.Path(path).open('w', encoding='utf-8')
    self._codec = codec
    self._waiting: list[int] = []
    self._is_empty = True

  def write(self, ids: Sequence[int] | np.ndarray) -> None:
    self._waiting += [int(i) for i in ids]
    for cut in range(self._LONGEST + 1):
      ready = self._waiting[: len(self._waiting) - cut]
      if not self._decode(ready).endswith(_REPLACEMENT):
        self._flush(ready)
        return
    # Bytes that are no text; a character may still begin among the last.
    self._flush(self._waiting[: -self._LONGEST])

  def close(self) -> None:
    self._flush(self._waiting)
    self._file.close()

  def _decode(self, ids: list[int]) -> str:
    if self._is_empty:
      return self._codec.decode(ids)
    return self._codec.decode_further(ids)

  def _flush(self, ids: list[int]) -> None:
    if content := self._decode(ids):
      joint = '' if self._is_empty else self._codec.separator
      self._file.write(joint + content)
      self._file.flush()
      self._is_empty = False
    self._waiting = self._waiting[len(ids) :]
