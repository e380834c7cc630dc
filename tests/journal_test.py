"""What is told to the journal is in it, and it holds up nobody.

The journals of real runs are in train_test.py.
"""

import math
import threading
import time
import types

import numpy as np
import pytest
from tiny import make_config

from perceiver_ar import journal, lines, paths, stopping
from perceiver_ar.errors import HostsError, UserError

_DEVICE = types.SimpleNamespace(process_index=0, device_kind='cpu')
_MESH = types.SimpleNamespace(devices=np.array([_DEVICE, _DEVICE]))


def of(kind, some):
  return [row for row in some if row['event'] == kind]


def write(folder, name, **facts):
  """A start of a run, and an event of it."""
  with journal.kept(folder, 0):
    journal.start(make_config({}), _MESH, 0)
    journal.event(name, **facts)


def test_what_was_torn_off_is_dropped_and_the_rest_kept(tmp_path):
  write(tmp_path, 'one')
  path = tmp_path / 'journal.jsonl'
  before = path.read_bytes()
  path.write_bytes(before + b'{"time": 12, "eve')
  events = [row['event'] for row in journal.read(tmp_path)]
  assert events == ['start', 'one']
  assert path.read_bytes() == before + b'{"time": 12, "eve'
  write(tmp_path, 'two')
  assert path.read_bytes().startswith(before)
  events += ['start', 'two']
  assert [row['event'] for row in journal.read(tmp_path)] == events


def test_a_line_that_was_damaged_is_named(tmp_path):
  write(tmp_path, 'one')
  path = tmp_path / 'journal.jsonl'
  path.write_bytes(b'\0\n' + path.read_bytes())
  with pytest.raises(UserError, match=r'journal\.jsonl line 1 is not'):
    journal.read(tmp_path)


def test_any_fact_is_written_and_read(tmp_path):
  write(tmp_path, 'spike', loss=math.nan, rows=(1, np.int64(2)), which=None)
  spike = journal.read(tmp_path)[-1]
  assert (spike['loss'], spike['rows'], spike['which']) == ('NaN', [1, 2], None)
  assert spike['time'] == pytest.approx(time.time(), abs=60)


def test_process_0_alone_writes_and_nobody_without_a_run(tmp_path):
  with journal.kept(tmp_path, 1):
    journal.start(make_config({}), _MESH, 0)
    journal.event('one')
    journal.end('done', 0)
  with journal.kept(tmp_path, 0):
    pass  # there was nothing to do
  journal.event('two')
  journal.begin('step')
  assert not list(tmp_path.iterdir())


def fail(folder, error):
  with pytest.raises(type(error)), journal.kept(folder, 0):
    journal.event('set_aside', step=4, reason='cut short')
    raise error


def test_a_start_that_fails_is_told_of_a_run_and_a_mistake_is_not(tmp_path):
  with pytest.raises(HostsError), journal.kept(tmp_path, 0):
    raise HostsError('process 1 is missing')
  assert not list(tmp_path.iterdir())
  write(tmp_path, 'one')
  fail(tmp_path, UserError('another mesh'))
  fail(tmp_path, HostsError('process 1 is missing'))
  *before, failed, aside = journal.read(tmp_path)
  assert [row['event'] for row in before] == ['start', 'one', 'set_aside']
  assert failed['event'] == 'failed_start' and 0 <= failed['seconds'] < 60
  assert (failed['reason'], failed['status']) == ('process 1 is missing', 75)
  assert aside['event'] == 'set_aside'


def test_what_happens_before_the_start_comes_after_it(tmp_path):
  with journal.kept(tmp_path, 0):
    journal.event('set_aside', step=4, reason='cut short')
    journal.start(make_config({}), _MESH, 2)
    journal.event('lost', steps=2, seconds=1.0)
  events = [row['event'] for row in journal.read(tmp_path)]
  assert events == ['start', 'set_aside', 'lost']


def test_what_happens_is_kept_if_it_never_starts(tmp_path):
  with pytest.raises(UserError), journal.kept(tmp_path, 0):
    journal.event('set_aside', step=4, reason='cut short')
    raise UserError('every checkpoint was damaged')
  assert [row['event'] for row in journal.read(tmp_path)] == ['set_aside']


@pytest.mark.parametrize(
  ('error', 'reason', 'status'),
  [
    (UserError('no data; buy some'), 'no data; buy some', 2),
    (KeyboardInterrupt(), 'SIGINT', 130),
    (ZeroDivisionError('by <0>'), 'ZeroDivisionError: by <0>', 1),
  ],
)
def test_an_error_is_the_reason_of_the_end(tmp_path, error, reason, status):
  with pytest.raises(type(error)), journal.kept(tmp_path, 0):
    journal.start(make_config({}), _MESH, 0)
    raise error
  last = journal.read(tmp_path)[-1]
  assert (last['event'], last['reason'], last['status']) == (
    'end',
    reason,
    status,
  )


def test_the_first_word_about_the_end_is_the_last(tmp_path):
  with pytest.raises(RuntimeError), journal.kept(tmp_path, 0):
    journal.start(make_config({}), _MESH, 0)
    journal.end_at_once('hung in step 7', 75)
    journal.event('too late')
    raise RuntimeError
  told = journal.read(tmp_path)
  assert [row['event'] for row in told] == ['start', 'seconds', 'end']
  assert (told[-1]['reason'], told[-1]['status']) == ('hung in step 7', 75)


def test_a_signal_with_nothing_to_save_is_told(tmp_path, monkeypatch):
  left = []
  monkeypatch.setattr(stopping.os, '_exit', left.append)
  with journal.kept(tmp_path, 0):
    journal.start(make_config({}), _MESH, 0)
    stopping._leave()
  last = journal.read(tmp_path)[-1]
  assert (last['event'], last['reason']) == ('end', 'SIGTERM')
  assert left == [last['status']] == [75]


def test_a_file_system_that_hangs_holds_up_no_last_word(tmp_path, monkeypatch):
  over = threading.Event()
  monkeypatch.setattr(journal, '_LAST_SECONDS', 0.1)
  with journal.kept(tmp_path, 0):
    journal.start(make_config({}), _MESH, 0)
    with monkeypatch.context() as patch:
      patch.setattr(lines.Appender, 'write', lambda *args: over.wait(60))
      began = time.monotonic()
      journal.end_at_once('hung', 75)
      assert time.monotonic() - began < 10
    over.set()


def test_a_full_disk_does_not_hide_why_the_run_ends(tmp_path, monkeypatch):
  def fail(*args):
    raise OSError(28, 'No space left on device')

  with pytest.raises(UserError, match='the reason'):  # noqa: SIM117
    with journal.kept(tmp_path, 0):
      journal.start(make_config({}), _MESH, 0)
      monkeypatch.setattr(lines.Appender, 'write', fail)
      raise UserError('the reason')


def test_seconds_are_told_while_something_takes_long(tmp_path, monkeypatch):
  now = [1000.0]
  monkeypatch.setattr(journal.time, 'monotonic', lambda: now[0])
  monkeypatch.setattr(journal, '_EVERY_SECONDS', 0.01)

  def told():
    return of('seconds', journal.read(tmp_path))

  with journal.kept(tmp_path, 0):
    journal.start(make_config({}), _MESH, 0)
    for _ in range(100):
      journal.begin('step')
      now[0] += 1
    journal.spent('data', 0.25)
    assert journal.taken() == 0.75
    journal.begin('evaluation')
    now[0] += 600
    for _ in range(1000):
      if told() and told()[-1].get('evaluation') == 600:
        break
      time.sleep(0.01)
    before = told()[-1]
  assert before['step'] == 99.75
  assert before['data'] == 0.25
  assert before['evaluation'] == 600


def test_a_bucket_has_the_start_at_once_and_the_rest_with_the_metrics(
  tmp_path, monkeypatch
):
  """Nothing can be appended there."""
  monkeypatch.setattr(paths, 'is_bucket', lambda path: True)
  events = lambda: [row['event'] for row in journal.read(tmp_path)]
  with journal.kept(tmp_path, 0):
    journal.start(make_config({}), _MESH, 0)
    assert events() == ['start']
    journal.event('one')
    assert events() == ['start']
    journal.sync()
    assert events() == ['start', 'one']
    journal.end('done', 0)
    assert events() == ['start', 'one', 'seconds', 'end']
