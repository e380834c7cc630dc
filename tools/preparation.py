"""What the prepare_*.py tools share: many files in, one data set out.

The items of a data set are cut into parts, which worker processes encode into
a folder beside the output. A part that is there is not made again, so an
interrupted preparation goes on where it was. At the end the parts become the
data set in the order of the items: its bytes do not depend on how many workers
there were, nor on how often it was interrupted.
"""

import argparse
import contextlib
import errno
import fcntl
import glob
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, TypeAlias

import encoded_parts
import numpy as np

from perceiver_ar.data import records, writer
from perceiver_ar.data.tokens import Codec
from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress

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
  items: Sequence[encoded_parts.Item],
  encoder: encoded_parts.Encoder,
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
    parts = encoded_parts.Parts(
      folder, items, per_part, job | {'positions': positions}
    )
    dtype = records.token_dtype(codec.vocab_size)
    rejected = encoded_parts.Rejected(parts, num_files, strict)
    encoded_parts.encode_all(parts, encoder, dtype, unit, rejected, workers)
    target = writer.Writer(
      output, kind=kind, variant=variant, codec=codec, positions=positions
    )
    with target:
      _merge(parts, target, dtype, unit)
      _publish(parts, target, published)
    shutil.rmtree(folder)
  return records.Manifest.load(output)


def _check_names(items: Sequence[encoded_parts.Item]) -> None:
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


def _merge(
  parts: encoded_parts.Parts, target: writer.Writer, dtype: np.dtype, unit: str
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
  parts: encoded_parts.Parts, target: writer.Writer, published: Published
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
