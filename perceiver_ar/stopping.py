"""Signals that ask a run to end its step, save, and go; or just to go."""

import contextlib
import os
import signal
import sys
import threading
from collections.abc import Iterator
from typing import Any

from perceiver_ar import journal
from perceiver_ar.errors import RESTART, HostsError

_NOTHING_TO_SAVE = 'SIGTERM: ended with nothing to save; run again'


@contextlib.contextmanager
def restarted_on_sigterm() -> Iterator[None]:
  """SIGTERM ends what has nothing to save at once, to be started again.

  By a thread: where a signal's handler would run, the compiler, a collective or
  a file system may be for minutes; and an exception of it could be mistaken for
  one of theirs.
  """

  def handler(number: int, frame: Any) -> None:
    """Nothing; but without a handler no byte is written."""

  heard, written = os.pipe()
  os.set_blocking(written, False)
  before = signal.signal(signal.SIGTERM, handler)
  fd = signal.set_wakeup_fd(written, warn_on_full_buffer=False)

  def listen() -> None:
    while number := os.read(heard, 1):
      # Else it is `Stop`'s.
      is_ours = signal.getsignal(signal.SIGTERM) is handler
      if number[0] == signal.SIGTERM and is_ours:
        _leave()

  thread = threading.Thread(target=listen, daemon=True)
  thread.start()
  try:
    yield
  finally:
    signal.set_wakeup_fd(fd)
    signal.signal(signal.SIGTERM, before)
    os.close(written)
    thread.join()
    os.close(heard)


def _leave() -> None:
  print(f'perceiver-ar: {_NOTHING_TO_SAVE}', file=sys.stderr, flush=True)
  journal.end_at_once('SIGTERM', RESTART)
  # Not imported here: it may be in the middle of that.
  distributed = sys.modules.get('perceiver_ar.distributed')
  if distributed is not None and hasattr(distributed, 'leave'):
    distributed.leave(RESTART)
  os._exit(RESTART)


class Interrupted(Exception):  # noqa: N818 (it is no error)
  """Some process of the job was asked to end by this `signal`."""

  def __init__(self, number: int):
    super().__init__(f'signal {number}')
    self.signal = number


class Stop:
  """Knows of Ctrl-C or SIGTERM, so that the loop can end its step."""

  def __init__(self) -> None:
    self.signal: int | None = None

  @contextlib.contextmanager
  def on_signals(self) -> Iterator[None]:
    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, self._note) for number in handled]
    try:
      yield
    finally:
      for number, handler in zip(handled, before, strict=True):
        signal.signal(number, handler)

  def _note(self, number: int, frame: Any) -> None:
    # A person who asks twice has no more patience; of a cluster it means
    # nothing, and what is being saved is worth its time.
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = self.signal or number


@contextlib.contextmanager
def ended_together(num_processes: int) -> Iterator[Stop]:
  """Of several processes none ends by itself, which would break the others.

  One alone does, and at once. There is nothing to save.

  Raises:
    HostsError, KeyboardInterrupt: for what is `Interrupted` in it.
  """
  stop = Stop()
  with stop.on_signals() if num_processes > 1 else contextlib.nullcontext():
    try:
      yield stop
    except Interrupted as interrupted:
      if interrupted.signal == signal.SIGINT:
        raise KeyboardInterrupt from None
      raise HostsError(_NOTHING_TO_SAVE) from None
