"""What is on disk after a crash is what an undisturbed run would have left."""

import json
import math
import pathlib
import re
import subprocess
import sys
import threading
import time
from typing import Any

import jax.numpy as jnp
import numpy as np
import pytest
import tensorboardX
from etils import epath
from tensorboardX.proto import event_pb2 as untyped

from perceiver_ar import lines as lines_lib
from perceiver_ar import metrics, paths
from perceiver_ar.errors import SaveError, UserError

event_pb2: Any = untyped


def writer(workdir, first_step=0, process_index=0):
  return metrics.Writer(
    workdir, first_step=first_step, process_index=process_index
  )


def train(workdir, first_step, end, evaluate_every=4):
  with writer(workdir, first_step) as out:
    for step in range(first_step, end):
      digest = f'{step * 7919:016x}'
      out.write(step, {'loss': 1 / (step + 1), 'data_digest': digest})
      if (step + 1) % evaluate_every == 0:
        out.write(step + 1, {'split': 'validation', 'loss': 2 / (step + 1)})


def lines(workdir):
  return (workdir / 'metrics.jsonl').read_text().splitlines()


def events(workdir):
  """(step, tag, value) of every scalar, after TensorBoard's purging."""
  shown = []
  for path in sorted(pathlib.Path(workdir, 'tensorboard').iterdir()):
    content = path.read_bytes()
    while content:
      size = int.from_bytes(content[:8], 'little')
      event = event_pb2.Event.FromString(content[12 : 12 + size])
      content = content[12 + size + 4 :]
      if event.session_log.status == event_pb2.SessionLog.START:
        shown = [e for e in shown if e[0] < event.step]
      for value in event.summary.value:
        shown.append((event.step, value.tag, value.simple_value))
  return shown


def test_every_write_is_one_line_at_once(tmp_path):
  out = writer(tmp_path)
  out.write(3, {'loss': 1.5, 'num_targets': 12, 'data_digest': '00ff'})
  assert lines(tmp_path) == [
    '{"step": 3, "loss": 1.5, "num_targets": 12, "data_digest": "00ff"}'
  ]
  out.write(4, {'split': 'test', 'loss': 0.5})
  assert json.loads(lines(tmp_path)[1]) == {
    'step': 4,
    'split': 'test',
    'loss': 0.5,
  }
  out.close()
  assert events(tmp_path) == [
    (3, 'train/loss', 1.5),
    (3, 'train/num_targets', 12.0),
    (4, 'test/loss', 0.5),
  ]


def test_arrays_of_numpy_and_jax_become_numbers(tmp_path):
  with writer(tmp_path) as out:
    out.write(
      0,
      {
        'a': np.float32(0.5),
        'b': jnp.int32(7),
        'c': jnp.bfloat16(2),
        'd': np.array(3),
      },
    )
  assert lines(tmp_path) == ['{"step": 0, "a": 0.5, "b": 7, "c": 2.0, "d": 3}']


def test_numbers_that_json_does_not_know_come_back(tmp_path):
  with writer(tmp_path) as out:
    values = {'a': math.nan, 'b': math.inf, 'c': -math.inf, 'd': 'nan'}
    out.write(0, values)
  line = lines(tmp_path)[0]
  json.loads(line, parse_constant=lambda name: pytest.fail(name))
  ((row,), _) = metrics.read(tmp_path)
  assert math.isnan(row['a'])
  assert (row['b'], row['c'], row['d']) == (math.inf, -math.inf, 'nan')
  shown = {tag: value for _, tag, value in events(tmp_path)}
  assert math.isnan(shown['train/a'])
  assert shown['train/b'] == math.inf


def test_other_processes_write_nothing(tmp_path):
  with writer(tmp_path / 'run', process_index=1) as out:
    out.write(0, {'loss': 1.0})
  assert not (tmp_path / 'run').exists()


@pytest.mark.parametrize('torn', [b'', b'{"step": 9, "lo', b'\0' * 9, b'\n'])
@pytest.mark.parametrize(
  ('saved', 'reached'), [(4, 7), (8, 8), (5, 11), (0, 6)]
)
def test_a_resumed_run_leaves_the_file_of_an_undisturbed_one(
  tmp_path, saved, reached, torn
):
  train(tmp_path / 'whole', 0, 16)
  train(tmp_path / 'resumed', 0, reached)
  with (tmp_path / 'resumed' / 'metrics.jsonl').open('ab') as file:
    file.write(torn)
  train(tmp_path / 'resumed', saved, 16)
  assert lines(tmp_path / 'resumed') == lines(tmp_path / 'whole')
  assert set(events(tmp_path / 'resumed')) == set(events(tmp_path / 'whole'))


def test_a_last_line_without_its_end_of_line_is_kept(tmp_path):
  (tmp_path / 'metrics.jsonl').write_text('{"step": 0, "loss": 1.0}')
  with writer(tmp_path, first_step=1) as out:
    out.write(1, {'loss': 2.0})
  assert len(metrics.read(tmp_path)[0]) == 2


def test_resuming_where_the_run_ended_does_not_touch_the_file(tmp_path):
  train(tmp_path, 0, 4)
  before = (tmp_path / 'metrics.jsonl').stat()
  writer(tmp_path, first_step=4).close()
  after = (tmp_path / 'metrics.jsonl').stat()
  assert (before.st_ino, before.st_size) == (after.st_ino, after.st_size)


def test_training_and_evaluation_rows_are_read_apart(tmp_path):
  train(tmp_path, 0, 8)
  with (tmp_path / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 8, "loss"')
  training, evaluations = metrics.read(tmp_path)
  assert [row['step'] for row in training] == list(range(8))
  assert [row['step'] for row in evaluations] == [4, 8]
  assert evaluations[0]['split'] == 'validation'


def test_a_broken_line_in_the_middle_is_named(tmp_path):
  path = tmp_path / 'metrics.jsonl'
  path.write_text('{"step": 0}\nhello\n{"step": 1}\n')
  for call in (lambda: metrics.read(tmp_path), lambda: writer(tmp_path, 1)):
    with pytest.raises(UserError, match=r'metrics.jsonl line 2 is not'):
      call()
  with pytest.raises(UserError, match='does not exist'):
    metrics.read(tmp_path / 'nowhere')


def test_the_summary_weighs_losses_by_their_targets():
  rows = [
    {
      'loss': loss,
      'num_targets': n,
      'grad_norm': 1.0,
      'learning_rate': rate,
      'seconds': 2.0,
    }
    for loss, n, rate in [(1.0, 30, 0.1), (4.0, 10, 0.2)]
  ]
  summary = metrics.summarise(rows)
  assert summary['loss'] == pytest.approx(1.75)
  assert summary['learning_rate'] == 0.2
  assert summary['seconds_per_step'] == 2.0
  assert summary['targets_per_second'] == 10.0
  empty = [row | {'num_targets': 0} for row in rows]
  assert math.isnan(metrics.summarise(empty)['loss'])


def within(seconds, act):
  thread = threading.Thread(target=act, daemon=True)
  thread.start()
  thread.join(seconds)
  assert not thread.is_alive(), 'it blocks'


def full(*_):
  raise OSError(28, 'No space left on device')


@pytest.mark.parametrize('in_bucket', [False, True])
@pytest.mark.parametrize('failing', ['write', 'flush', 'close', 'folder'])
def test_charts_that_cannot_be_written_are_given_up_with_a_warning(
  tmp_path, monkeypatch, caplog, failing, in_bucket
):
  monkeypatch.setattr(paths, 'is_bucket', lambda path: in_bucket)
  if failing == 'folder':
    (tmp_path / 'tensorboard').write_text('')
  act = getattr(tensorboardX.RecordWriter, failing, full)

  def act_and_fail(*args):
    act(*args)
    full()

  def go_on():
    out = writer(tmp_path)
    out.write(0, {'loss': 1.0})
    if failing != 'folder':
      monkeypatch.setattr(tensorboardX.RecordWriter, failing, act_and_fail)
    for step in range(1, 51):
      out.write(step, {'loss': 1.0})
    out.sync()
    out.close()

  within(20, go_on)
  (said,) = [record.getMessage() for record in caplog.records]
  assert f'{tmp_path}/tensorboard cannot be written (' in said
  assert re.search(r'charts end about step \d+; metrics.jsonl goes on', said)
  assert failing == 'folder' or 'No space left on device' in said
  assert len(lines(tmp_path)) == 51


def test_people_see_a_step_before_the_run_ends(tmp_path, monkeypatch):
  monkeypatch.setattr(metrics, '_FLUSH_SECONDS', 0.0)
  with writer(tmp_path) as out:
    out.write(0, {'loss': 1.5})
    end = time.monotonic() + 20
    while not events(tmp_path) and time.monotonic() < end:
      time.sleep(0.01)
    assert events(tmp_path) == [(0, 'train/loss', 1.5)]


def test_a_full_disk_does_not_hide_what_ended_the_run(tmp_path, monkeypatch):
  with pytest.raises(UserError, match='the reason'), writer(tmp_path) as out:
    out.write(0, {'loss': 1.0})
    monkeypatch.setattr(lines_lib.os, 'fsync', full)  # of all files
    raise UserError('the reason')
  with pytest.raises(SaveError, match=r'metrics\.jsonl'), writer(tmp_path):
    pass


def test_neither_reading_nor_writing_needs_tensorflow(tmp_path):
  code = f"""
import sys
sys.modules['tensorflow'] = None
from perceiver_ar import metrics
assert 'jax' not in sys.modules and 'tensorboardX' not in sys.modules
with metrics.Writer({str(tmp_path)!r}, first_step=0, process_index=0) as out:
  out.write(0, {{'loss': 1.0}})
assert 'clu.metric_writers' in sys.modules
"""
  done = subprocess.run(
    [sys.executable, '-W', 'error', '-c', code], capture_output=True, text=True
  )
  assert (done.returncode, done.stderr) == (0, '')


def test_a_bucket_gets_whole_files_before_every_save(tmp_path, monkeypatch):
  """Nothing can be appended there."""
  monkeypatch.setattr(paths, 'is_bucket', lambda path: True)
  path = tmp_path / 'metrics.jsonl'
  with metrics.Writer(tmp_path, first_step=0, process_index=0) as writer:
    writer.write(0, {'loss': 1.0})
    assert not path.exists()
    writer.sync()
    assert [row['step'] for row in metrics.read(tmp_path)[0]] == [0]
    writer.write(1, {'loss': 2.0})
  with metrics.Writer(tmp_path, first_step=1, process_index=0) as writer:
    writer.write(1, {'loss': 3.0})
  assert [row['loss'] for row in metrics.read(tmp_path)[0]] == [1.0, 3.0]
  assert len(list((tmp_path / 'tensorboard').iterdir())) == 2


def test_a_full_disk_is_said_with_the_file():
  file = lines_lib.Appender(epath.Path('/dev/full'), [])
  with pytest.raises(SaveError, match='full cannot be written'):
    file.write({'step': 1})
  file.close()


def test_what_is_synced_outlives_the_machine(tmp_path, monkeypatch):
  synced = []
  monkeypatch.setattr(lines_lib.os, 'fsync', synced.append)
  file = lines_lib.Appender(epath.Path(tmp_path / 'x.jsonl'), [])
  file.write({'step': 1})
  assert not synced
  file.sync()
  assert len(synced) == 1

  monkeypatch.setattr(lines_lib.os, 'fsync', full)
  with pytest.raises(SaveError, match=r'x\.jsonl cannot be written'):
    file.sync()
  file.close()
