"""One bit that one device has otherwise is found, and the device named."""

import dataclasses
import re

import jax
import numpy as np
import pytest
from hosts import ends, start_job
from runs import TINY, compiled_once, copy_config, rows
from states import make_mesh, make_state
from steps import config_on, num_devices

from perceiver_ar import (
  checkpoint,
  flops,
  main,
  parameters,
  partitioning,
  starting,
  train,
  train_step,
)
from perceiver_ar.checksums import flatten, nest
from perceiver_ar.errors import RESTART, CorruptionError
from perceiver_ar.replicas import Replicas, odd_ones, uncompared

__all__ = ['compiled_once']

_KERNEL = 'params/layers/mlp/up/kernel'
_SCALE = 'params/norm/scale'


def flip(x, at):
  """The same array, but for one bit that the device `at` of its mesh has."""
  device = x.sharding.mesh.devices.flat[at]
  shards = []
  for shard in x.addressable_shards:
    data = np.array(shard.data)
    if shard.device == device:
      data.reshape(-1).view(np.uint8)[-1] ^= 1
    shards.append(jax.device_put(data, shard.device))
  return jax.make_array_from_single_device_arrays(x.shape, x.sharding, shards)


def flip_leaf(state, name, at):
  flat = flatten(state)
  leaves = [flip(x, at) if key == name else x for key, x in flat.items()]
  return jax.tree.unflatten(jax.tree.structure(state), leaves)


def draw(abstract):
  """Without a compiler."""
  rng = np.random.default_rng(0)

  def one(x):
    value = rng.normal(size=x.shape) * 100 * (x.shape != ())  # counts are 0
    return jax.device_put(value.astype(x.dtype), x.sharding)

  return jax.tree.map(one, abstract)


# Arrays of every dtype, each spread as far as it goes.
@pytest.mark.parametrize('sizes', [(1, 1), (8, 1), (4, 2), (1, 8)])
def test_equal_replicas_pass_and_flipped_bits_do_not(sizes):
  mesh = make_mesh(*sizes)
  state = make_state(0, mesh)
  replicas = Replicas(state, mesh, every=100, step=0)
  replicas.check(1, state)
  for name, x in flatten(state).items():
    num_shards = len({str(s.index) for s in x.addressable_shards})
    if num_shards < mesh.size:
      with pytest.raises(CorruptionError, match=f'step 2: {name} is '):
        replicas.check(2, flip_leaf(state, name, mesh.size - 1))
    else:  # nothing to compare it with
      replicas.check(2, flip_leaf(state, name, mesh.size - 1))
      replicas.check(1, state)


def make_part(sizes, rules, **changes):
  """A mesh, and some arrays of a train state."""
  config = config_on(sizes, **{'mesh.rules': rules} | changes)
  devices = jax.devices()[: num_devices(config)]
  mesh = partitioning.make_mesh(config.mesh, devices)
  state = draw(train_step.abstract_state(config, mesh))
  names = [x for x in flatten(state) if '/up/' in x or x == _SCALE]
  return mesh, nest({name: flatten(state)[name] for name in names})


@pytest.mark.parametrize(
  ('sizes', 'rules', 'name', 'others'),
  [
    ({'data': 8}, 'replicated', _KERNEL, []),
    ({'data': 4, 'model': 2}, 'tensor', _KERNEL, []),
    ({'slice': 2, 'data': 2, 'context': 2}, 'fsdp', _KERNEL, []),
    ({'slice': 2, 'data': 2, 'model': 2}, 'fsdp_tensor', _SCALE, []),
    # Two copies: either may be the right one.
    ({'slice': 2, 'data': 2, 'model': 2}, 'fsdp_tensor', _KERNEL, [1]),
  ],
  ids=str,
)
def test_the_device_at_fault_is_named(sizes, rules, name, others):
  mesh, state = make_part(sizes, rules)
  replicas = Replicas(state, mesh, every=2, step=3)
  replicas.send(4, state)
  replicas.read()
  replicas.send(6, flip_leaf(state, name, 5))
  with pytest.raises(CorruptionError) as error:
    replicas.read()
  said = str(error.value)
  assert f'found at step 6: {name} is' in said
  assert 'agreed at step 4' in said
  named = [int(x) for x in re.findall(r'device (\d+) \(', said)]
  assert named == [mesh.device_ids.ravel()[at] for at in [*others, 5]]
  assert ('no telling which is right' in said) == bool(others)
  assert 'of process 0' in said


def test_all_that_is_wrong_is_counted():
  mesh, state = make_part({'data': 8}, 'replicated')
  replicas = Replicas(state, mesh, every=1, step=0)
  bad = flip_leaf(flip_leaf(state, _SCALE, 2), _KERNEL, 2)
  with pytest.raises(CorruptionError, match='and so are 1 more arrays'):
    replicas.check(1, bad)


def test_it_is_compared_when_it_is_time_and_never_twice():
  mesh, state = make_part({'data': 8}, 'replicated')
  bad = flip_leaf(state, _SCALE, 2)
  replicas = Replicas(state, mesh, every=5, step=10)
  replicas.send(14, bad)
  replicas.read()
  replicas.check(15, state)
  replicas.check(15, bad)  # of which all is known
  Replicas(state, mesh, every=0, step=10).check(11, bad)


def test_what_is_offloaded_is_left_out():
  mesh, state = make_part(
    {'data': 8},
    'replicated',
    **{'optimizer.offload': True},
  )
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(state['opt_state'])}
  assert kinds == {'pinned_host'}
  replicas = Replicas(state, mesh, every=1, step=0)
  replicas.check(1, state)
  with pytest.raises(CorruptionError, match=_SCALE):
    replicas.check(2, flip_leaf(state, _SCALE, 2))


@pytest.mark.parametrize(
  ('hashes', 'twins', 'found'),
  [
    ([7, 7, 7, 7], [0, 0, 0, 0], ([], True)),
    ([7, 7, 8, 7], [0, 0, 0, 0], ([2], True)),
    ([8, 7, 7, 7], [0, 0, 0, 0], ([0], True)),
    ([1, 2, 1, 2, 1, 3], [0, 1, 0, 1, 0, 1], ([5], True)),
    ([1, 2, 1, 3], [0, 1, 0, 1], ([1, 3], False)),
    ([1, 2, 3, 4], [0, 1, 2, 3], ([], True)),
  ],
)
def test_more_than_half_are_right(hashes, twins, found):
  assert odd_ones(np.array(hashes), np.array(twins)) == found


@pytest.mark.parametrize(
  ('sizes', 'rules', 'unseen'),
  [
    ({'data': 8}, 'replicated', 'none'),
    ({'data': 8}, 'fsdp', 'some'),
    ({'slice': 2, 'data': 4}, 'fsdp', 'none'),
    ({}, 'fsdp', 'none'),  # a device alone
  ],
)
def test_parameters_without_replicas_are_counted(sizes, rules, unseen):
  config = config_on(sizes, **{'mesh.rules': rules})
  devices = jax.devices()[: num_devices(config)]
  mesh = partitioning.make_mesh(config.mesh, devices)
  params = parameters.abstract(config, mesh)
  assert not uncompared(params, 0)
  said = uncompared(params, 1000)
  assert bool(said) == (unseen == 'some')
  if said:
    single, total = (int(x.replace(',', '')) for x in _COUNTS.findall(said))
    assert 0.9 * total < single < total


_COUNTS = re.compile(r'(\d[\d,]*\d)')


def corrupt(monkeypatch, after, compile_step):
  """Device 5 loses a bit in the step after state `after`."""
  monkeypatch.setattr(flops, 'matmul_rate', lambda dtype, size: 1e9)

  def compile_corrupted(config, mesh, state, batch):
    run = compile_step(config, mesh, state, batch)

    def corrupted(state, batch):
      step = int(state.step)
      state, sums = run(state, batch)
      if step == after:
        state = flip_leaf(state, _KERNEL, 5)
      return state, sums

    return corrupted

  monkeypatch.setattr(starting, 'compile_step', compile_corrupted)


def compile_nothing(config, mesh, state, batch):
  """A step that only counts, and needs no compiler."""
  sums = dict.fromkeys(
    ('loss', 'z_loss', 'correct', 'grad_norm', 'learning_rate'), 1.0
  )
  sums |= {'num_targets': 1, 'skipped': 0, 'num_skipped_in_a_row': 0}
  return lambda state, batch: (
    dataclasses.replace(state, step=state.step + 1),
    sums,
  )


@pytest.mark.parametrize(
  ('every', 'found'),
  [
    pytest.param(3, 6, marks=pytest.mark.slow),
    (1000, 8),  # before it is saved
  ],
)
def test_a_run_stops_before_it_saves_what_is_corrupt(
  tmp_path, monkeypatch, every, found
):
  corrupt(monkeypatch, 4, compile_nothing)
  monkeypatch.setattr(
    starting,
    'first_state',
    lambda config, mesh, _: draw(train_step.abstract_state(config, mesh)),
  )
  config = copy_config(
    train__num_steps=20,
    train__check_replicas_every=every,
    checkpoint__save_every=4,
    evaluate__every=0,
    mesh__rules='replicated',
  )
  with pytest.raises(CorruptionError) as error:
    train.train_and_evaluate(config, tmp_path)
  said = str(error.value)
  assert f'found at step {found}: {_KERNEL} is on device 5 (' in said
  assert 'agreed at step 4' in said
  assert checkpoint.saved_steps(tmp_path) == [4]
  # Found a step late at most.
  assert found <= rows(tmp_path)[-1]['step'] + 1 <= found + 1


@pytest.mark.slow
@pytest.mark.filterwarnings('ignore:the load_module')
def test_the_command_asks_to_be_started_again(tmp_path, monkeypatch, capsys):
  corrupt(monkeypatch, 4, starting.compile_step)
  words = ['train', TINY, f'--workdir={tmp_path}']
  words += ['--config.mesh.rules=replicated', '--config.evaluate.every=0']
  with pytest.raises(SystemExit) as stopped:
    main.main([*words, '--config.train.check_replicas_every=3'])
  assert stopped.value.code == RESTART
  err = capsys.readouterr().err
  (line,) = [x for x in err.splitlines() if x.startswith('perceiver-ar: ')]
  assert 'silent corruption' in line
  monkeypatch.undo()  # another host
  monkeypatch.setattr(flops, 'matmul_rate', lambda dtype, size: 1e9)
  with pytest.raises(SystemExit) as stopped:
    main.main(words)
  assert stopped.value.code == 0


@pytest.mark.slow
def test_the_host_that_lost_a_bit_is_named_by_all(tmp_path):
  words = [
    'train',
    TINY,
    f'--workdir={tmp_path}',
    '--config.train.batch_size=12',
    '--config.train.check_replicas_every=3',
    '--config.checkpoint.save_every=4',
    '--config.evaluate.every=0',
    '--config.mesh.rules=replicated',
  ]
  job = start_job(*words, processes=3, faults={1: {'flip_at': 4}})
  for status, said in ends(job):
    assert status == RESTART, said
    assert re.search(
      r'found at step 6: .* of process 1 \(.* than on most', said
    )
  assert checkpoint.saved_steps(tmp_path) == [4]
