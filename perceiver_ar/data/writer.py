"""Writes a prepared data set (see `records.py`): all of it or nothing."""

import contextlib
import dataclasses
import hashlib
import json
import secrets
import shutil
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from array_record.python import array_record_module  # pyright: ignore[reportAttributeAccessIssue]

from perceiver_ar.data import records, text
from perceiver_ar.errors import UserError

# Grain reads single records, so each is a group of its own.
_WRITER_OPTIONS = 'group_size:1,zstd:3'


class Writer:
  """Writes a data set that appears under `path` only when it is complete.

  Everything goes into a folder beside it, which is renamed at the end of the
  `with` block and removed if that raises. A data set that is already there is
  replaced; any other folder is refused.
  """

  def __init__(
    self, path: Path, *, kind: str, positions: dict[str, Any]
  ) -> None:
    self._path = path.resolve()
    self._kind = kind
    self._positions = positions
    self._vocabulary: text.Vocabulary | None = None
    self._files: dict[str, _SplitWriter] = {}
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

  def set_vocabulary(self, vocabulary: text.Vocabulary) -> None:
    """To be called once, before `add`; its file belongs into `folder`."""
    assert self._vocabulary is None
    self._vocabulary = vocabulary

  def add(
    self,
    split: str,
    tokens_T: np.ndarray,
    *,
    name: str,
    num_bytes: int,
    num_words: int,
  ) -> None:
    assert self._vocabulary is not None
    assert len(tokens_T) >= 2
    assert tokens_T.min() >= 0 and tokens_T.max() < self._vocabulary.size
    if split not in self._files:
      self._files[split] = _SplitWriter(self.folder, split)
    dtype = records.token_dtype(self._vocabulary.size)
    info = records.DocumentInfo(
      name=name,
      num_tokens=len(tokens_T),
      num_bytes=num_bytes,
      num_words=num_words,
    )
    self._files[split].add(tokens_T.astype(dtype).tobytes(), info)

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
    assert self._vocabulary is not None and self._files
    manifest = records.Manifest(
      version=records.VERSION,
      kind=self._kind,
      vocabulary=self._vocabulary,
      positions=self._positions,
      dtype=records.token_dtype(self._vocabulary.size).name,
      splits={name: file.summary() for name, file in self._files.items()},
    )
    (self.folder / records.MANIFEST).write_text(manifest.to_json())
    check_replaceable(self._path)
    old = self.folder.with_suffix('.replaced')
    # A folder cannot be renamed onto a full one: the old one steps aside, and
    # is only removed once the new one has its name.
    with contextlib.suppress(FileNotFoundError):
      self._path.rename(old)
    self.folder.rename(self._path)
    shutil.rmtree(old, ignore_errors=True)


class _SplitWriter:
  """The record file and the list of documents of one split."""

  def __init__(self, folder: Path, split: str):
    self._records_path = records.record_file(folder, split)
    self._records = array_record_module.ArrayRecordWriter(
      str(self._records_path), _WRITER_OPTIONS
    )
    self._lines = (folder / f'{split}.jsonl').open('w', encoding='utf-8')
    self._infos: list[records.DocumentInfo] = []

  def add(self, payload: bytes, info: records.DocumentInfo) -> None:
    self._records.write(payload)
    self._lines.write(json.dumps(dataclasses.asdict(info)) + '\n')
    self._infos.append(info)

  def close(self) -> None:
    self._lines.close()
    self._records.close()

  def summary(self) -> records.Split:
    with self._records_path.open('rb') as file:
      digest = hashlib.file_digest(file, 'sha256').hexdigest()
    return records.Split(
      num_documents=len(self._infos),
      num_tokens=sum(info.num_tokens for info in self._infos),
      num_bytes=sum(info.num_bytes for info in self._infos),
      num_words=sum(info.num_words for info in self._infos),
      longest=max(info.num_tokens for info in self._infos),
      file_size=self._records_path.stat().st_size,
      sha256=digest,
    )


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
  ours = {records.MANIFEST, manifest.vocabulary.file}
  for split in manifest.splits:
    ours |= {records.record_file(path, split).name, f'{split}.jsonl'}
  for item in path.iterdir():
    if item.name not in ours:
      raise UserError(
        f'{path} holds {item.name}, which is no part of its data set and '
        'would be lost; move it, or choose another output folder'
      )
