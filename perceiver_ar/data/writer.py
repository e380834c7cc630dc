"""Writes a prepared data set (see `records.py`): all of it or nothing."""

import collections
import contextlib
import dataclasses
import hashlib
import json
import os
import secrets
import shutil
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from perceiver_ar.data import codecs, records, tokens
from perceiver_ar.errors import UserError

REJECTED = 'rejected.jsonl'  # what was not taken, one object a line
# Grain reads single records, so each is a group of its own.
_WRITER_OPTIONS = 'group_size:1,zstd:3'


class Writer:
  """Writes a data set that appears under `path` only when it is complete.

  Everything goes into a folder beside it, which is renamed at the end of the
  `with` block and removed if that raises. A data set that is already there is
  replaced; any other folder is refused.
  """

  def __init__(
    self,
    path: Path,
    *,
    kind: str,
    variant: str,
    codec: tokens.Codec,
    positions: dict[str, Any],
  ) -> None:
    self._path = path.resolve()
    self._kind = kind
    self._variant = variant
    self._codec = codec
    self._positions = positions
    self._files: dict[str, _SplitWriter] = {}
    self._rejected: list[dict[str, str]] = []
    # Two writers never share one, nor does a new one meet a dead one's.
    self.folder = self._path.with_name(
      f'.{self._path.name}.{secrets.token_hex(4)}.partial'
    )

  def __enter__(self) -> 'Writer':
    check_replaceable(self._path)
    try:
      self.folder.mkdir(parents=True)
    except OSError as error:
      raise UserError(
        f'{self.folder} cannot be created ({error.strerror}); choose another '
        'output folder'
      ) from error
    return self

  def add(
    self, split: str, tokens_T: np.ndarray, *, name: str, counts: dict[str, int]
  ) -> None:
    """Adds a complete document; all of a data set count the same units."""
    assert len(tokens_T) >= 2
    assert tokens_T.min() >= 0 and tokens_T.max() < self._codec.vocab_size
    if split not in self._files:
      self._files[split] = _SplitWriter(self.folder, split)
    dtype = records.token_dtype(self._codec.vocab_size)
    info = records.DocumentInfo(
      name=name, num_tokens=len(tokens_T), counts=counts
    )
    self._files[split].add(tokens_T.astype(dtype).tobytes(), info)

  def reject(self, split: str, name: str, reason: str) -> None:
    """Says in the data set what is not in it."""
    self._rejected.append({'split': split, 'name': name, 'reason': reason})

  def publish(self, split: str, counts: dict[str, int]) -> None:
    """Sets counts that everyone divides by in place of our own."""
    self._files[split].published = counts

  def num_documents(self, split: str) -> int:
    return self._files[split].num_documents if split in self._files else 0

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    try:
      for file in self._files.values():
        file.close()
      if kind is None:
        self._commit()
    finally:
      shutil.rmtree(self.folder, ignore_errors=True)

  def _commit(self) -> None:
    assert self._files
    splits = {}
    for name, file in self._files.items():
      rejected = [line for line in self._rejected if line['split'] == name]
      splits[name] = file.summary(num_rejected=len(rejected))
    manifest = records.Manifest(
      version=records.VERSION,
      kind=self._kind,
      variant=self._variant,
      vocabulary=codecs.save_codec(self._codec, self.folder),
      positions=self._positions,
      dtype=records.token_dtype(self._codec.vocab_size).name,
      splits=splits,
    )
    if self._rejected:
      lines = [json.dumps(line) + '\n' for line in self._rejected]
      (self.folder / REJECTED).write_text(''.join(lines), encoding='utf-8')
    (self.folder / records.MANIFEST).write_text(manifest.to_json())
    _flush(self.folder)
    check_replaceable(self._path)
    old = self.folder.with_suffix('.replaced')
    # A folder cannot be renamed onto a full one: the old one steps aside, and
    # is only removed once the new one has its name.
    with contextlib.suppress(FileNotFoundError):
      self._path.rename(old)
    self.folder.rename(self._path)
    shutil.rmtree(old, ignore_errors=True)


def _flush(folder: Path) -> None:
  """Forces files to disk, so that a power cut leaves no hollow data set."""
  for path in folder.iterdir():
    with path.open('rb') as file:
      os.fsync(file.fileno())


class _SplitWriter:
  """The record file and the list of documents of one split."""

  def __init__(self, folder: Path, split: str):
    self._records_path = records.record_file(folder, split)
    self._list_path = folder / f'{split}.jsonl'
    self._records = array_record_module.ArrayRecordWriter(
      str(self._records_path), _WRITER_OPTIONS
    )
    self._lines = self._list_path.open('w', encoding='utf-8')
    self.published: dict[str, int] | None = None
    self.num_documents = 0
    self._num_tokens = self._longest = 0
    self._counts: collections.Counter[str] = collections.Counter()

  def add(self, payload: bytes, info: records.DocumentInfo) -> None:
    with self._saying_why():
      self._records.write(payload)
    line = dataclasses.asdict(info) | {'crc32': zlib.crc32(payload)}
    self._lines.write(json.dumps(line) + '\n')
    assert not self.num_documents or set(info.counts) == set(self._counts)
    self.num_documents += 1
    self._num_tokens += info.num_tokens
    self._longest = max(self._longest, info.num_tokens)
    self._counts.update(info.counts)

  def close(self) -> None:
    self._lines.close()
    with self._saying_why():
      self._records.close()

  @contextlib.contextmanager
  def _saying_why(self) -> Iterator[None]:
    try:
      yield
    except RuntimeError as error:  # of a full disk, above all
      reason = str(error).split(';')[0]
      raise UserError(
        f'{self._records_path.name} cannot be written ({reason}); make room '
        'and run it again'
      ) from error

  def summary(self, *, num_rejected: int) -> records.Split:
    return records.Split(
      num_documents=self.num_documents,
      num_rejected=num_rejected,
      num_tokens=self._num_tokens,
      counts=dict(self._counts) | (self.published or {}),
      longest=self._longest,
      file_size=self._records_path.stat().st_size,
      sha256=_sha256(self._records_path),
      list_sha256=_sha256(self._list_path),
    )


def _sha256(path: Path) -> str:
  with path.open('rb') as file:
    return hashlib.file_digest(file, 'sha256').hexdigest()


def check_replaceable(path: Path) -> None:
  """Refuses a path that holds anything but a data set of ours."""
  if not path.exists() or (path.is_dir() and not any(path.iterdir())):
    return
  try:
    manifest = records.Manifest.load(path)
  except UserError as error:
    raise UserError(
      f'{path} exists and is no prepared data set; choose another output folder'
    ) from error
  ours = {records.MANIFEST, REJECTED, manifest.vocabulary.file}
  for split in manifest.splits:
    ours |= {records.record_file(path, split).name, f'{split}.jsonl'}
  for item in path.iterdir():
    if item.name not in ours:
      raise UserError(
        f'{path} holds {item.name}, which is no part of its data set and '
        'would be lost; move it, or choose another output folder'
      )
