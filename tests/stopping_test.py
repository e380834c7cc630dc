"""Signals are noted; a person may insist."""

import os
import signal

import pytest

from perceiver_ar import stopping
from perceiver_ar.errors import HostsError
from perceiver_ar.stopping import Stop


def test_the_first_signal_is_noted_and_a_cluster_may_repeat_it():
  before = signal.getsignal(signal.SIGTERM)
  stop = Stop()
  with stop.on_signals():
    assert stop.signal is None
    for _ in range(2):
      os.kill(os.getpid(), signal.SIGTERM)
    assert stop.signal == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) == before


def test_a_second_ctrl_c_ends_at_once():
  stop = Stop()
  with stop.on_signals():
    os.kill(os.getpid(), signal.SIGINT)
    assert stop.signal == signal.SIGINT
    with pytest.raises(KeyboardInterrupt):
      os.kill(os.getpid(), signal.SIGINT)


def test_sigterm_ends_what_has_nothing_to_save_once():
  before = signal.getsignal(signal.SIGTERM)
  with stopping.restarted_on_sigterm():
    with Stop().on_signals():
      os.kill(os.getpid(), signal.SIGTERM)  # that one's
    with pytest.raises(HostsError, match='SIGTERM'):
      os.kill(os.getpid(), signal.SIGTERM)
    os.kill(os.getpid(), signal.SIGTERM)
  assert signal.getsignal(signal.SIGTERM) == before
