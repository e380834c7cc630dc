"""Ends a process that has stopped going on, with the stacks of its threads.

On many hosts one that hangs holds up all: each of them waits in a collective
that has no time limit of its own. What is being done must be over within a
multiple of what it usually takes. Time at our own barriers does not count:
these have a limit, and name who is late.
"""

import collections
import contextlib
import faulthandler
import os
import statistics
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Self

from perceiver_ar import distributed, journal
from perceiver_ar.errors import RESTART

# What a save goes on with in the background: its seconds are told, as waiting
# for the rest of it says nothing of them.
WRITE = 'write'

_PATIENCE = 10  # times the median
_FIRST_SECONDS = 3600.0  # while nothing is known of what it takes
_LAST_SECONDS = 10.0  # to take leave of the others
_REMEMBERED = 100


class Watchdog:
  """A thread that watches the thread which calls `begin`."""

  def __init__(self, seconds: float, kind: str = '', what: str = ''):
    """Anything may take so many `seconds`, and longer if it usually does.

    Args:
      seconds: 0: nothing is watched.
      kind: of what is done first, as in `watch`.
      what: the same.
    """
    self._seconds = seconds
    self._taken: dict[str, collections.deque[float]] = collections.defaultdict(
      lambda: collections.deque(maxlen=_REMEMBERED)
    )
    self._now = kind, what, self._clock()
    self._writing: Callable[[], float] = lambda: 0.0
    self._over = threading.Event()
    self._thread = threading.Thread(target=self._watch, daemon=True)

  def __enter__(self) -> Self:
    if self._seconds:
      self._thread.start()
    return self

  def __exit__(self, *exception: object) -> None:
    self._over.set()

  def begin(self, kind: str, what: str) -> None:
    """As `watch`, and the journal's clock is told, too."""
    self.watch(kind, what)
    journal.begin(kind)

  def watch(self, kind: str, what: str) -> None:
    """What was begun before is done.

    Args:
      kind: of which one takes about as long as another: step, save.
      what: for people, such as 'step 57'.
    """
    before, _, since = self._now
    now = self._clock()
    if before != WRITE:
      self.learn(before, now - since)
    self._now = kind, what, now

  def learn(self, kind: str, seconds: float) -> None:
    """One of this kind has taken so long."""
    self._taken[kind].append(seconds)

  def watch_writing(self, seconds: Callable[[], float]) -> None:
    """Beside all else, as it goes on in the background.

    Args:
      seconds: of the save that is being written; 0 where none is.
    """
    self._writing = seconds

  @contextlib.contextmanager
  def until_saved(self) -> Iterator[None]:
    """After this, whatever ends it, only the last save is waited for."""
    what = 'writing the last checkpoint'
    try:
      yield
    except BaseException as error:
      what += f', after: {error}'
      raise
    finally:
      self.watch(WRITE, what)

  @staticmethod
  def _clock() -> float:
    return time.monotonic() - distributed.waited()

  def limit(self, kind: str) -> float:
    """The seconds that one of this kind may take now."""
    taken = self._taken.get(kind)
    if not taken:
      return max(self._seconds, _FIRST_SECONDS)
    return max(self._seconds, _PATIENCE * statistics.median(taken))

  def _watch(self) -> None:
    while not self._over.wait(min(self._seconds / 4, 1.0)):
      kind, what, since = self._now
      taken = self._clock() - since
      if kind and taken > self.limit(kind):
        self._end(kind, what, taken)
      # The first is waited for by the next: nobody knows what it takes.
      elif WRITE in self._taken:
        writing = self._writing()
        if writing > self.limit(WRITE):
          self._end(WRITE, f'writing a checkpoint, in {what}', writing)

  def _end(self, kind: str, what: str, taken: float) -> None:
    # Whatever hangs, the file system or the other processes with it.
    last = threading.Timer(_LAST_SECONDS, os._exit, [RESTART])
    last.daemon = True
    last.start()
    print(
      f'perceiver-ar: process {distributed.me()} hangs in {what}: {taken:.0f} '
      f's, and the limit is {self.limit(kind):.0f} s '
      f'(train.hang_seconds); {distributed.last_met()}; the stacks of its '
      'threads follow, and it ends, to be started again',
      file=sys.stderr,
      flush=True,
    )
    faulthandler.dump_traceback(2, all_threads=True)
    journal.end_at_once(f'hung in {what}', RESTART)
    distributed.leave(RESTART)
    os._exit(RESTART)
