"""The items of a data set, encoded part by part by worker processes.

A part is a file of tokens and a list of what became of its items. Its name
says all that decides its content, so what is there is not made again, and what
has changed is.
"""

import concurrent.futures
import contextlib
import dataclasses
import hashlib
import json
import multiprocessing
import os
import signal
import threading
import time
from collections.abc import Iterator, Sequence
from concurrent.futures import process
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol

import numpy as np

from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress

MAX_REJECTED = 0.01  # of the files; with more, something else is wrong


class Document(NamedTuple):
  """A complete token sequence, and what its loss may be divided by."""

  tokens_T: np.ndarray
  counts: dict[str, int]


@dataclasses.dataclass(frozen=True)
class Item:
  """What may become a document, without its content.

  Attributes:
    name: in the data set and in messages; unique.
    split: train, validation or test.
    source: what the encoder needs to read it; plain enough for JSON.
    stamp: changes with the file (see `preparation.stamp`).
  """

  name: str
  split: str
  source: Any
  stamp: str


class Encoder(Protocol):
  """Runs in worker processes, so it must be picklable, and light to pickle.

  None leaves an item out on purpose; a UserError rejects it.
  """

  def __call__(self, item: Item) -> Document | None: ...


class Parts:
  """The items in parts of fixed size, and the files of those encoded."""

  def __init__(
    self,
    folder: Path,
    items: Sequence[Item],
    per_part: int,
    job: dict[str, Any],
  ):
    self.items = items
    self._per_part = per_part
    self._job = json.dumps(job, sort_keys=True)
    self._folder = folder / 'parts'
    self._folder.mkdir(exist_ok=True)
    self._paths = [self._named(part) for part in range(len(self))]

  def __len__(self) -> int:
    return -(-len(self.items) // self._per_part)

  def __getitem__(self, part: int) -> Sequence[Item]:
    if not 0 <= part < len(self):
      raise IndexError(part)
    return self.items[part * self._per_part : (part + 1) * self._per_part]

  def _named(self, part: int) -> Path:
    """Named by all that decides its content; what differs is made again."""
    about = [(i.name, i.split, i.source, i.stamp) for i in self[part]]
    content = f'{self._job}{json.dumps(about)}'.encode()
    name = hashlib.sha256(content).hexdigest()[:32]
    return self._folder / f'{part:06d}-{name}'

  def path(self, part: int) -> Path:
    return self._paths[part]

  def is_sound(self, part: int) -> bool:
    """Whether it is there, as it was written."""
    try:
      with self.path(part).with_suffix('.tokens').open('rb') as file:
        digest = hashlib.file_digest(file, 'sha256').hexdigest()
      with self.path(part).with_suffix('.jsonl').open() as lines:
        return json.loads(next(lines)) == {'sha256': digest}
    except (FileNotFoundError, ValueError, StopIteration):
      return False

  def lines(self, part: int) -> Iterator[dict[str, Any]]:
    """What became of every item of a part, in order."""
    path = self.path(part).with_suffix('.jsonl')
    with path.open(encoding='utf-8') as lines:
      next(lines)  # the checksum
      yield from map(json.loads, lines)


def encode_all(
  parts: Parts,
  encoder: Encoder,
  dtype: np.dtype,
  unit: str,
  rejected: 'Rejected',
  workers: int,
) -> None:
  done = [part for part in range(len(parts)) if parts.is_sound(part)]
  missing = sorted(set(range(len(parts))) - set(done))
  num_done = sum(len(parts[part]) for part in done)
  with Progress('encode', len(parts.items), unit, completed=num_done) as bar:
    for part in done:
      rejected.look_at(part)
    jobs = [(parts[part], parts.path(part)) for part in missing]
    for at in _run(jobs, encoder, dtype, workers):
      bar.advance(len(parts[missing[at]]))
      rejected.look_at(missing[at])


def _run(
  jobs: list[tuple[Sequence[Item], Path]],
  encoder: Encoder,
  dtype: np.dtype,
  workers: int,
) -> Iterator[int]:
  """Does the jobs and yields their indices as they are done."""
  if workers == 1 or len(jobs) < 2:
    for at, (items, path) in enumerate(jobs):
      _encode_part(items, path, encoder, dtype)
      yield at
    return
  with concurrent.futures.ProcessPoolExecutor(
    min(workers, len(jobs)),
    multiprocessing.get_context('spawn'),
    initializer=_serve,
    initargs=(os.getpid(),),
  ) as pool:
    futures = {
      pool.submit(_encode_part, items, path, encoder, dtype): at
      for at, (items, path) in enumerate(jobs)
    }
    try:
      for future in concurrent.futures.as_completed(futures):
        future.result()
        yield futures[future]
    except process.BrokenProcessPool as error:
      raise UserError(
        'a worker process was killed, perhaps for want of memory; run it '
        'again with fewer --workers to go on'
      ) from error
    except BaseException:
      pool.shutdown(cancel_futures=True)
      raise


def _serve(parent: int) -> None:
  """Makes this process one that lives and stops with its parent."""
  # Ctrl-C reaches workers, too; the main process tells them when to stop.
  signal.signal(signal.SIGINT, signal.SIG_IGN)

  def watch() -> None:
    while os.getppid() == parent:
      time.sleep(1)
    os._exit(1)  # it was killed, and nobody waits for this work

  threading.Thread(target=watch, daemon=True).start()


def _encode_part(
  items: Sequence[Item], path: Path, encoder: Encoder, dtype: np.dtype
) -> None:
  """Writes PATH.tokens, then PATH.jsonl, which says that both are complete."""
  lines: list[dict[str, Any]] = []
  digest = hashlib.sha256()
  with _appearing(path.with_suffix('.tokens')) as file:
    for item in items:
      about: dict[str, Any] = {'split': item.split, 'name': item.name}
      try:
        document = encoder(item)
      except UserError as error:
        lines.append(about | {'rejected': ' '.join(str(error).split())})
        continue
      if document is None:
        continue
      payload = document.tokens_T.astype(dtype).tobytes()
      file.write(payload)
      digest.update(payload)
      num_tokens = len(document.tokens_T)
      lines.append(
        about | {'num_tokens': num_tokens, 'counts': document.counts}
      )
  with _appearing(path.with_suffix('.jsonl')) as file:
    for line in ({'sha256': digest.hexdigest()}, *lines):
      file.write(json.dumps(line).encode() + b'\n')


@contextlib.contextmanager
def _appearing(path: Path) -> Iterator[BinaryIO]:
  """A file that gets its name when it is complete and on disk."""
  temporary = path.with_suffix(f'.{os.getpid()}.tmp')
  with temporary.open('wb') as file:
    yield file
    file.flush()
    os.fsync(file.fileno())
  temporary.replace(path)


class Rejected:
  """Bad items so far; raises when they are too many."""

  def __init__(self, parts: Parts, num_files: int, strict: bool):
    self._parts = parts
    self._num_files = num_files
    self._most = 0 if strict else MAX_REJECTED * num_files
    self._strict = strict
    self._lines: list[dict[str, Any]] = []

  def look_at(self, part: int) -> None:
    for line in self._parts.lines(part):
      if 'rejected' in line:
        self._lines.append(line)
    if len(self._lines) <= self._most:
      return
    first = f'{self._lines[0]["name"]}: {self._lines[0]["rejected"]}'
    if self._strict:
      raise UserError(first)
    raise UserError(
      f'{len(self._lines)} of {self._num_files} are bad, more than '
      f'{MAX_REJECTED:.0%}, such as {first}'
    )
