"""What the prepare_*.py tools share: many files in, one data set out.

The items of a data set are cut into parts, which worker processes encode into
a folder beside the output. A part that is there is not made again, so an
interrupted preparation goes on where it was. At the end the parts become the
data set in the order of the items: its bytes do not depend on how many workers
there were, nor on how often it was interrupted.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import errno
import fcntl
import glob
import hashlib
import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import process
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple, Protocol, TypeAlias

import numpy as np

from perceiver_ar.data import records, writer
from perceiver_ar.data.tokens import Codec
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
    stamp: changes with the file (see `stamp`).
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


Published: TypeAlias = dict[str, tuple[int, dict[str, int]]]


def stamp(path: Path) -> str:
  """Another one if the file has changed."""
  about = path.stat()
  return f'{about.st_size} {about.st_mtime_ns}'


def held_out(names: Sequence[str], share: float) -> set[str]:
  """Which are validation: chosen by name, so that the rest may come and go.

  At least one is held out, and at least one is not.
  """
  by_hash = sorted(
    names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()
  )
  num = int(np.ceil(share * len(names)))
  return set(by_hash[: min(num, len(names) - 1)])


def add_arguments(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--output', required=True, type=Path, help='the data set, made or replaced'
  )
  parser.add_argument(
    '--workers',
    type=int,
    default=os.cpu_count() or 1,
    help='processes; the result does not depend on it (one per core)',
  )
  parser.add_argument(
    '--strict',
    action='store_true',
    help='stop at the first bad file, instead of leaving up to 1%% out',
  )


def check_apart(source: Path, output: Path) -> None:
  """Refuses an output that the next run would take for input."""
  if output.resolve().is_relative_to(source.resolve()):
    raise UserError(
      f'--output={output} lies in --input={source}; choose a folder beside it'
    )


def work_folder(output: Path) -> Path:
  """Where an unfinished preparation keeps what it has.

  Raises:
    UserError: the output cannot be written, or holds anything else.
  """
  writer.check_replaceable(output)
  output = output.resolve()
  folder = output.with_name(f'.{output.name}.preparing')
  try:
    folder.mkdir(parents=True, exist_ok=True)
  except OSError as error:
    raise UserError(
      f'--output={output} cannot be created ({error.strerror}); choose another'
    ) from error
  return folder


def prepare(
  items: Sequence[Item],
  encoder: Encoder,
  *,
  output: Path,
  kind: str,
  variant: str,
  codec: Codec,
  positions: dict[str, Any],
  job: dict[str, Any],
  unit: str,
  per_part: int,
  workers: int,
  strict: bool,
  num_files: int,
  published: Published,
) -> records.Manifest:
  """Encodes the items and writes the data set, or goes on with that.

  Args:
    items: in the order that the data set has.
    encoder: makes a document of an item.
    output: folder of the data set.
    kind: text, music or images.
    variant: which published set this is; '' if none.
    codec: goes into the data set.
    positions: the layout of position ids.
    job: settings that decide what comes out; JSON.
    unit: what the items are, in the plural.
    per_part: items that are encoded, and lost in an interruption, together.
    workers: processes; 1 works in this one.
    strict: whether the first bad item ends it.
    num_files: of which 1 % may be bad; several items may come of one.
    published: of complete splits: the number of documents, and the counts
      that published results are divided by.

  Raises:
    UserError: too many items are bad, or the output cannot be replaced.
  """
  if workers < 1:
    raise UserError(f'--workers={workers} must be at least 1')
  _check_names(items)
  folder = work_folder(output)
  with _locked(folder):
    _clear_stale(output)
    job = job | {'kind': kind, 'variant': variant, 'codec': codec.sha256}
    parts = _Parts(folder, items, per_part, job | {'positions': positions})
    dtype = records.token_dtype(codec.vocab_size)
    rejected = _Rejected(parts, num_files, strict)
    _encode_all(parts, encoder, dtype, unit, rejected, workers)
    target = writer.Writer(
      output, kind=kind, variant=variant, codec=codec, positions=positions
    )
    with target:
      _merge(parts, target, dtype, unit)
      _publish(parts, target, published)
    shutil.rmtree(folder)
  return records.Manifest.load(output)


def _check_names(items: Sequence[Item]) -> None:
  seen: set[str] = set()
  for item in items:
    if item.name in seen:
      raise UserError(
        f'{item.name} is there twice; rename or remove one of them'
      )
    seen.add(item.name)
  if not any(item.split == 'train' for item in items):
    raise UserError('there is nothing to train on: the split train is empty')


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
  with (folder / 'lock').open('w') as file:
    try:
      fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError as error:
      raise UserError(
        f'{folder} is in use by another preparation of the same output; wait '
        'for it, or choose another --output'
      ) from error
    yield


def _clear_stale(output: Path) -> None:
  """Removes what a writer that was killed has left."""
  output = output.resolve()
  for pattern in ('partial', 'replaced'):
    name = glob.escape(output.name)
    for folder in output.parent.glob(f'.{name}.????????.{pattern}'):
      shutil.rmtree(folder, ignore_errors=True)


class _Parts:
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


def _encode_all(
  parts: _Parts,
  encoder: Encoder,
  dtype: np.dtype,
  unit: str,
  rejected: '_Rejected',
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


class _Rejected:
  """Bad items so far; raises when they are too many."""

  def __init__(self, parts: _Parts, num_files: int, strict: bool):
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


def _merge(
  parts: _Parts, target: writer.Writer, dtype: np.dtype, unit: str
) -> None:
  with Progress('write', len(parts.items), unit) as bar:
    for part in range(len(parts)):
      with parts.path(part).with_suffix('.tokens').open('rb') as file:
        for line in parts.lines(part):
          if 'rejected' in line:
            target.reject(line['split'], line['name'], line['rejected'])
            continue
          size = line['num_tokens'] * dtype.itemsize
          payload = file.read(size)
          assert len(payload) == size, file.name
          target.add(
            line['split'],
            np.frombuffer(payload, dtype),
            name=line['name'],
            counts=line['counts'],
          )
      bar.advance(len(parts[part]))


def _publish(
  parts: _Parts, target: writer.Writer, published: Published
) -> None:
  splits = {item.split for item in parts.items}
  for split, (num_documents, counts) in published.items():
    if split in splits and target.num_documents(split) == num_documents:
      target.publish(split, counts)


def summary(manifest: records.Manifest, output: Path) -> None:
  """Prints a table of what is in the data set now."""
  units = sorted(
    {u for split in manifest.splits.values() for u in split.counts}
  )
  columns = ('documents', 'rejected', 'tokens', *units)
  print(f'{"split":12}' + ''.join(f'{name:>16}' for name in columns))
  for name, split in sorted(manifest.splits.items()):
    counts = (
      split.num_documents,
      split.num_rejected,
      split.num_tokens,
      *(split.counts[unit] for unit in units),
    )
    print(f'{name:12}' + ''.join(f'{number:16,}' for number in counts))
  variant = f' ({manifest.variant})' if manifest.variant else ''
  print(f'{output} is complete{variant}.')
  if any(split.num_rejected for split in manifest.splits.values()):
    print(f'What was left out, and why: {output / writer.REJECTED}')


def run(name: str, work: Callable[[], None]) -> int:
  """Does the work of a tool and returns the exit status."""
  try:
    work()
  except UserError as error:
    print(f'{name}: {" ".join(str(error).split())}', file=sys.stderr)
    return 2
  except KeyboardInterrupt:
    print(f'{name}: stopped; run it again to go on', file=sys.stderr)
    return 130
  except OSError as error:
    if error.errno not in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
      raise
    print(
      f'{name}: {error.filename or "the disk"}: {error.strerror}; make room '
      'and run it again to go on',
      file=sys.stderr,
    )
    return 2
  return 0
