"""The classes of a device's memory are of the sizes that a step gives them."""

import jax
import pytest
from tiny import make_config

from perceiver_ar import partitioning
from perceiver_ar.plan import advice, memory, plans, programs
from perceiver_ar.plan.machine import open_machine

# No size divides or equals another by accident.
_CONFIG = make_config(
  {
    'model.num_layers': 4,
    'model.num_latents': 12,
    'model.attention': 'reference',
  }
)


@pytest.fixture(scope='module')
def machine():
  return open_machine('cpu:8', 1)


def _program(config, machine):
  mesh = partitioning.make_mesh(config.mesh, machine.devices)
  return programs.make_program('train', config, mesh)


def test_gradients_are_float32_whatever_the_parameters_are(machine):
  half = advice.apply(_CONFIG, {'model.param_dtype': 'bfloat16'})
  halves, plain = (_program(c, machine) for c in (half, _CONFIG))
  size = memory.tree_bytes(plain.gradients)
  assert memory.tree_bytes(halves.gradients) == size
  assert memory.tree_bytes(plain.params) == size
  # Two bytes of a parameter are gone, and four of its gradient are there.
  saved = plans.least_bytes(_CONFIG, machine, 'train') - plans.least_bytes(
    half, machine, 'train'
  )
  assert saved == size // 2


def test_gradients_that_wait_for_all_microbatches_are_whole(machine):
  parts = {'train.batch_size': 32, 'train.num_microbatches': 2}
  once, every = (
    _program(advice.apply(_CONFIG, parts | changes), machine)
    for changes in ({}, {'train.reduce_gradients_once': False})
  )
  whole = sum(x.size for x in jax.tree.leaves(once.params)) * 4
  assert memory.tree_bytes(once.gradients) == whole
  size = memory.tree_bytes(every.params)
  assert memory.tree_bytes(every.gradients) == size < whole


@pytest.mark.slow
def test_whole_parameters_and_gradients_are_no_activations():
  machine = open_machine('cpu:4', 1)
  keys = {'mesh.data': 2, 'mesh.model': 2, 'mesh.rules': 'fsdp_tensor'}
  keys |= {'train.num_microbatches': 2, 'model.remat': 'full'}
  once, every = (
    plans.make_plan(
      advice.apply(_CONFIG, {**keys, 'train.reduce_gradients_once': once}),
      *(machine, 'train', 2**30),
    ).bytes_per_chip['activations']
    for once in (True, False)
  )
  assert once == every > 0


@pytest.mark.parametrize('remat', ['full', 'dots'])
def test_layers_that_are_unrolled_keep_as_much(remat):
  keys = {'model.remat': remat}
  one = open_machine('cpu:1', 1)
  kept = []
  for unroll in (1, 2):
    config = advice.apply(_CONFIG, keys | {'model.scan_unroll': unroll})
    plan = plans.make_plan(config, one, 'train', 2**30)
    kept.append(plan.bytes_per_chip['activations'])
  assert kept[0] == kept[1] > 0
