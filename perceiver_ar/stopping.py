"""Signals that ask a run to end its step, save, and go."""

import contextlib
import signal
from collections.abc import Iterator
from typing import Any


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
    # A person who asks twice has no more patience; a cluster asks twice out of
    # habit, and what is being saved is worth its time.
    if self.signal is not None and number == signal.SIGINT:
      raise KeyboardInterrupt
    self.signal = self.signal or number
