"""A step comes out again as it was recorded, or what differs is named."""

import json
import math
import re
import shutil

import jax
import pytest
from hosts import ends, start_job, start_process
from runs import (
  TINY,
  compiled_once,
  contents,
  copy_config,
  damage,
  one_device,
)

from perceiver_ar import (
  checkpoint,
  main,
  partitioning,
  replay,
  starting,
  train,
)
from perceiver_ar.config import MeshConfig
from perceiver_ar.errors import UserError

__all__ = ['compiled_once', 'one_device']

_make_mesh = partitioning.make_mesh


@pytest.fixture(scope='module', autouse=True)
def _quick():
  """One step, compiled once."""
  compile_step, compiled = starting.compile_step, {}

  def compile_once(config, *args):
    key = config.train.num_microbatches
    if key not in compiled:
      compiled[key] = compile_step(config, *args)
    return compiled[key]

  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(starting, 'compile_step', compile_once)
    yield


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('trained') / 'run'
  train.train_and_evaluate(copy_config(evaluate__every=0), folder)
  assert checkpoint.saved_steps(folder) == [4, 6]
  return folder


@pytest.fixture
def copied(trained, tmp_path):
  return shutil.copytree(trained, tmp_path / 'run')


def run(folder, step, *words):
  with pytest.raises(SystemExit) as stopped:
    main.main(['replay', f'--workdir={folder}', f'--step={step}', *words])
  return stopped.value.code


def change_row(folder, step, change):
  """Rewrites the row of a step; None drops it."""
  path = folder / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  rows = [row | change if row['step'] == step else row for row in rows]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))


def drop_row(folder, step):
  path = folder / 'metrics.jsonl'
  lines = path.read_text().splitlines(keepends=True)
  path.write_text(''.join(x for x in lines if f'"step": {step},' not in x))


def test_every_step_comes_out_bit_for_bit_and_nothing_is_written(trained):
  """Dropout is on."""
  before = contents(trained)
  for step in range(6):
    report = replay.replay(copy_config(), trained, step)
    assert report.agrees and report.step == step
    assert report.first == (4 if step >= 4 else 0)
    assert set((report.differences(step) or {}).values()) == {0.0}
    assert replay.conclude(report) == (
      f'step {step} is bit for bit what was recorded'
    )
    assert replay.count(report) == {
      'identical': step - report.first,
      'close': 0,
      'other': 0,
      'not_recorded': 0,
    }
  assert contents(trained) == before


def test_the_command_prints_a_table_and_writes_json(trained, tmp_path, capsys):
  before, output = contents(trained), tmp_path / 'replay.json'
  assert run(trained, 5, f'--output={output}') == 0
  out, err = capsys.readouterr()
  assert not err
  for word in ('from checkpoint 4', 'replayed', 'recorded', 'data_digest'):
    assert word in out
  assert re.search('on the way from step 4: 1 identical, 0 within', out)
  assert out.endswith('step 5 is bit for bit what was recorded\n')
  report = json.loads(output.read_text())
  assert report['agrees'] and report['replayed'] == report['recorded']
  assert report['first_step'] == 4
  assert contents(trained) == before


@pytest.mark.parametrize(
  ('change', 'said'),
  [
    ({'loss': 5.0}, 'loss is another from step 5 on, with the same data'),
    ({'grad_norm': 'NaN'}, 'grad_norm is another from step 5 on'),
    ({'skipped': 1}, 'skipped is another from step 5 on'),
    ({'data_digest': '0' * 16}, 'from step 5 on the data are others'),
  ],
)
def test_an_altered_record_is_reported(copied, capsys, change, said):
  change_row(copied, 5, change)
  output = copied.parent / 'replay.json'
  assert run(copied, 5, f'--output={output}') == 1
  assert said in capsys.readouterr().out
  report = json.loads(output.read_text())
  assert not report['agrees'] and said in report['conclusion']
  change_row(copied, 5, {'step': 5})
  assert run(copied, 4) == 0  # which is before


def test_a_step_on_the_way_counts(copied, capsys):
  change_row(copied, 4, {'loss': 5.0})
  assert run(copied, 5) == 1
  out = capsys.readouterr().out
  assert 'loss is another from step 4 on' in out
  assert '0 identical, 0 within 0.001, 1 other' in out


def test_a_little_off_is_as_with_other_devices(copied, capsys):
  path = copied / 'metrics.jsonl'
  loss = json.loads(path.read_text().splitlines()[5])['loss']
  change_row(copied, 5, {'loss': loss * (1 + 1e-5)})
  assert run(copied, 5) == 0
  assert 'within 0.001, but not bit for bit' in capsys.readouterr().out


def test_a_row_that_is_missing_is_said(copied, capsys):
  drop_row(copied, 4)
  assert run(copied, 4) == 1
  assert 'no row of step 4, dropped or never' in capsys.readouterr().out
  assert run(copied, 5) == 0
  assert '1 not recorded' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('step', 'words', 'named'),
  [
    (6, [], ['--step=6', '0 to 5']),
    (-1, [], ['--step=-1', '0 to 5']),
    (5, ['--config.train.seed=2'], ['train.seed: 1 -> 2']),
    (5, ['--config.model.num_layers=2'], ['model.num_layers: 1 -> 2']),
    (5, ['--config.train.batch_size=16'], ['train.batch_size: 8 -> 16']),
  ],
)
def test_what_is_no_step_of_the_run_is_refused(
  trained, capsys, step, words, named
):
  before = contents(trained)
  assert run(trained, step, *words) == 2
  out, err = capsys.readouterr()
  assert err.count('\n') == 1 and not out
  assert all(word in err for word in named), err
  assert contents(trained) == before


def test_a_run_without_a_step_is_refused(copied):
  config = copy_config()
  (copied / 'metrics.jsonl').write_text('')
  with pytest.raises(UserError, match='no training step yet'):
    replay.replay(config, copied, 0)
  (copied / 'metrics.jsonl').unlink()
  with pytest.raises(UserError, match='does not exist; train first'):
    replay.replay(config, copied, 0)


def test_a_damaged_checkpoint_is_passed_over_and_left_alone(copied, caplog):
  damage(copied, 4, 'flipped')
  before = contents(copied)
  report = replay.replay(copy_config(), copied, 5)
  assert report.agrees and report.first == 0
  assert 'as there is no sound checkpoint before' in report.origin
  assert 'checkpoints/4 is damaged' in caplog.text
  assert 'no step before it is sound' in caplog.text
  assert contents(copied) == before


@pytest.mark.slow
def test_the_parameters_of_another_run_are_a_beginning(trained, tmp_path):
  config = copy_config(
    checkpoint__init_from=str(trained),
    checkpoint__save_every=100,
    evaluate__every=0,
    train__num_steps=2,
  )
  train.train_and_evaluate(config, tmp_path)
  report = replay.replay(config, tmp_path, 1)
  assert report.agrees and report.first == 0
  assert report.origin.startswith(str(trained))


@pytest.mark.slow
def test_parts_of_the_batch_give_the_same(trained):
  config = copy_config(train__num_microbatches=4)
  report = replay.replay(config, trained, 5)
  assert report.agrees
  assert 'bit' in replay.conclude(report)


def test_differences_are_relative_and_know_what_is_not_finite():
  assert replay.relative(2.0, 2.0) == replay.relative('ab', 'ab') == 0
  assert replay.relative(math.nan, math.nan) == 0
  assert replay.relative(1.0, 1.1) == pytest.approx(0.1 / 1.1)
  for new, old in ((1.0, math.nan), (math.inf, 1.0), ('ab', 'cd')):
    assert replay.relative(new, old) == math.inf
  assert replay.relative(0, 1) == 1


def mesh_of(**sizes):
  base = {'slice': 1, 'data': -1, 'context': 1, 'model': 1}
  return MeshConfig(rules='tensor', **(base | sizes))


@pytest.mark.parametrize(
  ('own', 'asked', 'shape'),
  [
    ({}, {}, (1, 8, 1, 1)),
    ({'context': 4}, {'context': 4}, (1, 2, 4, 1)),
    ({'data': 2}, {'data': 2}, (1, 2, 1, 1)),  # of the eight
    ({'slice': 16}, {'slice': 16}, (1, 8, 1, 1)),  # does not fit
    ({'data': 64, 'model': 4}, {'data': 64, 'model': 4}, (1, 8, 1, 1)),
    ({'data': 64}, {'data': 2, 'model': 2}, (1, 2, 1, 2)),
    ({}, {'data': 64}, None),
  ],
)
def test_one_process_takes_the_mesh_that_it_can_make(
  monkeypatch, own, asked, shape
):
  monkeypatch.setattr(partitioning, 'make_mesh', _make_mesh)
  if shape is None:
    with pytest.raises(UserError, match='data 64'):
      replay.make_mesh(mesh_of(**asked), mesh_of(**own), jax.devices())
    return
  mesh, rules = replay.make_mesh(
    mesh_of(**asked), mesh_of(**own), jax.devices()
  )
  assert mesh.devices.shape == shape
  is_asked = math.prod(asked.values()) <= 8
  assert rules == ('tensor' if is_asked else 'fsdp')


@pytest.mark.slow
def test_one_process_replays_what_two_have_trained(tmp_path):
  words = [TINY, '--config.train.num_steps=8', '--config.evaluate.every=0']
  words.append('--config.checkpoint.save_every=5')
  folder = f'--workdir={tmp_path / "run"}'
  job = start_job('train', *words, folder, processes=2)
  ended = ends(job)
  assert [status for status, _ in ended] == [0, 0], ended
  before = contents(tmp_path / 'run')
  for devices in (1, 4):
    for step, start in ((3, 'from seed'), (7, 'from checkpoint 5')):
      process = start_process(
        ['replay', folder, f'--step={step}'], devices=devices
      )
      ((status, said),) = ends([process])
      assert status == 0, said
      assert start in said
      assert f'step {step} is ' in said
  assert contents(tmp_path / 'run') == before
