"""A prepared data set on disk: whole documents as records of token ids.

A folder holds `manifest.json`, and for every split `SPLIT.array_record` (one
record per document, its complete token sequence) and `SPLIT.jsonl` (one line
per document, in the same order), and the vocabulary file if there is one.
The manifest names the checksum of every record file, so its own checksum
stands for the whole data set.
"""

import dataclasses
import functools
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import grain
import numpy as np

from perceiver_ar.data import layouts, text
from perceiver_ar.errors import UserError

MANIFEST = 'manifest.json'
VERSION = 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  num_documents: int
  num_tokens: int  # as stored, SOS and EOS included
  num_bytes: int
  num_words: int
  longest: int  # tokens of the longest document
  file_size: int
  sha256: str  # of the record file


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentInfo:
  name: str
  num_tokens: int
  num_bytes: int
  num_words: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a prepared data set consists of."""

  version: int
  kind: str
  vocabulary: text.Vocabulary
  positions: dict[str, Any]
  dtype: str
  splits: dict[str, Split]

  @functools.cached_property
  def fingerprint(self) -> str:
    canonical = json.dumps(
      dataclasses.asdict(self), sort_keys=True, separators=(',', ':')
    )
    return hashlib.sha256(canonical.encode()).hexdigest()

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'

  @classmethod
  def from_json(cls, content: str, path: Path) -> 'Manifest':
    """Reads what `to_json` wrote; `path` is only for messages."""
    try:
      raw = json.loads(content)
    except ValueError as error:
      raise UserError(
        f'{path} is not JSON ({error}); prepare the data set again'
      ) from error
    _check_keys(cls, raw, path)
    if raw['version'] != VERSION:
      raise UserError(
        f'{path} has version {raw["version"]!r}, and this program reads '
        f'{VERSION}; prepare the data set again'
      )
    _check_keys(text.Vocabulary, raw['vocabulary'], path)
    _check_keys(None, raw['splits'], path)
    for split in raw['splits'].values():
      _check_keys(Split, split, path)
    splits = {name: Split(**split) for name, split in raw['splits'].items()}
    vocabulary = text.Vocabulary(**raw['vocabulary'])
    return cls(**{**raw, 'vocabulary': vocabulary, 'splits': splits})

  @classmethod
  def load(cls, folder: Path) -> 'Manifest':
    path = folder / MANIFEST
    if not folder.is_dir():
      raise UserError(
        f'there is no folder {folder}; prepare a data set with '
        'tools/prepare_text.py'
      )
    try:
      content = path.read_text()
    except (OSError, UnicodeDecodeError) as error:
      raise UserError(
        f'{folder} is no prepared data set ({MANIFEST} is missing or '
        'unreadable); prepare one with tools/prepare_text.py'
      ) from error
    return cls.from_json(content, path)


class Documents:
  """The documents of one split, read one by one; safe to use in threads."""

  def __init__(self, path: str, split: str):
    if not path:
      raise UserError(
        'data.path is empty; prepare a data set with tools/prepare_text.py '
        'and pass --config.data.path=DIR'
      )
    folder = Path(path)
    self.manifest = Manifest.load(folder)
    self.folder = folder
    self.split = split
    self.layout = layouts.validated(self.manifest.positions)
    if split not in self.manifest.splits:
      raise UserError(
        f'{folder} has no split {split!r}; it has '
        f'{", ".join(self.manifest.splits)}'
      )
    self._codec = text.open_codec(self.manifest.vocabulary, folder)
    self._about = self.manifest.splits[split]
    self._file = record_file(folder, split)
    self._infos = _read_infos(folder / f'{split}.jsonl', self._about)
    self._source = _open_records(self._file, self._about)

  @property
  def vocab_size(self) -> int:
    return self.manifest.vocabulary.size

  @property
  def fingerprint(self) -> str:
    return self.manifest.fingerprint

  @property
  def longest(self) -> int:
    return self._about.longest

  @property
  def codec(self) -> text.Codec:
    return self._codec

  @property
  def num_tokens(self) -> np.ndarray:
    """The length of every document, SOS and EOS included."""
    return np.array([info.num_tokens for info in self._infos], np.int64)

  def __len__(self) -> int:
    return len(self._infos)

  def info(self, index: int) -> DocumentInfo:
    return self._infos[index]

  def __getitem__(self, index: int) -> np.ndarray:
    try:
      payload = self._source[index]
    except RuntimeError as error:
      raise UserError(
        f'{self._file}: record {index} cannot be read ({error}); restore the '
        'file or prepare the data set again'
      ) from error
    size = np.dtype(self.manifest.dtype).itemsize
    expected = self._infos[index].num_tokens * size
    if len(payload) != expected or expected < 2 * size:
      raise UserError(
        f'{self._file}: record {index} has {len(payload)} bytes, not '
        f'{expected}; prepare the data set again'
      )
    stored = np.frombuffer(payload, token_dtype(self.vocab_size))
    if stored.max() >= self.vocab_size:
      raise UserError(
        f'{self._file}: record {index} has the token id {stored.max()}, and '
        f'the vocabulary ends at {self.vocab_size - 1}; prepare the data set '
        'again'
      )
    return stored.astype(np.int32)


def record_file(folder: Path, split: str) -> Path:
  return folder / f'{split}.array_record'


def token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


def _check_keys(cls: Any, raw: Any, path: Path) -> None:
  """Refuses JSON that is no object, or not one with just a class's fields."""
  if not isinstance(raw, Mapping):
    raise UserError(
      f'{path} has {raw!r} where an object belongs; prepare the data set again'
    )
  if cls is None:
    return
  known = {field.name for field in dataclasses.fields(cls)}
  if wrong := sorted(known ^ set(raw)):
    raise UserError(
      f'{path}: {", ".join(wrong)} unknown or missing; prepare the data set '
      'again'
    )


def _read_infos(path: Path, about: Split) -> list[DocumentInfo]:
  try:
    with path.open(encoding='utf-8') as lines:
      infos = [DocumentInfo(**json.loads(line)) for line in lines]
  except (OSError, ValueError, TypeError) as error:
    raise UserError(
      f'{path} cannot be read ({error}); prepare the data set again'
    ) from error
  found = len(infos), sum(info.num_tokens for info in infos)
  if found != (about.num_documents, about.num_tokens):
    raise UserError(
      f'{path} lists {found[0]} documents with {found[1]} tokens, and the '
      f'manifest {about.num_documents} with {about.num_tokens}; prepare the '
      'data set again'
    )
  return infos


def _open_records(path: Path, about: Split) -> Any:
  try:
    size = path.stat().st_size
  except OSError as error:
    raise UserError(
      f'{path} is missing ({error.strerror}); restore it or prepare the data '
      'set again'
    ) from error
  if size != about.file_size:
    raise UserError(
      f'{path} has {size} bytes, and the manifest says {about.file_size}; '
      'restore it or prepare the data set again'
    )
  try:
    source: Any = grain.sources.ArrayRecordDataSource(str(path))
  except RuntimeError as error:
    raise UserError(
      f'{path} cannot be opened ({error}); restore it or prepare the data set '
      'again'
    ) from error
  if len(source) != about.num_documents:
    raise UserError(
      f'{path} has {len(source)} records, and the manifest says '
      f'{about.num_documents}; prepare the data set again'
    )
  return source
