"""A prepared data set on disk: whole documents as records of token ids.

A folder holds `manifest.json`, and for every split `SPLIT.array_record` (one
record per document, its complete token sequence) and `SPLIT.jsonl` (one line
per document, in the same order), and the vocabulary file if there is one.
The list has the checksum of every record, and the manifest those of the lists,
so its own checksum stands for the whole data set: a list is checked when it is
opened, and a record when it is read.
"""

import dataclasses
import functools
import hashlib
import json
import re
import zlib
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from perceiver_ar import paths
from perceiver_ar.data import codecs, layouts, stated, tokens
from perceiver_ar.errors import PassingError, UserError, check_passing

MANIFEST = 'manifest.json'
VERSION = 3
_OTHER = 'it is not what was written'
_REMEDY = 'prepare the data set again'
_SPLIT = re.compile(r'[A-Za-z0-9_-]+')  # a name of files, so of no others


@dataclasses.dataclass(frozen=True, kw_only=True)
class Split:
  num_documents: int
  num_rejected: int  # bad files; rejected.jsonl names them
  num_tokens: int  # as stored, SOS and EOS included
  counts: dict[str, int]  # bytes, words, events, dims: what a loss is per
  longest: int  # tokens of the longest document
  file_size: int
  sha256: str  # of the record file
  list_sha256: str  # of the list of documents


@dataclasses.dataclass(frozen=True, kw_only=True)
class DocumentInfo:
  name: str
  num_tokens: int
  counts: dict[str, int]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Manifest:
  """What a prepared data set consists of."""

  version: int
  kind: str  # text, music, images
  variant: str  # which of the published sets, if it is one
  vocabulary: tokens.Vocabulary
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
    except (ValueError, RecursionError) as error:
      raise UserError(f'{path} is not JSON ({error}); {_REMEDY}') from error
    if isinstance(raw, dict) and raw.get('version') != VERSION:
      raise UserError(
        f'{path} has version {raw.get("version")!r}, and this program reads '
        f'{VERSION}; {_REMEDY}'
      )
    said = stated.read(_Raw, raw, str(path), _REMEDY)
    vocabulary = tokens.read_vocabulary(said.vocabulary, str(path))
    if said.dtype != token_dtype(vocabulary.size).name:
      raise UserError(
        f'{path}: dtype is {said.dtype!r}, and tokens of a vocabulary of '
        f'{vocabulary.size} are {token_dtype(vocabulary.size).name}; {_REMEDY}'
      )
    splits = {}
    for name, split in said.splits.items():
      if not _SPLIT.fullmatch(name):
        raise UserError(
          f'{path} names the split {name!r}, which is no name of files beside '
          f'it; {_REMEDY}'
        )
      splits[name] = stated.read(Split, split, f'{path}: {name}', _REMEDY)
    return cls(**vars(said) | {'vocabulary': vocabulary, 'splits': splits})

  @classmethod
  def load(cls, folder: Path) -> 'Manifest':
    path = folder / MANIFEST
    if not folder.is_dir():
      raise UserError(
        f'there is no folder {folder}; prepare a data set with '
        'tools/prepare_*.py'
      )
    try:
      with _opened(path) as file:
        content = file.read().decode()
    except (OSError, UnicodeDecodeError) as error:
      check_passing(error, path)
      raise UserError(
        f'{folder} is no prepared data set ({MANIFEST} is missing or '
        'unreadable); prepare one with tools/prepare_*.py'
      ) from error
    return cls.from_json(content, path)


class DamagedRecord(UserError):  # noqa: N818 (it is a state)
  """A record is not what was written; others of its file may be sound."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Raw:
  """The fields of `Manifest` as JSON has them."""

  version: int
  kind: str
  variant: str
  vocabulary: dict[str, Any]
  positions: dict[str, Any]
  dtype: str
  splits: dict[str, dict[str, Any]]


class Documents:
  """The documents of one split, read one by one; safe to use in threads."""

  def __init__(self, path: str, split: str):
    if not path:
      raise UserError(
        'data.path is empty; prepare a data set with tools/prepare_*.py '
        'and pass --config.data.path=DIR'
      )
    if paths.is_bucket(path):
      raise UserError(
        f'data.path {path} is in a bucket, and records are read from disks; '
        'copy it to every host, as launch/gke.py and launch/tpu_vm.sh do '
        '(--data)'
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
    self._codec = codecs.open_codec(
      self.manifest.vocabulary, self.layout, folder
    )
    self._about = self.manifest.splits[split]
    self._file = record_file(folder, split)
    self._listed = _read_list(folder / f'{split}.jsonl', self._about)
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
  def kind(self) -> str:
    return self.manifest.kind

  @property
  def variant(self) -> str:
    return self.manifest.variant

  @property
  def codec(self) -> tokens.Codec:
    return self._codec

  @property
  def num_tokens(self) -> np.ndarray:
    """The length of every document, SOS and EOS included."""
    return self._listed.num_tokens

  @property
  def counts(self) -> dict[str, int]:
    """Of the whole split; the published ones, where there are some."""
    return self._about.counts

  def __len__(self) -> int:
    return len(self._listed.names)

  def info(self, index: int) -> DocumentInfo:
    return self._listed.info(index)

  def __getitem__(self, index: int) -> np.ndarray:
    """The tokens of a document, int32 [T].

    Raises:
      DamagedRecord: they are not what was written.
      PassingError: the file cannot be read now.
      UserError: the file cannot be read, or is another by now.
    """
    try:
      payload = self._source[index]
    except RuntimeError as error:
      check_passing(error, f'{self._file}: record {index}')
      raise self._explained(index, str(error)) from error
    if zlib.crc32(payload) != self._listed.crc32[index]:
      raise self._explained(index, _OTHER)
    stored = np.frombuffer(payload, token_dtype(self.vocab_size))
    if stored.max() >= self.vocab_size:
      raise UserError(
        f'{self._file}: record {index} has the token id {stored.max()}, and '
        f'the vocabulary ends at {self.vocab_size - 1}; prepare the data set '
        'again'
      )
    return stored.astype(np.int32)

  def _explained(self, index: int, reason: str) -> UserError:
    where = f'{self._file}: record {index} ({self._listed.names[index]})'
    try:
      _check_size(self._file, self._about)
    except PassingError:
      raise
    except UserError as error:
      # Of a file that was cut short, records read as empty.
      return UserError(f'{where} cannot be read: {error}')
    kind = UserError
    if reason == _OTHER or 'Corrupted' in reason:
      kind = DamagedRecord
    return kind(
      f'{where} cannot be read ({reason}); restore the file or prepare the '
      'data set again'
    )


def record_file(folder: Path, split: str) -> Path:
  return folder / f'{split}.array_record'


def token_dtype(vocab_size: int) -> np.dtype:
  return np.dtype('<u2' if vocab_size <= 2**16 else '<u4')


@dataclasses.dataclass(frozen=True)
class _List:
  """The list of documents in columns: there may be millions of them."""

  names: list[str]
  num_tokens: np.ndarray
  counts: dict[str, np.ndarray]
  crc32: np.ndarray  # of the records

  def info(self, index: int) -> DocumentInfo:
    return DocumentInfo(
      name=self.names[index],
      num_tokens=int(self.num_tokens[index]),
      counts={unit: int(n[index]) for unit, n in self.counts.items()},
    )


def _read_list(path: Path, about: Split) -> _List:
  names: list[str] = []
  columns: list[tuple[int, ...]] = []
  hashed = hashlib.sha256()
  try:
    with _opened(path) as lines:
      for line in lines:
        hashed.update(line)
        raw = json.loads(line)
        names.append(raw['name'])
        each = (raw['counts'][unit] for unit in about.counts)
        columns.append((raw['num_tokens'], raw['crc32'], *each))
    table = _table(names, columns, 2 + len(about.counts))
  except (
    OSError,
    ValueError,
    TypeError,
    KeyError,
    RecursionError,
  ) as error:
    check_passing(error, path)
    raise UserError(
      f'{path} cannot be read ({error}); restore it or {_REMEDY}'
    ) from error
  if hashed.hexdigest() != about.list_sha256:
    raise UserError(
      f'{path} is not the one that {MANIFEST} was written with; restore both '
      'or prepare the data set again'
    )
  counts = {unit: table[:, i + 2] for i, unit in enumerate(about.counts)}
  return _List(names, table[:, 0], counts, table[:, 1])


def _opened(path: Path) -> BinaryIO:
  if path.exists() and not path.is_file():  # to open a pipe may never end
    raise OSError('it is no file')
  return path.open('rb')


def _table(
  names: list[str], columns: list[tuple[int, ...]], width: int
) -> np.ndarray:
  """Of millions of lines, checked as a whole; ValueError if one is wrong."""
  table = np.array(columns or np.zeros((0, width), np.int64))
  if table.dtype != np.int64 or table.ndim != 2 or table.min(initial=0) < 0:
    raise ValueError('lengths and counts must be whole numbers from 0 on')
  if not all(type(name) is str for name in names):
    raise ValueError('a name is no string')
  return table


def _check_size(path: Path, about: Split) -> None:
  try:
    size = path.stat().st_size
  except OSError as error:
    check_passing(error, path)
    raise UserError(
      f'{path} is missing ({error.strerror}); restore it or prepare the data '
      'set again'
    ) from error
  if size != about.file_size:
    raise UserError(
      f'{path} has {size} bytes, and the manifest says {about.file_size}; '
      'restore it or prepare the data set again'
    )


def _open_records(path: Path, about: Split) -> Any:
  _check_size(path, about)
  # Late, because it takes seconds, which those who only write need not wait.
  import grain

  try:
    source: Any = grain.sources.ArrayRecordDataSource(str(path))
  except RuntimeError as error:
    check_passing(error, path)
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
