"""Progress of anything longer than a few seconds, for the person who waits.

On a terminal a bar with rate and time left; elsewhere (a log file, a cluster)
a plain line now and then. Everything goes to stderr.
"""

import collections
import sys
import time
from types import TracebackType

from rich import console as rich_console
from rich import progress as rich_progress

_BAR_SECONDS = 0.1  # between redraws, so that a call costs next to nothing
_LINE_SECONDS = 10.0  # between plain lines
_RATE_SECONDS = 60.0  # over which the rate is measured


class Progress:
  """Counts `total` units; use as a context manager.

  Args:
    description: what is being done, such as 'train'.
    total: units at the end.
    unit: their name in the plural, such as 'steps'.
    completed: units done before (a run that resumes); the rate ignores them.
    visible: False on all hosts but one.
  """

  def __init__(
    self,
    description: str,
    total: int,
    unit: str,
    completed: int = 0,
    visible: bool = True,
  ):
    self._description = description
    self._total = total
    self._unit = unit
    self._completed = completed
    self._visible = visible
    self._note = ''
    self._printed = False
    self._bar: rich_progress.Progress | None = None
    self._task = rich_progress.TaskID(0)

  def __enter__(self) -> 'Progress':
    now = time.monotonic()
    self._samples = collections.deque([(now, self._completed)])
    self._shown = now
    self._interval = _LINE_SECONDS
    if self._visible and sys.stderr.isatty():
      self._interval = _BAR_SECONDS
      self._start_bar()
    return self

  def advance(self, n: int, note: str = '') -> None:
    """Counts `n` more units; `note` stays until the next one."""
    self._completed += n
    if note:
      self._note = note
    if not self._visible:
      return
    now = time.monotonic()
    if now - self._shown >= self._interval:
      self._shown = now
      self._show(now)

  def __exit__(
    self,
    kind: type[BaseException] | None,
    error: BaseException | None,
    traceback: TracebackType | None,
  ) -> None:
    # Work that was over before its first line needs no last one.
    if self._bar is not None or self._printed:
      self._show(time.monotonic())
    if self._bar is not None:
      self._bar.stop()

  def _start_bar(self) -> None:
    self._bar = rich_progress.Progress(
      rich_progress.TextColumn('{task.description}'),
      rich_progress.BarColumn(),
      rich_progress.TextColumn('{task.fields[status]}'),
      console=rich_console.Console(stderr=True),
      # What is printed meanwhile goes above the bar, but never from a file
      # that stdout was redirected to.
      redirect_stdout=sys.stdout.isatty(),
    )
    self._task = self._bar.add_task(
      self._description,
      total=self._total,
      completed=self._completed,
      status=f'{self._completed:,}/{self._total:,} {self._unit}',
    )
    self._bar.start()

  def _show(self, now: float) -> None:
    while len(self._samples) > 1 and now - self._samples[0][0] > _RATE_SECONDS:
      self._samples.popleft()
    status = self._status(now)
    self._samples.append((now, self._completed))
    if self._bar is not None:
      self._bar.update(self._task, completed=self._completed, status=status)
    else:
      self._printed = True
      print(f'{self._description}: {status}', file=sys.stderr, flush=True)

  def _status(self, now: float) -> str:
    since, before = self._samples[0]
    parts = [f'{self._completed:,}/{self._total:,} {self._unit}']
    if self._completed > before and now > since:
      rate = (self._completed - before) / (now - since)
      parts.append(f'{rate:,.3g} {self._unit}/s')
      left = max(0, self._total - self._completed) / rate
      parts.append(f'{_clock(left)} left')
    if self._note:
      parts.append(self._note)
    return ', '.join(parts)


def _clock(seconds: float) -> str:
  minutes, seconds = divmod(round(seconds), 60)
  hours, minutes = divmod(minutes, 60)
  return (
    f'{hours}:{minutes:02d}:{seconds:02d}'
    if hours
    else (f'{minutes}:{seconds:02d}')
  )
