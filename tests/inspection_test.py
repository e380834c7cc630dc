import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import states
from safetensors.numpy import load_file

from perceiver_ar import inspection
from perceiver_ar.checkpoint import Checkpoints
from perceiver_ar.errors import UserError


@pytest.fixture(scope='module')
def run(tmp_path_factory):
  """Two steps that differ in one number of one array."""
  folder = tmp_path_factory.mktemp('run')
  config = states.CONFIG
  first = {
    'step': jnp.int32(1),
    'params': {'a': jnp.arange(6.0).reshape(2, 3), 'b': jnp.ones(3)},
  }
  second = jax.tree.map(lambda x: x, first)
  second['params']['a'] = second['params']['a'].at[1, 2].add(0.5)
  keep = dataclasses.replace(config.checkpoint, save_every=1)
  with Checkpoints(folder, keep) as checkpoints:
    checkpoints.save(1, first, config=config, loss=None)
    checkpoints.save(2, second, config=config, loss=None)
  return folder


def test_diff_names_just_the_array_that_changed(run):
  report = inspection.diff(run, 1, run, None)
  assert report['steps'] == (1, 2)
  assert report['config'] == []
  assert report['arrays'] == [{'name': 'params/a', 'largest_difference': 0.5}]


def test_diff_names_what_one_alone_has_and_the_keys_of_another_config(
  run, tmp_path
):
  train = dataclasses.replace(states.CONFIG.train, batch_size=64)
  config = dataclasses.replace(states.CONFIG, train=train)
  state = {
    'step': jnp.int32(1),
    'params': {'a': jnp.zeros((3, 2)), 'c': jnp.ones(3)},
  }
  with Checkpoints(tmp_path, config.checkpoint) as checkpoints:
    checkpoints.save(1, state, config=config, loss=None)
  report = inspection.diff(run, 1, tmp_path, None)
  (line,) = report['config']
  assert 'train.batch_size' in line and '64' in line
  shapes = {row['name']: row['shapes'] for row in report['arrays']}
  assert [*shapes] == ['params/a', 'params/b', 'params/c']
  assert 'absent' in shapes['params/b'] and 'absent' in shapes['params/c']
  assert shapes['params/a'][0] != shapes['params/a'][1]


def test_a_step_does_not_differ_from_itself(run):
  assert inspection.diff(run, 2, run, 2)['arrays'] == []


def test_export_holds_the_parameters_bit_for_bit(run, tmp_path):
  path = tmp_path / 'out' / 'model.safetensors'
  done = inspection.export(run, 1, path)
  assert done == {'step': 1, 'arrays': 2, 'parameters': 9}
  arrays = load_file(path)
  assert sorted(arrays) == ['a', 'b']
  np.testing.assert_array_equal(arrays['a'], np.arange(6.0).reshape(2, 3))


def test_a_folder_without_checkpoints_is_refused(tmp_path):
  with pytest.raises(UserError, match='holds no checkpoint'):
    inspection.export(tmp_path, None, tmp_path / 'x')


def test_diff_of_numbers_that_are_not_finite_is_json(run, tmp_path):
  arrays = np.array([np.nan, np.inf, 1.0]), np.array([np.nan, np.inf, 1.5])
  assert inspection._largest_difference(*arrays) == 0.5
  ends = []
  for name, value in (('a', jnp.nan), ('b', 1.0)):
    state = {'step': jnp.int32(1), 'params': {'a': jnp.array([value, 2.0])}}
    with Checkpoints(tmp_path / name, states.CONFIG.checkpoint) as checkpoints:
      checkpoints.save(1, state, config=states.CONFIG, loss=None)
    ends.append(tmp_path / name)
  (row,) = inspection.diff(ends[0], None, ends[1], None)['arrays']
  assert row == {'name': 'params/a', 'largest_difference': 'NaN'}
