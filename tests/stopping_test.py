"""Signals are noted; a person may insist."""

import os
import signal
import subprocess
import sys
import time

import pytest

from perceiver_ar import stopping
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


_BLOCKED = """
import ctypes
from perceiver_ar import stopping
with stopping.restarted_on_sigterm():
  print('ready', flush=True)
  while True:
    ctypes.CDLL(None).sleep(600)  # where no handler of Python's runs
"""


def test_sigterm_ends_at_once_what_has_nothing_to_save():
  process = subprocess.Popen(
    [sys.executable, '-c', _BLOCKED],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )
  assert process.stdout is not None
  assert process.stdout.readline() == 'ready\n'
  process.send_signal(signal.SIGTERM)
  _, said = process.communicate(timeout=10)
  assert process.returncode == 75
  assert said == (
    'perceiver-ar: SIGTERM: ended with nothing to save; run again\n'
  )


def test_sigterm_is_left_to_the_run_that_saves():
  before = signal.getsignal(signal.SIGTERM)
  stop = Stop()
  with stopping.restarted_on_sigterm(), stop.on_signals():
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(0.2)
  assert stop.signal == signal.SIGTERM
  assert signal.getsignal(signal.SIGTERM) == before
