"""The train step, kernels included, compiles for TPUs that are not here."""

import runpy

import pytest
from tiny import CONFIGS, make_config

from perceiver_ar import config as config_lib
from perceiver_ar import partitioning
from perceiver_ar.config import MeshConfig
from perceiver_ar.errors import UserError
from perceiver_ar.plan import advice, memory, page, plans, programs
from perceiver_ar.plan.machine import open_machine

pytest.importorskip('libtpu')

_CONFIG = make_config(
  {
    'model.vocab_size': 259,
    'model.context_length': 2048,
    'model.num_latents': 256,
    'model.num_layers': 3,
    'model.width': 256,
    'model.mlp_width': 1024,
    'model.cross_mlp_width': 1024,
    'model.dtype': 'bfloat16',
    'model.attention': 'flash',
    'model.remat': 'attention',
    'train.batch_size': 16,
    'mesh.model': 2,
    'evaluate.batch_size': 8,
    'sample.num_samples': 8,
  }
)
_GRIDS = {'v4': '2x2x1', 'v5e': '2x2', 'v5p': '2x2x1', 'v6e': '2x2'}


@pytest.fixture
def analysed(monkeypatch):
  """XLA's analyses of memory that plans are made from."""
  found, classify = [], memory.classify

  def see(module, analysis, *rest):
    found.append(analysis)
    return classify(module, analysis, *rest)

  monkeypatch.setattr(memory, 'classify', see)
  return found


def assert_adds_up(plan, analysis):
  """The classes of a plan of training are what XLA says, arguments apart."""
  sizes = plan.bytes_per_chip
  arguments = sizes['parameters'] + sizes['optimizer_state'] + sizes['batch']
  assert arguments == pytest.approx(analysis.argument_size_in_bytes, rel=0.02)
  assert sum(sizes.values()) == pytest.approx(plan.needed_bytes, rel=0.02)
  assert sizes['optimizer_state'] == pytest.approx(
    2 * sizes['parameters'], rel=0.05
  )
  assert sizes['gradients'] == pytest.approx(sizes['parameters'], rel=0.05)


@pytest.mark.slow
@pytest.mark.parametrize('num_slices', [1, 2])
@pytest.mark.parametrize('chip', _GRIDS)
def test_the_step_is_planned_for_chips_of_one_device(
  chip, num_slices, analysed
):
  machine = open_machine(f'{chip}:{_GRIDS[chip]}', num_slices)
  assert len(machine.devices) == 4 * num_slices
  plan = plans.make_plan(_CONFIG, machine, 'train', machine.chip.usable_bytes)
  assert plan.fits
  sizes = plan.bytes_per_chip
  assert_adds_up(plan, *analysed)
  # What a layer takes in, and what its attention gives.
  kept = 3 * 16 // (2 * num_slices) * 256 * 256 * 2
  assert kept <= sizes['activations'] <= 3 * kept
  assert plan.assumed_trips is None
  assert all(
    (seconds > 0) == (name != 'host_transfers')
    for name, seconds in plan.seconds.items()
  )
  networks = {row.axis for row in plan.collectives if row.network == 'dcn'}
  assert networks == ({'slice'} if num_slices > 1 else set())
  gathers = [
    row.count
    for row in plan.collectives
    if (row.kind, row.axis, row.phase) == ('all-gather', 'data', 'latent')
  ]
  assert sum(gathers) >= 2 * 3 * 6  # both ways, weights of every layer
  assert 'attention kernel' in page.render(plan)


@pytest.mark.slow
def test_the_step_is_planned_where_two_devices_share_a_chip(analysed):
  machine = open_machine('7x:2x2x1', 1)
  assert len(machine.devices) == 8
  plan = plans.make_plan(_CONFIG, machine, 'train', machine.chip.usable_bytes)
  assert plan.fits
  assert_adds_up(plan, *analysed)
  kept = 3 * 16 // 4 * 256 * 256 * 2
  assert kept <= plan.bytes_per_chip['activations'] <= 3 * kept
  # Collectives that a SparseCore makes are in computations of their own.
  sent = {(x['kind'], x['axis']) for x in plan.to_dict()['collectives']}
  assert {('all-gather', 'data'), ('all-reduce', 'model')} <= sent
  assert plan.seconds['total'] < 1


@pytest.mark.slow
@pytest.mark.parametrize(
  'changes',
  [
    {'mesh.context': 2, 'mesh.model': 1, 'train.num_microbatches': 2},
    {
      'model.position_encoding': 'learned',
      'model.position_sizes': (66, 66, 5),
      'model.logits_block': 64,
      'mesh.context': 2,
    },
    {'model.remat': 'offload', 'optimizer.offload': True},
    {
      'model.remat': 'offload',
      'optimizer.offload': True,
      'train.num_microbatches': 2,
    },
  ],
  ids=str,
)
def test_so_is_all_else_that_a_config_may_ask_for(changes):
  machine = open_machine('v5e:2x2', 1)
  config = advice.apply(_CONFIG, changes)
  plan = plans.make_plan(config, machine, 'train', machine.chip.usable_bytes)
  assert plan.fits
  assert sum(plan.bytes_per_chip.values()) == pytest.approx(
    plan.needed_bytes, rel=0.02
  )
  over_context = {r.phase for r in plan.collectives if 'context' in r.axis}
  assert ('input' in over_context) == (plan.mesh['context'] > 1)
  assert 'latent' not in over_context
  offloads = 'model.remat' in changes
  assert (
    (plan.seconds['host_transfers'] > 0) == offloads == bool(plan.host_bytes)
  )


@pytest.mark.parametrize(
  ('name', 'topology'),
  [
    ('books.py:pg19', 'v5p:4x4x4'),
    ('books.py:long', 'v5p:4x4x4'),
    ('books.py:long_1m', 'v5p:8x8x8'),
    ('images.py:imagenet64', 'v5e:16x16'),
    ('images.py:imagenet64', 'v4:4x4x4'),
    ('copy_task.py:copy_131072', 'v5p:4x4x8'),
  ],
)
def test_state_and_gradients_fit_the_meshes_that_the_documentation_names(
  name, topology
):
  """What is compiled there is for `perceiver-ar plan`, and takes minutes."""
  machine = open_machine(topology, 1)
  least = plans.least_bytes(_published(name), machine, 'train')
  assert 0 < least < machine.chip.usable_bytes


def _published(name):
  file, _, arg = name.partition(':')
  module = runpy.run_path(str(CONFIGS / file))
  return config_lib.resolve(module['get_config'](arg))


@pytest.mark.slow
def test_what_only_moves_data_takes_little_of_a_long_step():
  machine = open_machine('v5p:4x4x4', 1)
  plan = plans.make_plan(
    _published('books.py:long'), machine, 'train', machine.chip.usable_bytes
  )
  assert plan.fits
  assert plan.seconds['data_movement'] < 0.15 * plan.seconds['total']
  over_context = {r.phase for r in plan.collectives if 'context' in r.axis}
  assert over_context == {'input', 'gradient'}


@pytest.mark.parametrize('sizes', [(1, 2, 2), (2, 1, 2), (4, 1, 1)])
def test_only_the_slice_axis_goes_from_slice_to_slice(sizes):
  machine = open_machine('v5e:2x2', 2)
  devices = _mesh(2, sizes, machine).devices
  assert devices.shape == (2, *sizes)
  slices = [{d.slice_index for d in part.flat} for part in devices]
  assert sorted(slices) == [{0}, {1}]


@pytest.mark.parametrize(('asked', 'slices'), [(1, 2), (2, 1), (4, 2)])
def test_the_slice_axis_is_as_long_as_there_are_slices(asked, slices):
  machine = open_machine('v5e:2x2', slices)
  sizes = (len(machine.devices) // asked, 1, 1)
  with pytest.raises(UserError, match=f'set mesh.slice={slices}$'):
    _mesh(asked, sizes, machine)


def _mesh(num_slices, sizes, machine):
  keys = dict(zip(('data', 'context', 'model'), sizes, strict=True))
  config = MeshConfig(slice=num_slices, rules='fsdp', **keys)
  return partitioning.make_mesh(config, machine.devices)


@pytest.mark.slow
@pytest.mark.parametrize('command', ['evaluate', 'sample'])
def test_evaluation_and_sampling_are_planned_too(command):
  machine = open_machine('v5e:2x2', 1)
  plan = plans.make_plan(_CONFIG, machine, command, machine.chip.usable_bytes)
  assert plan.fits
  assert sum(plan.bytes_per_chip.values()) == pytest.approx(
    plan.needed_bytes, rel=0.02
  )


@pytest.mark.slow
def test_a_step_that_the_compiler_refuses_does_not_fit():
  machine = open_machine('v5e:2x2', 1)
  usable = machine.chip.usable_bytes
  config = make_config(
    {
      'model.context_length': 4096,
      'model.num_latents': 4096,
      'model.num_layers': 2,
      'model.attention': 'reference',
      'model.num_cross_heads': 16,
      'model.num_self_heads': 16,
      'train.batch_size': 16,
    }
  )
  plan = plans.make_plan(config, machine, 'train', usable)
  assert not plan.fits
  assert plan.needed_bytes > usable
  assert plan.bytes_per_chip['temporaries'] > plan.needed_bytes // 2
  assert 'DOES NOT FIT' in page.render(plan)
  mesh = partitioning.make_mesh(config.mesh, machine.devices)
  batch = programs.make_program('train', config, mesh).args[1]
  with pytest.raises(UserError, match=r'needs .* GiB of each device, and they'):
    plans.fitting_step(config, mesh, batch)
