"""Jobs of several real processes: as one, or ended with a name."""

import json
import re
import shutil
import signal

import bad_records
import jax
import numpy as np
import pytest
from hosts import ROOT, ends, free_port, start_job, start_process
from runs import TINY, damage, final_params, rows, wait_until, write_texts

from perceiver_ar import checkpoint, journal, workdir
from perceiver_ar import config as config_lib

_TRAIN = (
  'train',
  TINY,
  '--config.train.batch_size=12',  # 1, 2, 3 or 4 processes divide this
  '--config.model.width=48',  # and this
  '--config.train.num_steps=60',
  '--config.checkpoint.save_every=20',
  '--config.checkpoint.keep_latest=1',
  '--config.checkpoint.keep_best=1',
  '--config.evaluate.every=20',
  '--config.evaluate.batch_size=12',
)
_SECONDS = 10  # that a barrier waits, and more than compiling differs


def train(folder, *words, **job):
  return start_job(*_TRAIN, f'--workdir={folder}', *words, **job)


def assert_all_end(job, status):
  ended = ends(job)
  assert [code for code, _ in ended] == [status] * len(ended), ended
  return [said for _, said in ended]


def leave_one(folder, processes, *, after):
  """Trains until `after` steps are done, and asks one process to leave.

  Returns:
    The step that all have saved before they ended to be started again.
  """

  def num_rows():
    path = folder / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

  job = train(folder, processes=processes)
  wait_until(lambda: num_rows() >= after, job[0])
  job[0].send_signal(signal.SIGTERM)  # drills ask the last one
  said = assert_all_end(job, 75)
  step = checkpoint.saved_steps(folder)[-1]
  assert f'SIGTERM: step {step} is saved; run again to go on' in said[0]
  assert after <= step < 60
  assert_keeps_latest_and_best(folder)
  return step


def assert_keeps_latest_and_best(folder):
  """Whoever evaluated."""
  losses = {
    row['step']: row['nats_per_token']
    for row in rows(folder)
    if 'nats_per_token' in row
  }
  steps = checkpoint.saved_steps(folder)
  best = {min(losses, key=lambda step: losses[step])} if losses else set()
  assert steps == sorted({steps[-1]} | best)


@pytest.fixture(scope='module')
def alone(tmp_path_factory):
  """A process that was never disturbed."""
  folder = tmp_path_factory.mktemp('alone')
  (said,) = assert_all_end(train(folder, processes=1), 0)
  assert 'flags: 1 process' in said
  return folder


def assert_same_training(one, other):
  """Digests to the bit, sums to what their order allows."""
  a, b = rows(one), rows(other)
  assert [row['step'] for row in a] == [row['step'] for row in b]
  for x, y in zip(a, b, strict=True):
    assert x.get('data_digest') == y.get('data_digest')
    for name in {'loss', 'nats_per_token'} & set(x):
      assert x[name] == pytest.approx(y[name], rel=1e-3)
  # Of the run that a single device can hold.
  config = config_lib.resolve(workdir.read_config(other))
  (step, params), (last, others) = (
    final_params(folder, config) for folder in (one, other)
  )
  assert step == last
  for x, y in zip(
    jax.tree.leaves(params), jax.tree.leaves(others), strict=True
  ):
    np.testing.assert_allclose(x, y, atol=5e-3)


def test_a_run_goes_on_with_fewer_hosts_after_one_is_asked_to_leave(
  tmp_path, alone
):
  step = leave_one(tmp_path, 2, after=3)
  first = json.loads((tmp_path / 'metrics.jsonl').read_text().splitlines()[0])
  assert len(first['data_wait']) == 2
  (said,) = assert_all_end(train(tmp_path, processes=1), 0)
  assert f'goes on from step {step} of 60' in said
  assert_same_training(tmp_path, alone)
  told = [r for r in journal.read(tmp_path) if r['event'] in ('start', 'end')]
  assert [row['event'] for row in told] == ['start', 'end'] * 2
  assert 'processes: 2 -> 1' in told[2]['changes']
  assert [row['reason'] for row in told[1::2]] == ['SIGTERM', 'done']


@pytest.mark.slow
def test_any_number_of_hosts_goes_on_with_a_run(tmp_path, alone):
  steps = [leave_one(tmp_path, 4, after=21)]  # 20 is the best
  steps.append(leave_one(tmp_path, 2, after=steps[-1] + 2))
  steps.append(leave_one(tmp_path, 1, after=steps[-1] + 2))
  assert steps == sorted(steps)
  said = assert_all_end(train(tmp_path, processes=3), 0)
  assert f'goes on from step {steps[-1]} of 60' in said[0]
  assert_same_training(tmp_path, alone)
  assert checkpoint.saved_steps(tmp_path)[-1] == 60
  assert_keeps_latest_and_best(tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('processes', 'mesh'),
  [
    (2, {'data': 4}),
    (2, {'data': 1, 'context': 4}),  # all processes load the same rows
    (2, {'data': 2, 'model': 2, 'rules': 'fsdp_tensor'}),
    (4, {'data': 4}),
  ],
)
def test_four_devices_of_many_processes_are_one(
  tmp_path, alone, processes, mesh
):
  words = [f'--config.mesh.{axis}={size}' for axis, size in mesh.items()]
  job = train(tmp_path, *words, processes=processes, devices=4 // processes)
  assert_all_end(job, 0)
  assert_same_training(tmp_path, alone)


@pytest.mark.slow
def test_hosts_save_in_parts_what_exceeds_their_memory(tmp_path, alone):
  words = '--config.checkpoint.max_host_gb=1e-4'
  said = assert_all_end(train(tmp_path, words, processes=2), 0)
  assert 'it is done in parts' in said[0]
  assert 'it is done in parts' not in said[1]
  assert_same_training(tmp_path, alone)


def test_a_process_with_another_config_is_named_by_all(tmp_path):
  job = train(
    tmp_path,
    processes=2,
    extra=[[], ['--config.optimizer.learning_rate=0.5']],
  )
  for said in assert_all_end(job, 2):
    assert 'is not like the others' in said
    assert 'process 1 (' in said
    assert 'optimizer.learning_rate is 0.5 there and 0.01 elsewhere' in said
    assert 'Traceback' not in said
  assert not list(tmp_path.iterdir())


@pytest.mark.slow
@pytest.mark.parametrize('what', ['code', 'optax', 'data set'])
def test_a_process_with_other_software_or_data_is_named_by_all(tmp_path, what):
  other, words = tmp_path / 'other', []
  if what == 'data set':
    paths = [write_texts(tmp_path / x, x) for x in ('one', 'two')]
    words = [
      ['--config.data.kind=prepared', f'--config.data.path={path}']
      for path in paths
    ]
  shutil.copytree(ROOT / 'perceiver_ar', other / 'perceiver_ar')
  if what == 'code':
    (other / 'perceiver_ar/extra.py').write_text('')
  if what == 'optax':
    about = other / 'optax-9.8.7.dist-info/METADATA'
    about.parent.mkdir()
    about.write_text('Metadata-Version: 2.1\nName: optax\nVersion: 9.8.7\n')
  run = tmp_path / 'run'
  job = train(run, processes=2, extra=words, code=[ROOT, other])
  for said in assert_all_end(job, 2):
    assert 'process 1 (' in said
    assert re.search(f'not like the others: {what} is .* elsewhere;', said)
  assert not run.exists()


@pytest.mark.slow
def test_sigterm_before_the_first_step_restarts_all(tmp_path):
  job = train(tmp_path, processes=2, late=(1, 'agreement'))
  assert job[1].stdout is not None
  assert any('late' in line for line in job[1].stdout)  # until it says so
  job[1].send_signal(signal.SIGTERM)
  said = assert_all_end(job, 75)
  assert 'SIGTERM: ended with nothing to save' in said[1]
  assert 'agreement: process 1 (' in said[0]


@pytest.mark.slow
def test_sigterm_to_one_ends_an_evaluation_on_all(tmp_path):
  words = [
    '--config.train.num_steps=6',
    '--config.evaluate.every=3',
    '--config.evaluate.max_examples=0',
    '--config.data.num_eval_documents=20000',
  ]
  job = train(tmp_path, *words, processes=2)
  path = tmp_path / 'metrics.jsonl'
  wait_until(
    lambda: path.exists() and path.read_bytes().count(b'\n') >= 3, job[0]
  )
  job[1].send_signal(signal.SIGTERM)
  assert_all_end(job, 75)
  assert checkpoint.saved_steps(tmp_path) == [3]
  assert all('split' not in row for row in rows(tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'late'),
  [
    ('agreement', 1),
    ('restore', 0),
    ('files', 1),
    ('first batch', 1),
    ('compile', 1),
    ('evaluation', 1),
    ('save', 0),
    ('exit', 1),
  ],
)
def test_a_barrier_names_who_is_missing(tmp_path, name, late):
  words = ['--config.train.num_steps=6', '--config.evaluate.every=3']
  job = train(
    tmp_path,
    f'--barrier_seconds={_SECONDS}',
    *words,
    processes=2,
    late=(late, name),
  )
  assert_names_who_is_missing(job, name, late)


@pytest.mark.slow
def test_so_does_the_start(tmp_path):
  words = ['--num_processes=2', f'--coordinator=127.0.0.1:{free_port()}']
  words += ['--process_id=0', '--barrier_seconds=3', f'--workdir={tmp_path}']
  ((status, said),) = ends([start_process([*_TRAIN, *words])])
  assert status == 75, said
  assert 'start: process 1 did not come within 3 s' in said
  assert 'Traceback' not in said


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, 1])
def test_sigterm_to_one_ends_the_evaluation_of_all(alone, process):
  """In the same batch, with the status on which launchers start them again."""
  words = ['--config.evaluate.batch_size=2', f'--workdir={alone}']
  faults = {process: {'sigterm_in_evaluation': 2}}
  job = start_job('evaluate', *words, processes=2, faults=faults)
  for said in assert_all_end(job, 75):
    assert 'SIGTERM: ended with nothing to save; run again' in said
    assert 'Traceback' not in said


def assert_names_who_is_missing(job, name, late):
  waiting = job[1 - late]
  try:
    said, _ = waiting.communicate(timeout=200)
  finally:
    job[late].kill()
    job[late].communicate()
  assert waiting.returncode == 75, said
  assert f'{name}: process {late} (' in said
  assert f'did not come within {_SECONDS} s' in said
  assert 'Traceback' not in said


@pytest.mark.slow
@pytest.mark.parametrize(
  ('command', 'name', 'late'),
  [
    ('evaluate', 'evaluation', 0),
    ('sample', 'exit', 1),
  ],
)
def test_so_do_those_of_other_commands(alone, command, name, late):
  job = start_job(
    command,
    f'--workdir={alone}',
    f'--barrier_seconds={_SECONDS}',
    processes=2,
    late=(late, name),
  )
  assert_names_who_is_missing(job, name, late)


@pytest.mark.slow
def test_the_host_that_waits_for_its_data_is_named(tmp_path):
  words = ['--config.train.num_steps=10', '--config.train.log_every=10']
  job = train(tmp_path, *words, processes=3, faults={1: {'starve': 0.3}})
  said = assert_all_end(job, 0)
  assert re.search(r'process 1 \(.*\) is slow: .* of them for data', said[0])
  waits = [row['data_wait'] for row in rows_with_times(tmp_path)]
  first, starved, last = np.median(waits, axis=0)
  assert starved > 0.5 > 5 * max(first, last)


def rows_with_times(folder):
  lines = (folder / 'metrics.jsonl').read_text().splitlines()
  return [row for row in map(json.loads, lines) if 'data_wait' in row]


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, 1])
def test_a_save_that_fails_on_one_host_ends_all_before_the_next(
  tmp_path, process
):
  faults = {p: {'pace': 0.1} for p in range(2)}
  faults[process]['fail_in_save'] = 2
  job = train(tmp_path, processes=2, faults=faults)
  ended = ends(job)
  status, said = ended[process]
  assert status == 1, ended
  assert 'a checkpoint could not be written' in said
  assert 'Input/output error' in said
  assert 'Traceback' not in said
  # With process 0 goes the service of JAX, which ends whoever is in a step.
  allowed = {75} if process else {75, -signal.SIGABRT}
  assert ended[1 - process][0] in allowed, ended
  assert checkpoint.saved_steps(tmp_path) == [20]
  assert 40 <= len([r for r in rows(tmp_path) if 'loss' in r]) < 60


@pytest.mark.slow
def test_all_agree_on_what_is_damaged(tmp_path):
  words = ['--config.train.num_steps=4', '--config.checkpoint.save_every=2']
  words.append('--config.checkpoint.keep_latest=2')
  assert_all_end(train(tmp_path, *words, processes=2), 0)
  damage(tmp_path, 4, 'flipped')
  said = assert_all_end(train(tmp_path, *words, processes=2), 0)
  assert 'checkpoints/4 is damaged' in said[0] and 'step 2 is used' in said[0]
  assert checkpoint.saved_steps(tmp_path) == [2, 4]
  assert [x.name for x in (tmp_path / 'damaged').iterdir()] == ['4-1']


@pytest.mark.slow
def test_the_mistake_of_one_process_ends_all_as_a_mistake(tmp_path):
  """Its data set is not there; the others do not wait for it in vain."""
  gone = f'--config.data.path={tmp_path / "gone"}'
  job = train(
    tmp_path / 'run',
    processes=2,
    extra=[[], ['--config.data.kind=prepared', gone]],
  )
  first, second = assert_all_end(job, 2)
  assert 'there is no folder' in second
  assert 'process 1 (' in first and 'ended with status 2' in first


@pytest.mark.slow
@pytest.mark.parametrize('process', [0, 1])
def test_a_mistake_before_the_processes_have_met_ends_all(tmp_path, process):
  extra = [[], []]
  extra[process] = ['--config.model.widht=48']
  job = train(tmp_path / 'run', processes=2, extra=extra)
  said = assert_all_end(job, 2)
  assert 'widht' in said[process]
  assert f'process {process} (' in said[1 - process]
  assert 'ended with status 2' in said[1 - process]


def copies(tmp_path, split, index):
  """A data set with words for each of two processes; one has a bad copy."""
  bad_records.write_noise(tmp_path / '0', num_documents=40)
  bad_records.flip(
    shutil.copytree(tmp_path / '0', tmp_path / '1'), index, split
  )
  return [
    ['--config.data.kind=prepared', f'--config.data.path={tmp_path / name}']
    for name in '01'
  ]


@pytest.mark.slow
@pytest.mark.parametrize('split', ['train', 'validation'])
def test_a_damaged_record_of_one_host_ends_all(tmp_path, split):
  """In the middle of training, or of an evaluation."""
  extra = copies(tmp_path, split, 27)
  words = ['--config.evaluate.every=1', '--config.evaluate.max_examples=0']
  if split == 'train':
    words = ['--config.data.visits=once', '--config.evaluate.every=0']
  words.append('--config.train.batch_size=4')
  words.append('--config.evaluate.batch_size=4')
  job = train(tmp_path / 'run', *words, processes=2, extra=extra)
  first, second = assert_all_end(job, 2)
  assert f'{split}.array_record: record 27 (27.txt)' in second
  assert 'data: process 1 (' in first and 'ended with status 2' in first
  assert 'Traceback' not in first + second


@pytest.mark.slow
def test_what_all_hosts_skip_is_counted(tmp_path):
  extra = copies(tmp_path, 'train', 3)
  words = ['--config.data.damaged=skip', '--config.train.num_steps=20']
  job = train(tmp_path / 'run', *words, processes=2, extra=extra)
  _, second = assert_all_end(job, 0)
  assert second.count('record 3 (3.txt)') == 1
  found = [r['bad_records'] for r in rows(tmp_path / 'run') if 'loss' in r]
  assert 0 < sum(found) < 20


@pytest.mark.slow
@pytest.mark.parametrize('processes', [2, 4])
def test_evaluation_and_samples_are_the_same_on_many_hosts(
  tmp_path, alone, processes
):
  found = {}
  for num in (1, processes):
    for command, words in (
      ('evaluate', ['--config.evaluate.batch_size=4', '--max_examples=10']),
      ('sample', ['--num_samples=4', '--length=20', '--temperature=0.5']),
    ):
      output = tmp_path / f'{command}{num}.json'
      words = [*words, f'--output={output}']
      job = start_job(command, f'--workdir={alone}', *words, processes=num)
      said = assert_all_end(job, 0)
      for other in said[1:]:
        lines = [x for x in other.splitlines() if '[Gloo]' not in x]
        assert len(lines) == 1 and lines[0].startswith('flags: process ')
      found[command, num] = json.loads(output.read_text())
    found['texts', num] = [
      path.read_bytes() for path in sorted((alone / 'samples').glob('sample-*'))
    ]
  one, many = found['evaluate', 1], found['evaluate', processes]
  assert one['num_tokens'] == many['num_tokens'] == 310
  assert many['nats_per_token'] == pytest.approx(one['nats_per_token'], 1e-6)
  assert many['accuracy'] == one['accuracy']
  assert found['texts', 1] == found['texts', processes]
  assert len(found['texts', 1]) == 4
