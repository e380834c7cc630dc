"""What hangs is ended, with its stacks; what is only slow is not."""

import contextlib
import signal
import subprocess
import sys
import time

import pytest
from hosts import ends, start_job
from runs import TINY, wait_until

from perceiver_ar import checkpoint, distributed, journal
from perceiver_ar.errors import UserError
from perceiver_ar.watchdog import Watchdog

_HANGS = """
import sys, time
from perceiver_ar import main, prefetch
placed = prefetch.placed_batches
def hanging(*args):
  for at, batch in enumerate(placed(*args)):
    if at == 7:
      time.sleep(600)
    yield batch
prefetch.placed_batches = hanging
main.main(sys.argv[1:])
"""
_HANGS_EVALUATING = """
import sys, time
from perceiver_ar import evaluate, main
score = evaluate.Evaluator.run
def hanging(*args, asked, **kwargs):
  score(*args, asked=asked, **kwargs)
  time.sleep(600)
evaluate.Evaluator.run = hanging
main.main(sys.argv[1:])
"""


def test_limits_follow_what_a_kind_takes():
  with Watchdog(0.0) as watchdog:
    assert watchdog.limit('save') == 3600
    for kind, seconds in (('step', 0.0), ('save', 0.05), ('step', 0.0)):
      watchdog.begin(kind, '')
      time.sleep(seconds)
    watchdog.begin('end', '')
    assert 0.5 <= watchdog.limit('save') < 5
    assert watchdog.limit('step') < 0.5
    watchdog._seconds = 7.0
    assert watchdog.limit('save') == 7


def test_a_save_takes_what_saves_take_not_what_is_left_of_them():
  with Watchdog(0.0) as watchdog:
    watchdog.watch('write', '')
    watchdog.begin('step', '')
    assert watchdog.limit('write') == 3600
    watchdog.learn('write', 50.0)
    assert watchdog.limit('write') == 500


def test_time_at_barriers_does_not_count(monkeypatch):
  ended = []
  monkeypatch.setattr(Watchdog, '_end', lambda _, *what: ended.append(what))
  monkeypatch.setattr(Watchdog, 'limit', lambda _, kind: 0.3)
  with Watchdog(0.2) as watchdog:
    watchdog.begin('save', 'the checkpoint')
    with distributed._waiting():
      time.sleep(0.6)
    assert not ended
    time.sleep(0.6)
  assert ended[0][:2] == ('save', 'the checkpoint')


def test_a_save_in_the_background_is_watched_beside_all_else(monkeypatch):
  ended = []
  monkeypatch.setattr(Watchdog, '_end', lambda _, *what: ended.append(what))
  with Watchdog(0.1) as watchdog:
    watchdog.watch_writing(lambda: 4000.0)
    watchdog.begin('step', 'step 7')
    time.sleep(0.3)
    assert not ended  # nobody knows what a save takes
    watchdog.watch_writing(lambda: 4.9)
    watchdog.learn('write', 0.5)
    time.sleep(0.3)
    assert not ended
    watchdog.watch_writing(lambda: 5.1)
    time.sleep(0.3)
  assert ended[0] == ('write', 'writing a checkpoint, in step 7', 5.1)


def test_the_last_save_is_watched_whatever_ended_the_run(monkeypatch):
  ended = []
  monkeypatch.setattr(Watchdog, '_end', lambda _, *what: ended.append(what))
  monkeypatch.setattr(Watchdog, 'limit', lambda _, kind: 0.2)

  with (
    pytest.raises(UserError),
    Watchdog(0.2) as watchdog,
    contextlib.closing(contextlib.ExitStack()) as stack,
  ):
    stack.callback(time.sleep, 0.6)  # the other process has gone
    with watchdog.until_saved():
      watchdog.begin('step', 'step 7')
      raise UserError('a mistake')
  kind, what, _ = ended[0]
  assert kind == 'write' and 'last checkpoint, after: a mistake' in what


@pytest.mark.slow
@pytest.mark.parametrize(
  ('code', 'what', 'collective'),
  [
    (_HANGS, 'step 7', 'step 6'),
    (_HANGS_EVALUATING, 'the evaluation of step 6', 'scores of blocks from 24'),
  ],
)
def test_what_hangs_ends_the_run_and_says_where(
  tmp_path, code, what, collective
):
  words = [
    'train',
    TINY,
    f'--workdir={tmp_path}',
    '--config.train.hang_seconds=2',
    '--config.evaluate.every=6',
    '--config.checkpoint.save_every=4',
  ]
  process = subprocess.Popen(
    [sys.executable, '-c', code, *words],
    stderr=subprocess.PIPE,
    text=True,
  )
  _, said = process.communicate(timeout=120)
  assert process.returncode == 75, said
  assert f'hangs in {what}: ' in said
  assert "the last barrier was 'evaluation'" in said
  assert f"the last collective '{collective}'" in said
  assert 'in hanging' in said and 'most recent call first' in said
  assert checkpoint.saved_steps(tmp_path) == [4]
  end = journal.read(tmp_path)[-1]
  assert (end['reason'], end['status']) == (f'hung in {what}', 75)


@pytest.mark.slow
def test_a_host_that_stops_ends_the_others(tmp_path):
  words = [
    '--config.train.num_steps=100000',
    '--config.train.hang_seconds=5',
  ]
  job = start_job('train', TINY, f'--workdir={tmp_path}', *words, processes=2)
  path = tmp_path / 'metrics.jsonl'
  wait_until(lambda: path.exists() and path.stat().st_size > 5000, job[0])
  assert_the_first_ends(job)
  # So it does in an evaluation, of which a line tells that it goes on.
  words = ['--config.train.hang_seconds=5', '--config.evaluate.batch_size=2']
  words.append('--config.data.num_eval_documents=100000')
  job = start_job('evaluate', f'--workdir={tmp_path}', *words, processes=2)
  output = job[0].stdout
  assert output is not None
  assert any(' blocks/s' in line for line in output)
  assert_the_first_ends(job)


def assert_the_first_ends(job):
  """When the second one stops."""
  job[1].send_signal(signal.SIGSTOP)
  try:
    said, _ = job[0].communicate(timeout=100)
  finally:
    job[1].kill()
    ends(job)
  assert job[0].returncode == 75, said
  assert 'process 0 (' in said and 'hangs in ' in said
