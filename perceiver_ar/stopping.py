"""Signals that ask a run to end its step, save, and go."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any

from perceiver_ar.errors import HostsError


@contextlib.contextmanager
def restarted_on_sigterm() -> Iterator[None]:
  """SIGTERM ends what has nothing to save, to be started again.

  Raises:
    HostsError: wherever it is by then.
  """

  def end(number: int, frame: Any) -> None:
    signal.signal(number, signal.SIG_IGN)  # clusters ask twice out of habit
    raise HostsError('SIGTERM: ended with nothing to save; run again')

  before = signal.signal(signal.SIGTERM, end)
  try:
    yield
  finally:
    signal.signal(signal.SIGTERM, before)


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
