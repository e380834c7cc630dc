"""Where all the time of a run went, from its first start until now.

What steps took is read off metrics.jsonl, which is on disk after each of them
and has no step twice; the rest off the journal. So a crash costs the account
nothing but the last minute of whatever was no step.
"""

import bisect
import collections
import dataclasses
import datetime
import itertools
from collections.abc import Sequence

from perceiver_ar import metrics
from perceiver_ar.lines import Row
from perceiver_ar.report import page, training

# What seconds were spent on, and what people call it; steps come first.
NAMES = {
  'step': 'steps that count',
  'lost': 'steps done in vain',
  'unfinished': 'steps that did not end',
  'data': 'waiting for data',
  'start': 'starting',
  'compile': 'compiling',
  'save': 'saving',
  'evaluation': 'evaluating',
  'end': 'ending',
  'down': 'not running',
}
_CRASH = 'ended without a word (killed, or its machine died)'
_NO_END = 'has no end yet (it runs, or was killed): last heard of'
_HUNG = 'ended: hung'
_SHOWN = 8  # of what there may be many of


@dataclasses.dataclass(frozen=True, kw_only=True)
class Start:
  """One start of the run.

  Attributes:
    began: when its process did, in seconds since the epoch.
    last: when it was last heard of.
    how: it ended, if it has.
    seconds: by what they were spent on, as far as it told.
    row: its line in the journal.
  """

  began: float
  last: float
  how: str
  seconds: dict[str, float]
  row: Row


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ledger:
  """All of a run.

  Attributes:
    starts: in order, one at least.
    wall: seconds from the first start to when it was last heard of, the time
      between starts included.
    seconds: the same, by the names of `NAMES`.
    memory: the most bytes of process 0 that a save took, and a restore.
    events: whatever else happened.
  """

  starts: list[Start]
  wall: float
  seconds: dict[str, float]
  memory: dict[str, int]
  events: list[Row]

  @property
  def goodput(self) -> float:
    """The share of all seconds that went into steps which count."""
    return self.seconds['step'] / self.wall if self.wall else 0.0


def make(rows: Sequence[Row], steps: Sequence[metrics.Row]) -> Ledger | None:
  """From the journal and the training steps; None where there is no start."""
  firsts = [i for i, row in enumerate(rows) if row['event'] == 'start']
  if not firsts:
    return None
  ends = [*firsts[1:], len(rows)]
  starts = [
    _start(rows[i:end], end == len(rows), steps)
    for i, end in zip(firsts, ends, strict=True)
  ]
  wall = starts[-1].last - starts[0].began
  quiet = {'start', 'seconds', 'save', 'memory', 'evaluation', 'end'}
  return Ledger(
    starts=starts,
    wall=wall,
    seconds=_seconds(starts, rows, steps, wall),
    memory=_memory(rows),
    events=[row for row in rows if row['event'] not in quiet],
  )


def describe(ledger: Ledger) -> list[str]:
  """The ledger in a few lines."""
  told = [f'start {n}: {say(s)}' for n, s in enumerate(ledger.starts, 1)]
  told.append(
    f'goodput {ledger.goodput:.1%}: of {page.duration(ledger.wall)} since the '
    f'first start, {page.duration(ledger.seconds["step"])} went into steps '
    'that count'
  )
  spent = [
    f'{NAMES.get(kind, kind)} {page.duration(seconds)}'
    for kind, seconds in ledger.seconds.items()
    if seconds >= 0.5
  ]
  told.append(f'where the time went: {", ".join(spent)}')
  if ledger.memory:
    most = [f'{num / 1e9:.3g} GB to {x}' for x, num in ledger.memory.items()]
    told.append(f'memory of the host, at most: {", ".join(most)}')
  return told + _found(ledger.events)


def say(start: Start) -> str:
  """What there is to say of a start, in a sentence."""
  told = (
    f'{at(start.began)}, from step {start.row["first_step"]:,} on '
    f'{start.row["place"]["devices"]}, {start.how} after '
    f'{page.duration(start.last - start.began)}'
  )
  if changes := start.row['changes']:
    more = f'; and {len(changes) - _SHOWN} more' if changes[_SHOWN:] else ''
    told += f'; changed: {"; ".join(changes[:_SHOWN])}{more}'
  return told


def at(time: float) -> str:
  """A time for people, where they are."""
  moment = datetime.datetime.fromtimestamp(time)
  return moment.isoformat(' ', 'seconds')


def _memory(rows: Sequence[Row]) -> dict[str, int]:
  """By what was done: save, restore."""
  most: dict[str, int] = {}
  for row in rows:
    if row['event'] == 'memory' and row['bytes'] is not None:
      most[row['doing']] = max(row['bytes'], most.get(row['doing'], 0))
  return most


def _found(events: Sequence[Row]) -> list[str]:
  """What somebody may have to look at."""
  told = []
  by_name = collections.defaultdict(list)
  for row in events:
    by_name[row['event']].append(row)
  if lost := by_name.pop('lost', []):
    number = sum(row['steps'] for row in lost)
    told.append(f'steps done in vain, after a crash: {number:,}')
  names = {
    'set_aside': 'checkpoints set aside',
    'skipped': 'skipped steps',
    'failed_start': 'starts that failed',
  }
  for name, some in by_name.items():
    number = [f'{row["step"]:,}' for row in some if 'step' in row]
    more = ', ...' if number[_SHOWN:] else ''
    where = f' (step {", ".join(number[:_SHOWN])}{more})' if number else ''
    told.append(f'{names.get(name, name)}: {len(some):,}{where}')
  return told


def _start(rows: Sequence[Row], is_last: bool, steps: Sequence[Row]) -> Start:
  """Of the lines from one start to the next."""
  first, seconds = rows[0], {}
  failed = [i for i, row in enumerate(rows) if row['event'] == 'failed_start']
  if failed:  # after it
    rows = rows[: failed[0]]
  last = told = first['time']
  how = _CRASH if failed or not is_last else _NO_END
  for row in rows:
    last = max(last, row['time'])
    if row['event'] == 'seconds':
      about = ('time', 'at', 'event')
      seconds = {k: v for k, v in row.items() if k not in about}
      told = row['time']
    elif row['event'] == 'end':
      how, last = f'ended: {row["reason"]}', row['time']
      break
  else:
    if is_last:
      # Steps are on disk at once, and tell of the time since.
      mine = (s['seconds'] for s in steps if s['step'] >= first['first_step'])
      known = seconds.get('step', 0.0) + seconds.get('data', 0.0)
      last = max(last, told + sum(mine) - known)
  return Start(
    began=first['began'], last=last, how=how, seconds=seconds, row=first
  )


def _seconds(
  starts: Sequence[Start],
  rows: Sequence[Row],
  steps: Sequence[metrics.Row],
  wall: float,
) -> dict[str, float]:
  seconds: dict[str, float] = dict.fromkeys(NAMES, 0.0)
  for start in starts:
    for kind, value in start.seconds.items():
      if kind not in ('step', 'data'):
        seconds[kind] = seconds.get(kind, 0.0) + value
  # A run may be older than its journal.
  first = min(start.row['first_step'] for start in starts)
  for row in steps:
    if row['step'] >= first:
      waited = training.waited(row) * row['seconds']
      seconds['data'] += waited
      seconds['step'] += row['seconds'] - waited
  lost = (row['seconds'] for row in rows if row['event'] == 'lost')
  seconds['lost'] = sum(lost)
  seconds['unfinished'] = _unfinished(starts, rows, steps)
  seconds['start'] += sum(
    row['seconds']
    for row in rows
    if row['event'] == 'failed_start' and row['time'] < starts[-1].began
  )
  seconds['down'] = max(wall - sum(seconds.values()), 0.0)
  return seconds


def _unfinished(
  starts: Sequence[Start], rows: Sequence[Row], steps: Sequence[metrics.Row]
) -> float:
  """What starts told of steps of which there is no row: a hang, a crash."""
  numbers = [row['step'] for row in steps]
  until = [0.0, *itertools.accumulate(row['seconds'] for row in steps)]
  firsts = [start.row['first_step'] for start in starts]
  at = [bisect.bisect_left(numbers, first) for first in firsts]
  kept = [until[b] - until[a] for a, b in itertools.pairwise([*at, len(steps)])]
  # Those that a start does again were made by the one before.
  lost, index = [0.0] * len(starts), -1
  for row in rows:
    index += row['event'] == 'start'
    if row['event'] == 'lost' and index > 0:
      lost[index - 1] += row['seconds']
  unfinished, gone = 0.0, 0.0
  for start, some, more in reversed(list(zip(starts, kept, lost, strict=True))):
    told = sum(start.seconds.get(kind, 0.0) for kind in ('step', 'data'))
    rest = max(told - max(some, 0.0), 0.0)
    # What a start cannot have lost was lost by those before.
    gone += more
    if start.how == _CRASH or start.how.startswith(_HUNG):
      unfinished += max(rest - gone, 0.0)
    gone = max(gone - rest, 0.0)
  return unfinished
