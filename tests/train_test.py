"""A run that is interrupted anywhere ends as if nothing had happened."""

import collections
import dataclasses
import itertools
import os
import random
import re
import shutil
import signal
import time

import bad_records
import jax
import numpy as np
import orbax.checkpoint as ocp
import pytest
from runs import (
  TINY,
  assert_same_run,
  compiled_once,
  contents,
  copy_config,
  damage,
  final_params,
  one_device,
  rows,
  start,
  wait_until,
)

from perceiver_ar import (
  checkpoint,
  evaluate,
  host_reports,
  journal,
  metrics,
  partitioning,
  saving,
  skipping,
  starting,
  train,
  watchdog,
  workdir,
)
from perceiver_ar import config as config_lib
from perceiver_ar.data import pipeline, records
from perceiver_ar.errors import RESTART, SaveError, UserError
from perceiver_ar.report import document

__all__ = ['compiled_once', 'one_device']


@pytest.fixture(scope='module')
def undisturbed(tmp_path_factory):
  folder = tmp_path_factory.mktemp('undisturbed')
  assert train.train_and_evaluate(copy_config(), folder) == 0
  return folder


@pytest.mark.slow
def test_a_killed_run_goes_on_as_if_nothing_had_happened(tmp_path):
  """Dropout is on; killed at a random step, and then asked."""
  words = [TINY, '--config.train.num_steps=80', '--config.evaluate.every=10']

  def begin(name):
    return start('train', f'--workdir={tmp_path / name}', *words)

  def num_rows():
    path = tmp_path / 'killed' / 'metrics.jsonl'
    return path.read_bytes().count(b'\n') if path.exists() else 0

  def num_steps():
    return sum('split' not in row for row in rows(tmp_path / 'killed'))

  whole = begin('whole')  # on the other core
  process, at = begin('killed'), random.randrange(3, 20)
  wait_until(lambda: num_rows() >= at, process)
  process.kill()
  process.communicate()

  done = [num_steps()]
  process, at = begin('killed'), num_rows() + 3
  wait_until(lambda: num_rows() >= at, process)
  process.send_signal(signal.SIGTERM)
  out, _ = process.communicate(timeout=60)
  assert process.returncode == 75
  told = re.search(r'SIGTERM: step (\d+) is saved; run again to go on', out)
  assert told, out
  assert 'chunked attention, float32' in out
  assert checkpoint.saved_steps(tmp_path / 'killed')[-1] == int(told[1]) < 80

  process, before = begin('killed'), num_steps()
  out, _ = process.communicate(timeout=120)
  assert process.returncode == 0
  assert before == int(told[1])  # nothing is lost that was asked to end
  assert f'goes on from step {told[1]} of 80' in out
  assert 'trained to step 80' in whole.communicate(timeout=240)[0]
  assert whole.returncode == 0
  config = config_lib.resolve(workdir.read_config(tmp_path / 'whole'))
  assert_same_run(tmp_path / 'killed', tmp_path / 'whole', config)
  assert_told(journal.read(tmp_path / 'killed'), done)


def assert_told(told, done):
  """The journal has three starts, the first killed after so many steps."""
  firsts = [i for i, row in enumerate(told) if row['event'] == 'start']
  spans = [told[i:j] for i, j in itertools.pairwise([*firsts, len(told)])]
  ends = [[r['reason'] for r in x if r['event'] == 'end'] for x in spans]
  assert ends == [[], ['SIGTERM'], ['done']]
  for number, span in zip(done, spans[1:], strict=False):
    lost = [row['steps'] for row in span if row['event'] == 'lost']
    more = number - span[0]['first_step']
    assert lost == ([more] if more else [])


def test_every_step_and_every_evaluation_has_a_row(undisturbed):
  config = copy_config()
  parsed = rows(undisturbed)
  steps = [row for row in parsed if 'split' not in row]
  assert [row['step'] for row in steps] == list(range(6))
  assert set(steps[0]) >= {'loss', 'num_targets', 'grad_norm', 'learning_rate'}
  assert [row['num_targets'] for row in steps] == [64] * 6
  assert steps[0]['loss'] == pytest.approx(np.log(259), rel=1e-5)
  assert [r['step'] for r in parsed if r.get('split') == 'validation'] == [3, 6]
  documents = pipeline.open_documents(config.data, 'train', seed=1)
  batches = pipeline.train_batches(
    config, documents, first_step=0, rows_b=range(8)
  )
  assert [row['data_digest'] for row in steps] == [
    pipeline.format_digest(pipeline.digest(batch, range(8)))
    for batch in batches
  ]
  assert all(re.fullmatch('[0-9a-f]{16}', r['data_digest']) for r in steps)
  told = events(undisturbed, 'memory')
  assert [(x['doing'], x['step']) for x in told] == [
    ('save', step) for step in (2, 4, 6)
  ]


def test_the_watchdog_learns_of_saves_what_they_take(tmp_path, monkeypatch):
  learnt, restores, watchdogs = [], [], []
  learn, restore = (
    watchdog.Watchdog.learn,
    checkpoint.Checkpoints.restore_newest,
  )
  save, enter = checkpoint.Checkpoints.save, watchdog.Watchdog.__enter__

  def entered(self):
    watchdogs.append(self)
    return enter(self)

  def remember(self, kind, seconds):
    learnt.append((kind, seconds))
    learn(self, kind, seconds)

  def restored(*args):
    restores.append(watchdogs[0]._now[0])
    return restore(*args)

  def saved(*args, **kwargs):
    assert watchdogs[0]._now[0] == 'save'
    time.sleep(0.2)
    save(*args, **kwargs)

  monkeypatch.setattr(watchdog.Watchdog, '__enter__', entered)
  monkeypatch.setattr(watchdog.Watchdog, 'learn', remember)
  monkeypatch.setattr(checkpoint.Checkpoints, 'restore_newest', restored)
  monkeypatch.setattr(checkpoint.Checkpoints, 'save', saved)
  train.train_and_evaluate(copy_config(), tmp_path / 'run')
  assert restores == ['restore']
  kinds = collections.Counter(kind for kind, _ in learnt)
  assert kinds['save'] == 3
  assert all(seconds > 0.2 for kind, seconds in learnt if kind == 'save')
  assert kinds['write'] >= 3


@pytest.mark.parametrize('step', [3, 6])
def test_a_signal_ends_an_evaluation_which_is_made_when_the_run_goes_on(
  tmp_path, monkeypatch, step, capsys
):
  config = copy_config(evaluate__batch_size=2)
  train.train_and_evaluate(config, tmp_path / 'whole')
  make, run = evaluate.Evaluator._batch, evaluate.Evaluator.run
  evaluations, batches = [], []

  def counted(self, *args, **kwargs):
    evaluations.append(3 * len(evaluations) + 3)
    return run(self, *args, **kwargs)

  def batch(self, blocks):
    if evaluations[-1] == step:
      batches.append(len(blocks))
      os.kill(os.getpid(), signal.SIGTERM)
    return make(self, blocks)

  # The second time nothing but that evaluation has begun.
  for _ in range(2):
    with monkeypatch.context() as patch:
      patch.setattr(evaluate.Evaluator, 'run', counted)
      patch.setattr(evaluate.Evaluator, '_batch', batch)
      assert train.train_and_evaluate(config, tmp_path / 'run') == RESTART
    assert 1 <= len(batches) <= 2
    # At step 3 nothing is saved otherwise.
    assert checkpoint.saved_steps(tmp_path / 'run')[-1] == step
    assert f'SIGTERM: step {step} is saved' in capsys.readouterr().out
    evaluations[:], batches[:] = range(3, step, 3), []
  evaluated = [row['step'] for row in rows(tmp_path / 'run') if 'split' in row]
  assert evaluated == [x for x in (3, 6) if x < step]
  learn, known = checkpoint.Checkpoints.learn, {}
  monkeypatch.setattr(
    checkpoint.Checkpoints,
    'learn',
    lambda self, losses: (known.update(losses), learn(self, losses)),
  )
  assert train.train_and_evaluate(config, tmp_path / 'run') == 0
  assert_same_run(tmp_path / 'run', tmp_path / 'whole', config)
  losses = {
    row['step']: row['nats_per_token']
    for row in rows(tmp_path / 'whole')
    if 'split' in row
  }
  assert known == {at: x for at, x in losses.items() if at <= step}
  assert train.train_and_evaluate(config, tmp_path / 'run') == 0
  assert 'nothing to do: step 6 of 6' in capsys.readouterr().out


def test_a_run_whose_checkpoints_are_gone_does_not_begin_again(
  undisturbed, tmp_path
):
  """A disk that is not mounted, say."""
  folder = shutil.copytree(undisturbed, tmp_path / 'run')
  shutil.rmtree(folder / 'checkpoints')
  before = contents(folder)
  with pytest.raises(UserError, match='tells of a checkpoint of step 6, and'):
    train.train_and_evaluate(copy_config(), folder)
  assert contents(folder) == before


def test_a_run_that_is_over_says_so_and_changes_nothing(undisturbed, capsys):
  before = contents(undisturbed)
  assert train.train_and_evaluate(copy_config(), undisturbed) == 0
  assert 'nothing to do: step 6 of 6 is reached' in capsys.readouterr().out
  assert contents(undisturbed) == before


@pytest.mark.parametrize(
  'how', ['flipped', pytest.param('truncated', marks=pytest.mark.slow)]
)
def test_a_damaged_checkpoint_is_set_aside_and_costs_only_time(
  tmp_path, undisturbed, how, caplog
):
  train.train_and_evaluate(copy_config(train__num_steps=4), tmp_path)
  damage(tmp_path, 4, how)
  began = time.monotonic()
  assert train.train_and_evaluate(copy_config(), tmp_path) == 0
  assert_accounted(tmp_path, time.monotonic() - began)
  told = [r.getMessage() for r in caplog.records if 'damaged' in r.getMessage()]
  assert len(told) == 1
  assert 'step 2 is used instead' in told[0]
  assert (tmp_path / 'damaged' / '4-1').is_dir()
  (aside,) = events(tmp_path, 'set_aside')
  assert aside['step'] == 4 and aside['reason'] in told[0]
  assert_training_is_the_same(tmp_path, undisturbed)


def assert_accounted(folder, took):
  """The journal of a run that went on from step 2 after it had done 4."""
  told = journal.read(folder)
  first, second = events(folder, 'start')
  assert (first['first_step'], second['first_step']) == (0, 2)
  assert first['config']['train']['num_steps'] == 4
  assert second['changes'] == ['train.num_steps: 4 -> 6']
  assert set(first['software']) >= {'python', 'jax', 'code'}
  assert first['place']['devices'] == '1 x cpu'
  assert [row['reason'] for row in events(folder, 'end')] == ['done'] * 2
  assert [row['step'] for row in events(folder, 'save')] == [2, 4, 4, 6]
  assert [row['step'] for row in events(folder, 'evaluation')] == [3, 4, 3, 6]
  (lost,) = events(folder, 'lost')
  assert lost['steps'] == 2 and told.index(lost) > told.index(second)
  seconds = {
    k: v
    for k, v in events(folder, 'seconds')[-1].items()
    if k not in ('time', 'at', 'event')
  }
  assert min(seconds.values()) >= 0
  # Data and config are opened before; arrays are let go after.
  assert 0.7 * took < sum(seconds.values()) <= took + 0.1
  whole = second['began'] + sum(seconds.values())
  assert whole == pytest.approx(told[-1]['time'], abs=0.1)
  steps = metrics.read(folder)[0][2:]
  assert steps[0]['seconds'] < seconds['compile']  # which is no part of it
  known = seconds['step'] + seconds['data']
  assert sum(row['seconds'] for row in steps) == pytest.approx(known, 0.3, 0.2)
  account = document.read(folder).ledger
  assert account and 0 < account.goodput < 1 and account.seconds['lost'] > 0
  assert sum(account.seconds.values()) == pytest.approx(account.wall, rel=0.01)


def events(folder, name):
  return [row for row in journal.read(folder) if row['event'] == name]


def assert_training_is_the_same(one, other):
  """All but the evaluation at what was once the last step."""
  a, b = ([r for r in rows(x) if 'split' not in r] for x in (one, other))
  assert a == b
  config = copy_config()
  (step, params), (last, others) = (
    final_params(x, config) for x in (one, other)
  )
  assert step == last
  jax.tree.map(np.testing.assert_array_equal, params, others)


@pytest.mark.slow
def test_a_constant_schedule_may_go_on_for_longer(tmp_path, undisturbed):
  train.train_and_evaluate(copy_config(train__num_steps=3), tmp_path)
  assert rows(tmp_path)[-1]['step'] == 3
  train.train_and_evaluate(copy_config(), tmp_path)
  assert_training_is_the_same(tmp_path, undisturbed)


def test_a_run_with_moments_on_its_host_goes_on_as_any_other(
  tmp_path, undisturbed
):
  offload = {'optimizer__offload': True}
  train.train_and_evaluate(copy_config(train__num_steps=4, **offload), tmp_path)
  assert train.train_and_evaluate(copy_config(**offload), tmp_path) == 0
  assert_training_is_the_same(tmp_path, undisturbed)


@pytest.mark.slow  # the step's own test has the sums
def test_parts_of_a_batch_add_up_to_the_batch(tmp_path):
  for num in (1, 2):
    config = copy_config(
      train__batch_size=16,
      train__num_microbatches=num,
      train__num_steps=3,
      model__dropout_rate=0.0,
      evaluate__every=0,
    )
    train.train_and_evaluate(config, tmp_path / str(num))
  for a, b in zip(rows(tmp_path / '1'), rows(tmp_path / '2'), strict=True):
    assert a['data_digest'] == b['data_digest']
    for name in ('loss', 'grad_norm', 'num_targets', 'z_loss'):
      assert a[name] == pytest.approx(b[name], rel=1e-4)


def test_steps_that_are_not_finite_are_skipped_and_then_end_the_run(tmp_path):
  config = copy_config(
    train__num_steps=30,
    train__max_skipped_steps=4,
    optimizer__learning_rate=9e18,
    evaluate__every=0,
  )
  with pytest.raises(UserError) as error:
    train.train_and_evaluate(config, tmp_path)
  found = rows(tmp_path)
  skipped = [row['skipped'] for row in found]
  assert skipped == [0] * (len(skipped) - 4) + [1] * 4
  assert len(skipped) > 4
  assert [r.get('skipped_for') for r in found[-5:]] == [None] + [
    'nonfinite'
  ] * 4
  good = checkpoint.saved_steps(tmp_path)[-1]
  assert (
    '4 steps in a row were skipped, 4 whose loss or gradient was not finite; '
    f'the last of them is step {len(found) - 1}, the last good checkpoint is '
    f'step {good}; train with a lower optimizer.learning_rate'
  ) in str(error.value)
  assert events(tmp_path, 'end')[-1]['reason'] == str(error.value)
  assert [
    (x['step'], x['data_digest']) for x in events(tmp_path, 'skipped')
  ] == [(row['step'], row['data_digest']) for row in found[-4:]]
  _, params = final_params(tmp_path, config)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.slow
def test_a_run_with_spikes_goes_on_as_if_nothing_had_happened(
  tmp_path, monkeypatch
):
  monkeypatch.setattr(skipping, 'USUAL_STEPS', 2)

  def train_to(name, num_steps):
    config = copy_config(
      train__num_steps=num_steps,
      train__spike_deviations=0.5,
      train__max_skipped_steps=7,
      optimizer__learning_rate=0.1,
      evaluate__every=0,
    )
    assert train.train_and_evaluate(config, tmp_path / name) == 0
    return config

  for num_steps in (3, 8, 12):
    config = train_to('in parts', num_steps)
  train_to('whole', 12)
  assert_same_run(tmp_path / 'in parts', tmp_path / 'whole', config)
  found = rows(tmp_path / 'whole')
  assert {r.get('skipped_for') for r in found} == {None, 'spike'}, found


@pytest.mark.slow
def test_a_loss_that_moves_for_good_ends_the_run(tmp_path, monkeypatch):
  monkeypatch.setattr(skipping, 'USUAL_STEPS', 2)
  # Every loss is above the mean of the last ones.
  config = copy_config(
    train__num_steps=30,
    train__spike_deviations=1e-6,
    train__max_skipped_steps=3,
    optimizer__learning_rate=1.0,
    optimizer__name='sgd',
    optimizer__clip_norm=0.0,
    evaluate__every=0,
  )
  with pytest.raises(UserError) as error:
    train.train_and_evaluate(config, tmp_path)
  assert '3 steps in a row were skipped, 3 whose loss was a spike' in str(
    error.value
  )
  assert 'raise train.spike_deviations' in str(error.value)
  _, params = final_params(tmp_path, config)
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(params))


@pytest.mark.parametrize(
  ('changes', 'named'),
  [
    ({'model__dropout_rate': 0.2}, 'model.dropout_rate: 0.1 -> 0.2'),
    ({'train__seed': 2}, 'train.seed: 1 -> 2'),
    ({'optimizer__b2': 0.99}, 'optimizer.b2: 0.999 -> 0.99'),
  ],
)
def test_another_config_is_refused_with_the_difference(
  undisturbed, changes, named
):
  before = contents(undisturbed)
  with pytest.raises(UserError, match=re.escape(named)):
    train.train_and_evaluate(copy_config(**changes), undisturbed)
  assert contents(undisturbed) == before


def noise_config(path, **changes):
  """A run on a data set of `bad_records.write_noise`."""
  changes = {'train__num_steps': 1, 'evaluate__every': 0} | changes
  return copy_config(data__kind='prepared', data__path=str(path), **changes)


@pytest.fixture(scope='module')
def on_noise(tmp_path_factory):
  """A data set, another one, and a run that was begun on the first."""
  folder = tmp_path_factory.mktemp('noise')
  for seed, name in enumerate(['one', 'two']):
    bad_records.write_noise(folder / name, seed=seed)
  assert (
    train.train_and_evaluate(noise_config(folder / 'one'), folder / 'run') == 0
  )
  return folder


def test_another_data_set_is_refused(tmp_path, on_noise):
  folder = shutil.copytree(on_noise / 'run', tmp_path / 'run')
  before = contents(folder)
  with pytest.raises(UserError, match=r'run was begun on data set .* holds'):
    train.train_and_evaluate(noise_config(on_noise / 'two'), folder)
  assert contents(folder) == before
  moved = shutil.copytree(on_noise / 'one', tmp_path / 'moved')
  assert train.train_and_evaluate(noise_config(moved), folder) == 0


def test_a_checkpoint_alone_knows_its_data_set(tmp_path, on_noise):
  """In another workdir, or where dataset.json is lost."""
  shutil.copytree(on_noise / 'run/checkpoints', tmp_path / 'checkpoints')
  before = contents(tmp_path)
  with pytest.raises(UserError, match=r'checkpoints/1 was begun on data set'):
    train.train_and_evaluate(
      noise_config(on_noise / 'two', train__num_steps=2), tmp_path
    )
  assert contents(tmp_path) == before
  config = noise_config(on_noise / 'one', train__num_steps=2)
  assert train.train_and_evaluate(config, tmp_path) == 0


def test_a_data_set_with_an_edited_manifest_is_refused(tmp_path, on_noise):
  folder = shutil.copytree(on_noise / 'run', tmp_path / 'run')
  edited = shutil.copytree(on_noise / 'one', tmp_path / 'one')
  manifest = edited / 'manifest.json'
  content = manifest.read_text().replace('"variant": ""', '"variant": "x"')
  manifest.write_text(content)
  with pytest.raises(UserError, match=r'run was begun on data set .* holds'):
    train.train_and_evaluate(noise_config(edited), folder)


def test_a_damaged_record_ends_the_run_with_nothing_of_its_step(
  tmp_path, on_noise
):
  path = shutil.copytree(on_noise / 'one', tmp_path / 'data')
  bad_records.flip(path, 3)
  documents = records.Documents(str(path), 'train')
  config = noise_config(
    path,
    train__num_steps=12,
    train__batch_size=1,
    checkpoint__save_every=1,
    data__visits='once',
    data__device_prefetch=0,
    mesh__data=1,
  )
  good = 0
  with pytest.raises(UserError, match='record 3'):
    for _ in pipeline.train_batches(
      config, documents, first_step=0, rows_b=[0]
    ):
      good += 1
  with pytest.raises(UserError, match=r'record 3 \(3\.txt\).*damaged=skip'):
    train.train_and_evaluate(config, tmp_path / 'run')
  assert [row['step'] for row in rows(tmp_path / 'run')] == list(range(good))
  assert checkpoint.saved_steps(tmp_path / 'run')[-1] == good


@pytest.mark.slow
def test_a_run_that_skips_counts_what_it_skipped(tmp_path, on_noise, caplog):
  path = shutil.copytree(on_noise / 'one', tmp_path / 'data')
  bad_records.flip(path, 3)
  config = noise_config(path, data__damaged='skip', train__num_steps=6)
  train.train_and_evaluate(
    dataclasses.replace(
      config, train=dataclasses.replace(config.train, num_steps=3)
    ),
    tmp_path / 'run',
  )
  train.train_and_evaluate(config, tmp_path / 'run')
  train.train_and_evaluate(config, tmp_path / 'whole')
  assert_training_is_the_same(tmp_path / 'run', tmp_path / 'whole')
  found = [row['bad_records'] for row in rows(tmp_path / 'whole')]
  assert sum(found) >= 3  # 48 visits, of 12 documents
  said = [
    r.getMessage() for r in caplog.records if 'record 3' in r.getMessage()
  ]
  assert len(said) == 3  # once in each run
  with pytest.raises(UserError, match=r'record 3 .*damaged=skip'):
    train.train_and_evaluate(noise_config(path, train__num_steps=6), tmp_path)


def test_a_save_that_failed_ends_the_run_before_the_next(tmp_path, monkeypatch):
  class InTheBackground:
    def result(self, timeout=None):
      raise OSError(28, 'No space left on device')

  async def fail(*args, **kwargs):
    return [InTheBackground()]

  monkeypatch.setattr(ocp.JsonCheckpointHandler, 'async_save', fail)
  known, wait = [], saving.Manager._wait_for_checkpointers

  def spy(self):
    try:
      wait(self)
    except BaseException:
      known.append((tmp_path / 'metrics.jsonl').read_bytes().count(b'\n'))
      raise

  monkeypatch.setattr(saving.Manager, '_wait_for_checkpointers', spy)
  config = copy_config(
    train__num_steps=400, checkpoint__save_every=100, evaluate__every=0
  )
  with pytest.raises(SaveError, match='No space left on device'):
    train.train_and_evaluate(config, tmp_path)
  # The step at hand and the next, whose metrics may be on their way.
  assert 100 <= known[0] <= len(rows(tmp_path)) <= known[0] + 2
  assert not checkpoint.saved_steps(tmp_path)


@pytest.mark.slow
def test_time_saves_besides_steps(tmp_path, monkeypatch):
  steps, save = [], checkpoint.Checkpoints.save

  def spy(self, step, *args, **kwargs):
    steps.append(step)
    save(self, step, *args, **kwargs)

  monkeypatch.setattr(checkpoint.Checkpoints, 'save', spy)
  config = copy_config(
    train__num_steps=30,
    checkpoint__save_every=20,
    checkpoint__save_minutes=1e-6,
    checkpoint__keep_best=0,
    evaluate__every=0,
  )
  train.train_and_evaluate(config, tmp_path)
  # What is wanted in a step is known in the next, and done after it.
  assert all(1 <= b - a <= 3 for a, b in itertools.pairwise(steps))
  assert len(steps) > 8
  assert checkpoint.saved_steps(tmp_path) == [20, 30]


def test_what_a_host_waits_for_devices_is_none_of_its_work(
  tmp_path, monkeypatch
):
  """Nor of the work of the step after an evaluation or a save."""
  send, read = host_reports.Exchange.send, host_reports.Exchange.read
  sent = []

  def seen(self, report, of):
    if report.digest:  # of a step, not of an evaluation
      sent.append(report)
    return send(self, report, of)

  def late(self, reports):
    time.sleep(0.2)
    return read(self, reports)

  monkeypatch.setattr(host_reports.Exchange, 'send', seen)
  monkeypatch.setattr(host_reports.Exchange, 'read', late)
  train.train_and_evaluate(copy_config(), tmp_path)
  assert len(sent) == 6
  assert all(x.data_seconds <= x.own_seconds < 0.2 for x in sent[1:]), sent


def test_the_last_steps_alone_are_kept_for_the_screen(tmp_path, monkeypatch):
  kept = []
  record = train._Loop._record

  def spy(self):
    record(self)
    kept.append(len(self._rows))

  monkeypatch.setattr(train._Loop, '_record', spy)
  config = copy_config(train__log_every=1, evaluate__every=0)
  train.train_and_evaluate(config, tmp_path)
  assert max(kept) == 1


def begin_with(source, **changes):
  """The state that a new run would begin with."""
  config = copy_config(checkpoint__init_from=str(source), **changes)
  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  documents = pipeline.open_documents(config.data, 'train', seed=1)
  return starting.first_state(config, mesh, documents)


def test_a_run_begins_with_the_parameters_of_another(undisturbed, capsys):
  state = begin_with(undisturbed, train__seed=7, data__copy_offset=5)
  assert f'{undisturbed} at step 6' in capsys.readouterr().out
  for found, expected in zip(
    jax.tree.leaves(state.params),
    jax.tree.leaves(final_params(undisturbed, copy_config())[1]),
    strict=True,
  ):
    np.testing.assert_array_equal(found, expected)
  assert int(state.step) == 0
  assert not any(np.asarray(x).any() for x in jax.tree.leaves(state.opt_state))


def test_another_model_is_no_beginning(undisturbed, tmp_path):
  with pytest.raises(UserError, match=r'width|shape|another model'):
    begin_with(undisturbed, model__mlp_width=8)
  with pytest.raises(UserError, match='folder of a run'):
    begin_with(tmp_path)
