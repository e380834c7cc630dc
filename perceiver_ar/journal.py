"""The journal of a run: what happened to it, and where every second went.

WORKDIR/journal.jsonl keeps every start and end of the run, whatever it was
that ended it; one that is refused as a mistake is none. A line is one JSON
object with `time` (seconds since the epoch), `at` (the same for people, UTC)
and `event`:

  start: config, software and place, `changes` since the last start in words,
    first_step, began (when the process did)
  lost: steps that were done before, and their seconds; they are done again
  seconds: since this start, by what they were spent on; now and then
  save, evaluation: of step; seconds that the loop stood still for it
  memory: by how many bytes of host memory process 0 grew to save or restore
  skipped: a step that was not finite, or a spike
  set_aside: a damaged checkpoint
  slow: the host that the others wait for
  end: reason and exit status; a start without an end is a crash
  failed_start: the same, of a process that ended while it restored the state to
    go on from, and the seconds that it took

and whatever else is told to `event`. Process 0 writes it; on the others, and
where no run is open, nothing happens. JSON knows no NaN: see metrics.jsonl.
"""

import contextlib
import dataclasses
import datetime
import json
import os
import platform
import shlex
import sys
import threading
import time
from collections.abc import Iterator, Mapping
from typing import Any

from etils import epath

from perceiver_ar import errors, lines, software
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError
from perceiver_ar.lines import Row

_EVERY_SECONDS = 60.0  # at most so many are lost of the account by a crash;
# in a bucket, those since the last save
_LAST_SECONDS = 2.0  # that a process which ends at once has for its last word


@dataclasses.dataclass
class _Run:
  """The run that is open in this process, and its clock."""

  path: epath.Path | None = None
  file: lines.Appender | None = None
  waiting: list[Row] = dataclasses.field(default_factory=list)
  kind: str = ''  # what is being done; '' while the clock stands
  since: float = 0.0
  seconds: dict[str, float] = dataclasses.field(default_factory=dict)
  # Events come from any thread.
  lock: Any = dataclasses.field(default_factory=threading.RLock)


_run = _Run()


def start_clock() -> None:
  """A process begins; what it does until `begin` is to start."""
  global _run
  _run = _Run(kind='start', since=time.monotonic())


def begin(kind: str) -> None:
  """What was begun before is done; from now on seconds are spent on this.

  Args:
    kind: start, compile, step, save, evaluation, end.
  """
  if not _run.kind:
    return
  before, now = _run.kind, time.monotonic()
  with _run.lock:
    _run.seconds = _account(now)
    _run.kind, _run.since = kind, now
  if kind == 'step' and before != 'step':
    _tell_seconds()


def spent(kind: str, seconds: float) -> None:
  """So many of the seconds of what is being done went into this: data."""
  if _run.kind:
    with _run.lock:
      _run.seconds[kind] = _run.seconds.get(kind, 0.0) + seconds
      _run.since += seconds


def taken() -> float:
  """The seconds since the last `begin`."""
  return round(time.monotonic() - _run.since, 3)


@contextlib.contextmanager
def kept(workdir: epath.PathLike, process_index: int) -> Iterator[None]:
  """Opens the journal of a run; an exception is the reason of its end.

  Nothing is written before the run has a `start`, or something happened.
  """
  global _run
  if not _run.kind:
    start_clock()
  if process_index == 0:
    _run.path = _path(workdir)
  over = threading.Event()
  threading.Thread(target=_keep_telling, args=(over,), daemon=True).start()
  try:
    yield
  except BaseException as error:
    end(*_explain(error))
    raise
  finally:
    over.set()
    _close()
    _run = _Run()


def start(config: Config, mesh: Any, first_step: int) -> None:
  """The run begins, or goes on, from this state."""
  if _run.path is None:
    return
  devices = list(mesh.devices.flat)
  facts = {
    'config': dataclasses.asdict(config),
    'software': software.facts(),
    'place': {
      'processes': len({device.process_index for device in devices}),
      'devices': f'{len(devices)} x {devices[0].device_kind}',
      'host': f'{platform.platform()}, {os.cpu_count()} cores',
    },
  }
  facts = json.loads(json.dumps(facts))  # as it will be read
  with _run.lock:  # nothing comes before the start
    starts = [row for row in _open(_run.path) if row['event'] == 'start']
    changes = _changes(starts[-1], facts) if starts else []
    seconds = sum(_account(time.monotonic()).values())
    _write(
      _row(
        'start',
        first_step=first_step,
        began=round(time.time() - seconds, 3),
        command=shlex.join(sys.argv),
        changes=changes,
        **facts,
      )
    )
    for row in _run.waiting:
      _write(row)
    sync()


def event(name: str, **facts: Any) -> None:
  """Adds a line; what happens before the start is written after it."""
  if _run.path is None:
    return
  row = _row(name, **facts)
  with _run.lock:
    if _run.file is None:
      _run.waiting.append(row)
    else:
      _write(row)


def sync() -> None:
  """What is written is in the file, in a bucket too."""
  with _run.lock:
    if _run.file is not None:
      _run.file.sync()


def end(reason: str, status: int) -> None:
  """The last word; what is said after it is only its echo."""
  # That it cannot be written may be the reason: it must not hide it.
  with _run.lock, contextlib.suppress(Exception):
    path, is_mistake = _run.path, status == errors.MISTAKE
    if path is None or (_run.file is None and is_mistake):
      return
    if _run.file is None and not path.exists():
      return  # it never began
    try:
      if _run.file is None:
        _tell_failed_start(path, reason, status)
      else:
        _tell_seconds()
        event('end', reason=reason, status=status)
    finally:
      file, _run.file, _run.path = _run.file, None, None
      if file is not None:
        file.close()


def _tell_failed_start(path: epath.Path, reason: str, status: int) -> None:
  seconds = round(sum(_account(time.monotonic()).values()), 3)
  _open(path)
  _write(_row('failed_start', reason=reason, status=status, seconds=seconds))
  for row in _run.waiting:
    _write(row)


def end_at_once(reason: str, status: int) -> None:
  """For another thread that ends the process, whatever hangs meanwhile."""
  last = threading.Thread(target=end, args=(reason, status), daemon=True)
  last.start()
  last.join(_LAST_SECONDS)


def read(workdir: epath.PathLike) -> list[Row]:
  """The lines, without one that is being written; none where there is no file.

  Raises:
    UserError: a line before the last is broken.
  """
  return [row for _, row in lines.read(_path(workdir), 'event')]


def check_never_saved(workdir: epath.PathLike) -> None:
  """Where there is no checkpoint: the run would begin again, unasked.

  Raises:
    UserError: the run has saved, and what it saved is not there.
  """
  saved = [
    row['step']
    for row in read(workdir)
    if row['event'] == 'memory' and row['doing'] == 'save'
  ]
  if saved:
    raise UserError(
      f'{_path(workdir)} tells of a checkpoint of step {saved[-1]}, and '
      f'{epath.Path(workdir) / "checkpoints"} has none; bring the folder back '
      '(is its disk mounted?), or choose another --workdir'
    )


def _path(workdir: epath.PathLike) -> epath.Path:
  return epath.Path(workdir) / 'journal.jsonl'


def _account(now: float) -> dict[str, float]:
  """Seconds by kind, those of what is being done too."""
  all_of_it = _run.seconds.get(_run.kind, 0.0) + now - _run.since
  return _run.seconds | {_run.kind: all_of_it}


def _tell_seconds() -> None:
  with _run.lock:
    if _run.file is not None:
      account = _account(time.monotonic())
      event('seconds', **{kind: round(x, 3) for kind, x in account.items()})


def _keep_telling(over: threading.Event) -> None:
  """However long it takes, what is being done, and then ends in a crash."""
  while not over.wait(_EVERY_SECONDS):
    # What is wrong with the file, the next that writes to it will say.
    with contextlib.suppress(OSError, errors.SaveError):
      _tell_seconds()


def _open(path: epath.Path) -> list[Row]:
  """Returns what earlier starts have written."""
  kept = lines.read(path, 'event')
  _run.file = lines.Appender(path, [line for line, _ in kept])
  return [row for _, row in kept]


def _write(row: Row) -> None:
  assert _run.file is not None
  _run.file.write(row)


def _close() -> None:
  """Without an end, where there was none to tell."""
  # To have read a checkpoint is no news of a run that does not go on.
  is_news = any(row['event'] != 'memory' for row in _run.waiting)
  if _run.path is not None and is_news and _run.file is None:
    _open(_run.path)
    for row in _run.waiting:
      _write(row)
  if _run.file is not None:
    _run.file.close()


def _row(name: str, **facts: Any) -> Row:
  now = datetime.datetime.now(datetime.UTC)
  about = {
    'time': round(now.timestamp(), 3),
    'at': now.strftime('%Y-%m-%d %H:%M:%S'),
    'event': name,
  }
  return about | lines.plain(facts)


def _explain(error: BaseException) -> tuple[str, int]:
  if isinstance(error, KeyboardInterrupt):
    return 'SIGINT', 130
  sentence, status = errors.explain(error)
  return sentence or f'{type(error).__name__}: {error}'[:1000], status


def _changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> list[str]:
  """What is not as it was at the last start: config, software, place."""
  changes = []
  for part in new:
    was, now = _flat(old.get(part, {})), _flat(new[part])
    changes += [
      f'{key}: {was.get(key, "absent")} -> {now.get(key, "absent")}'
      for key in dict.fromkeys([*was, *now])
      if was.get(key) != now.get(key)
    ]
  return changes


def _flat(tree: Mapping[str, Any], prefix: str = '') -> dict[str, Any]:
  flat = {}
  for name, value in tree.items():
    if isinstance(value, dict):
      flat |= _flat(value, f'{prefix}{name}.')
    else:
      flat[prefix + name] = value
  return flat
