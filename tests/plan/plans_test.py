"""A plan on eight simulated devices says what the compiler does."""

import dataclasses
import json
import types

import jax
import numpy as np
import pytest
from runs import TINY, compiled_once
from tiny import make_batch, make_config

from perceiver_ar import flops, main, partitioning, starting, train_step
from perceiver_ar.errors import UserError
from perceiver_ar.ops import attention, flash_delta
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns
from perceiver_ar.plan import advice, counting, memory, page, plans, programs
from perceiver_ar.plan.machine import open_machine

__all__ = ['compiled_once']

# No size divides or equals another by accident.
_CONFIG = make_config(
  {
    'model.num_layers': 3,
    'model.num_latents': 12,
    'model.attention': 'reference',
    'model.remat': 'full',
    'mesh.model': 2,
    'evaluate.batch_size': 8,
    'sample.num_samples': 8,
  }
)
_KEYS = {
  'fits',
  'hbm_bytes',
  'bytes_per_chip',
  'model_flops',
  'collectives',
  'seconds',
  'predicted_mfu',
  'num_parameters',
  'compile_seconds',
}


@pytest.fixture(scope='module')
def machine():
  return open_machine('cpu:8', 1)


@pytest.fixture(scope='module')
def kept_more(machine):
  config = advice.apply(_CONFIG, {'model.remat': 'dots'})
  return plans.make_plan(config, machine, 'train', 2**30)


@pytest.fixture(scope='module')
def trained(machine):
  return plans.make_plan(_CONFIG, machine, 'train', 2**30)


def test_the_classes_of_memory_are_all_that_xla_needs(trained):
  sizes = trained.bytes_per_chip
  assert sum(sizes.values()) == pytest.approx(trained.needed_bytes, rel=0.02)
  # Adam has two moments for each parameter.
  assert sizes['optimizer_state'] == pytest.approx(
    2 * sizes['parameters'], rel=0.05
  )
  assert sizes['gradients'] == sizes['parameters']
  assert sizes['batch'] >= 4 * 2 * (25 + 24)  # 2 rows of tokens and positions


@pytest.mark.slow
def test_what_the_layers_keep_is_known(trained, kept_more):
  model = _CONFIG.model
  rows = _CONFIG.train.batch_size // 4
  kept = model.num_layers * rows * model.num_latents * model.width * 4
  assert trained.bytes_per_chip['activations'] == kept
  # Queries, keys, values and the MLP's hidden layer, among others.
  assert kept_more.bytes_per_chip['activations'] > 3 * kept


def test_a_plan_as_json_has_the_keys_that_scripts_rely_on(trained):
  report = json.loads(json.dumps(trained.to_dict(), allow_nan=False))
  assert report.keys() >= _KEYS
  row = report['collectives'][0]
  assert row.keys() >= {'kind', 'axis', 'bytes', 'count', 'phase'}
  seconds = report['seconds']
  assert seconds['total'] == pytest.approx(
    sum(v for k, v in seconds.items() if k != 'total')
  )
  whole = 8 * flops.train_flops(_CONFIG.model)
  assert report['model_flops'] == whole - report['saved_flops'] < whole
  assert 0 < report['predicted_mfu'] < 1


def test_recomputation_shows_as_work_that_the_model_does_not_need(trained):
  model = _CONFIG.model
  layer = dataclasses.replace(model, num_layers=1), model
  one, three = (
    flops.forward_flops(m, context_length=24, num_latents=12) for m in layer
  )
  layers = 8 * (three - one) * 3 // 2
  # What nothing depends on is left out: a layer's last matmul.
  last = 8 * 3 * 2 * 12 * model.mlp_width * model.width
  assert trained.recomputed_flops == layers - last


def test_the_page_names_every_class_axis_and_assumption(trained):
  text = page.render(trained)
  for words in (
    'optimizer state',
    'fits',
    'all-gather',
    'data (ici)',
    'latent',
    'of the peak',
    'Assumed',
  ):
    assert words in text, text
  saved = dataclasses.replace(trained, saved_flops=10**9)
  assert 'token table 1e+09 FLOPs saved' in page.render(saved)
  assert max(map(len, text.splitlines())) <= 80


def test_parameters_are_gathered_in_the_loop_over_layers(trained):
  gathers = [
    row
    for row in trained.collectives
    if (row.kind, row.axis, row.phase) == ('all-gather', 'data', 'latent')
  ]
  assert sum(row.count for row in gathers) >= 3 * 6


def test_what_does_not_fit_is_given_a_change_that_does(
  trained, kept_more, machine
):
  room = (trained.needed_bytes + kept_more.needed_bytes) // 2
  plan = dataclasses.replace(kept_more, hbm_bytes=room, fits=False)
  found = advice.smallest_change(plan.config, machine, plan)
  assert found.change is not None
  changes, other = found.change
  assert changes == {'model.remat': 'attention'}
  assert other.fits
  assert other.needed_bytes <= room
  text = page.render_change(plan, found)
  assert '--config.model.remat=attention' in text
  assert 'does not fit' in text


def fake_plans(monkeypatch, trained, needed):
  """Plans whose bytes are a function of the config; nothing is compiled."""
  seen = []

  def make(config, machine, command, hbm_bytes):
    seen.append(config)
    return dataclasses.replace(
      trained,
      config=config,
      mesh=dict(plans.make_mesh(config, machine).shape),
      needed_bytes=needed(config),
      hbm_bytes=hbm_bytes,
      fits=needed(config) <= hbm_bytes,
    )

  monkeypatch.setattr(plans, 'make_plan', make)
  return seen


def test_the_batch_is_computed_in_parts_before_axes_change(
  monkeypatch, trained, machine
):
  def needed(config):
    return 2**20 // config.train.num_microbatches

  config = advice.apply(_CONFIG, {'train.batch_size': 64})
  fake_plans(monkeypatch, trained, needed)
  plan = dataclasses.replace(
    trained, config=config, needed_bytes=2**20, hbm_bytes=2**18, fits=False
  )
  change = advice.smallest_change(config, machine, plan).change
  assert change is not None
  assert change[0] == {'train.num_microbatches': 4}


@pytest.mark.parametrize('num', [1, 4])
def test_sums_of_every_part_are_taken_where_whole_gradients_do_not_fit(
  monkeypatch, trained, machine, num
):
  def needed(config):
    whole = config.train.reduce_gradients_once * 2**12
    return 2**20 // config.train.num_microbatches + whole

  start = {'train.batch_size': 64, 'train.num_microbatches': num}
  config = advice.apply(_CONFIG, start)
  fake_plans(monkeypatch, trained, needed)
  plan = dataclasses.replace(
    trained, config=config, needed_bytes=2**20, hbm_bytes=2**18, fits=False
  )
  change = advice.smallest_change(config, machine, plan).change
  assert change is not None
  more = {'train.num_microbatches': 4} if num == 1 else {}
  assert change[0] == {**more, 'train.reduce_gradients_once': False}


def test_what_helps_in_nothing_is_not_tried_for_ever(
  monkeypatch, trained, machine
):
  """Sums of every part are tried next to whole gradients, and count as well."""
  start = {'train.batch_size': 4096, 'model.remat': 'full'}
  config = advice.apply(_CONFIG, start)
  hbm_bytes = 2**18
  seen = fake_plans(monkeypatch, trained, lambda _: hbm_bytes + 1)
  plan = dataclasses.replace(
    trained, config=config, hbm_bytes=hbm_bytes, fits=False
  )
  found = advice.smallest_change(config, machine, plan)
  assert found.change is None and found.was_cut
  assert found.num_compiled == len(seen)
  once = [c.train.reduce_gradients_once for c in seen]
  assert set(once) == {True, False}
  assert len(seen) <= advice._MOST_COMPILED + 1


def test_parts_of_the_batch_may_do_without_recomputation(
  monkeypatch, trained, machine
):
  """Where what is kept for the backward pass is not what takes the room."""
  config = advice.apply(
    _CONFIG, {'train.batch_size': 64, 'model.remat': 'none'}
  )
  seen = fake_plans(
    monkeypatch, trained, lambda config: 2**20 // config.train.num_microbatches
  )
  plan = dataclasses.replace(
    trained, config=config, needed_bytes=2**20, hbm_bytes=2**18, fits=False
  )
  sizes = dict.fromkeys(plan.bytes_per_chip, 0) | {'activations': 2**20}
  plan = dataclasses.replace(plan, bytes_per_chip=sizes)
  change = advice.smallest_change(config, machine, plan).change
  assert change is not None
  assert change[0] == {'train.num_microbatches': 4}
  assert {c.model.remat for c in seen} >= {'dots', 'attention', 'full'}


def test_nothing_is_compiled_where_the_state_alone_does_not_fit(
  monkeypatch, trained, machine
):
  seen = fake_plans(monkeypatch, trained, lambda config: 2**20)
  plan = dataclasses.replace(trained, hbm_bytes=100, fits=False)
  found = advice.smallest_change(_CONFIG, machine, plan)
  assert found.change is None
  assert not seen
  assert 'No change' in page.render_change(plan, found)


# As configs are by default; and there is much else to try.
_PLAIN = advice.apply(
  _CONFIG,
  {
    'mesh.model': 1,
    'model.attention': 'chunked',
    'model.remat': 'none',
    'train.batch_size': 512,
  },
)


def search(monkeypatch, trained, machine, config, fits):
  """What fits by `fits` is looked for; with all that was compiled."""
  room = 2**18
  seen = fake_plans(monkeypatch, trained, lambda c: room + (not fits(c)))
  plan = plans.make_plan(config, machine, 'train', room)
  assert seen == [config] and not plan.fits
  found = advice.smallest_change(config, machine, plan)
  return plan, found, seen


@pytest.mark.parametrize('axis', ['model', 'context'])
@pytest.mark.parametrize('remat', ['none', 'full'])
def test_a_longer_axis_is_found_whatever_else_there_is_to_try(
  monkeypatch, trained, machine, axis, remat
):
  config = advice.apply(_PLAIN, {'model.remat': remat})
  fits = lambda c: getattr(c.mesh, axis) == 2
  _, found, seen = search(monkeypatch, trained, machine, config, fits)
  assert found.change is not None
  assert found.change[0] == {f'mesh.{axis}': 2, 'mesh.data': 4}
  assert len(seen) > 5


def test_a_search_that_was_cut_says_what_it_knows(
  monkeypatch, trained, machine
):
  plan, found, seen = search(
    monkeypatch, trained, machine, _PLAIN, lambda c: False
  )
  num = len(seen) - 1
  assert found.change is None
  assert found.num_compiled == num >= advice._MOST_COMPILED
  text = page.render_change(plan, found)
  assert f'None of the {num} changes that were compiled fits.' in text
  assert 'No change' not in text


@pytest.mark.parametrize('remat', ['none', 'full'])
def test_nothing_is_compiled_twice_nor_in_a_layout_that_is_the_same(
  monkeypatch, trained, machine, remat
):
  config = advice.apply(_PLAIN, {'model.remat': remat, 'train.batch_size': 16})
  monkeypatch.setattr(advice, '_MOST_COMPILED', 99)
  plan, found, seen = search(
    monkeypatch, trained, machine, config, lambda c: False
  )
  assert found.change is None and not found.was_cut
  assert 'No change' in page.render_change(plan, found)
  assert all(seen.count(c) == 1 for c in seen)
  assert {c.mesh.rules for c in seen} == {config.mesh.rules}
  sizes = {(c.mesh.context, c.mesh.model) for c in seen}
  assert sizes >= {(1, 1), (1, 2), (2, 1), (4, 1)}


def test_rules_are_tried_where_an_axis_gives_them_something_to_split(
  monkeypatch, trained, machine
):
  config = advice.apply(_PLAIN, {'mesh.context': 2})
  fits = lambda c: c.mesh.rules == 'context'
  _, found, _ = search(monkeypatch, trained, machine, config, fits)
  assert found.change is not None
  assert found.change[0] == {'mesh.rules': 'context'}


@pytest.mark.parametrize('left', ['slice', 'context'])
def test_an_axis_that_takes_what_is_left_is_no_obstacle(
  monkeypatch, trained, machine, left
):
  config = advice.apply(_PLAIN, {'mesh.data': 4, f'mesh.{left}': -1})
  _, found, _ = search(
    monkeypatch, trained, machine, config, lambda c: c.mesh.model == 2
  )
  assert found.change is not None
  assert found.change[0] == {'mesh.model': 2, 'mesh.data': 2}
  assert found.change[1].mesh[left] == 2
  rows = advice.sweep(config, machine, 'train', 2**30)
  meshes = [row.mesh for _, row in rows if isinstance(row, plans.Plan)]
  assert len(meshes) == len(rows) == 5
  assert all(meshes.count(mesh) == 1 for mesh in meshes)
  assert {mesh['slice'] for mesh in meshes} == {meshes[0]['slice']}


@pytest.mark.filterwarnings('ignore:the load_module')
def test_a_bucket_need_not_have_the_folder_of_the_output(capsys):
  pytest.importorskip('gcsfs')
  output = '--output=gs://bucket/new/plan.json'
  with pytest.raises(SystemExit):
    main.main(['plan', TINY, '--topology=v9:4x4', output])
  told = capsys.readouterr().err
  assert 'v9' in told and 'folder' not in told


def test_a_sample_plan_splits_the_cache_as_sampling_does(machine):
  sizes = {}
  for num in (8, 16):
    config = advice.apply(_CONFIG, {'sample.num_samples': num})
    mesh = partitioning.make_mesh(config.mesh, machine.devices)
    program = programs.make_program('sample', config, mesh)
    cache = program.args[3]
    sizes[num] = memory.abstract_classes((program.params, cache))['batch']
    whole = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))
    rows = partitioning.num_parts(mesh, ('slice', 'data', 'context'))
    assert rows > 1
    assert sizes[num] == pytest.approx(whole / rows, rel=0.02)
  assert sizes[16] > 1.9 * sizes[8]


def test_drawing_needs_what_is_traced(machine):
  """Every token attends to all rows of both caches, masked ones included."""
  mesh = partitioning.make_mesh(_CONFIG.mesh, machine.devices)
  program = programs.make_program('sample', _CONFIG, mesh)
  how = _CONFIG.sample
  jaxpr = program.function.trace(*program.args).jaxpr.jaxpr
  work = counting.count(jaxpr, how.num_latents - how.refill_latents)
  assert program.model_flops == work.total == 1_956_096


def test_a_plan_refuses_what_the_evaluation_of_training_would(machine):
  config = advice.apply(
    _CONFIG, {'evaluate.every': 5, 'evaluate.batch_size': 1}
  )
  with pytest.raises(UserError, match=r'evaluate\.batch_size 1 is not'):
    plans.make_plan(config, machine, 'train', 2**30)


@pytest.mark.parametrize('command', ['evaluate', 'sample'])
def test_what_runs_after_training_is_planned_too(command, machine):
  plan = plans.make_plan(_CONFIG, machine, command, 2**30)
  sizes = plan.bytes_per_chip
  assert plan.fits
  assert sum(sizes.values()) == pytest.approx(plan.needed_bytes, rel=0.02)
  assert not sizes['optimizer_state']
  assert not sizes['gradients']
  assert bool(sizes['cache']) == (command == 'sample')
  assert plan.model_flops > 0


def test_a_sweep_has_a_line_for_every_layout(monkeypatch, trained, machine):
  fake_plans(monkeypatch, trained, lambda config: 2**20)
  rows = advice.sweep(_CONFIG, machine, 'train', 2**30)
  text = page.render_sweep(rows)
  assert len(text.splitlines()) == len(rows) + 1
  layouts = [tuple(sorted(changes.items())) for changes, _ in rows]
  assert len(set(layouts)) == len(rows) >= 4
  json.dumps(page.sweep_to_dicts(rows), allow_nan=False)


def test_a_layout_of_many_axes_leaves_the_columns_of_a_sweep_apart(trained):
  sizes = {'slice': 2, 'data': 128, 'context': 16, 'model': 16}
  rows = [({}, trained), ({}, dataclasses.replace(trained, mesh=sizes))]
  head, *lines = page.render_sweep(rows).splitlines()
  assert {line.index(' yes') for line in lines} == {head.index(' fits')}


@pytest.mark.parametrize(
  ('remat', 'products'),
  # Forward 2, backward 5; or the forward pass again.
  [(None, 7), ('attention', 7), ('full', 9)],
)
def test_a_kernel_is_counted_as_often_as_it_runs(remat, products):
  N, M, H, K = 128, 512, 2, 64
  kernel = attention.Kernel('flash', 1, 64, interpret=False)
  mask = Mask(offset=M - N)
  attend = lambda q, k, v: attention.attend(q, k, v, mask, Turns(), kernel)
  policies = {
    'attention': jax.checkpoint_policies.save_only_these_names('attention'),
    'full': jax.checkpoint_policies.nothing_saveable,
  }
  if remat:
    attend = jax.checkpoint(attend, policy=policies[remat])
  loss = lambda *qkv: attend(*qkv).sum()
  shapes = [jax.ShapeDtypeStruct((1, n, H * K), 'float32') for n in (N, M, M)]
  trace = jax.jit(jax.value_and_grad(loss, (0, 1, 2))).trace(*shapes)
  work = counting.count(trace.jaxpr.jaxpr, 1)
  # Two heads of 64 share a block of 128 lanes.
  assert work.kernel == products * 2 * N * M * H * 128
  assert (work.again > 0) == (remat == 'full')


def test_bytes_of_kernels_that_multiply_nothing_are_counted():
  B, N, F = 2, 256, 128
  x = jax.ShapeDtypeStruct((B, N, F), 'float32')
  trace = jax.jit(
    lambda x, y: flash_delta.delta(x, y, 64, interpret=False)
  ).trace(x, x)
  work = counting.count(trace.jaxpr.jaxpr, 1)
  assert work.total == 0
  assert work.moved == 4 * (2 * B * N * F + B * 2 * N)


def test_work_does_not_depend_on_how_a_step_is_cut():
  found = []
  for keys in ({}, {'mesh.slice': 2, 'train.num_microbatches': 2}):
    # Whether a table is less work depends on the rows of a device.
    same = {'mesh.data': 2, 'model.token_table': 'never'}
    config = make_config(same | keys)
    mesh = partitioning.make_mesh(
      config.mesh, jax.devices()[: 2 * config.mesh.slice]
    )
    program = programs.make_program('train', config, mesh)
    trace = program.function.trace(*program.args)
    found.append(counting.count(trace.jaxpr.jaxpr, 1).total)
  assert found[0] == found[1] > 0


@pytest.mark.parametrize(('microbatches', 'slices'), [(1, 1), (4, 1), (2, 2)])
def test_work_that_the_token_table_saves_is_not_needed(microbatches, slices):
  auto, never = (
    make_config(
      {
        'model.token_table': table,
        'model.width': 256,
        'train.num_microbatches': microbatches,
        'mesh.slice': slices,
        'mesh.data': 1,
      }
    )
    for table in ('auto', 'never')
  )
  mesh = partitioning.make_mesh(auto.mesh, jax.devices()[:slices])
  auto, never = (programs.make_program('train', c, mesh) for c in (auto, never))
  assert never.saved_flops == 0 < auto.saved_flops
  assert auto.model_flops == never.model_flops - auto.saved_flops
  traced = [p.function.trace(*p.args).jaxpr.jaxpr for p in (never, auto)]
  plain, table = (counting.count(x, 1).total for x in traced)
  # And the sums of biases' gradients, which are matmuls of 8 rows.
  assert plain - table == pytest.approx(auto.saved_flops, rel=0.02)


def test_inputs_that_many_devices_share_save_less():
  found = []
  for axis in ('data', 'context'):
    config = make_config({'mesh.data': 1, f'mesh.{axis}': 2})
    mesh = partitioning.make_mesh(config.mesh, jax.devices()[:2])
    found.append(programs.make_program('train', config, mesh).saved_flops)
  whole = 3 * flops.projection_flops(_CONFIG.model, 8 * 24)
  twice = 3 * flops.projection_flops(_CONFIG.model, 2 * 31)
  assert found == [whole - twice] * 2


def test_a_layout_that_is_refused_says_why_in_its_line(machine):
  config = advice.apply(_CONFIG, {'train.batch_size': 6})
  rows = advice.sweep(config, machine, 'train', 2**30)
  assert 'train.batch_size' in page.render_sweep(rows[:1])


@pytest.mark.parametrize('is_checked', [True, False])
def test_a_run_on_tpu_asks_whether_its_step_fits(monkeypatch, is_checked):
  def refuse(*_):
    raise UserError('the train step needs more')

  def compile_anyway(*_):
    raise ChildProcessError

  monkeypatch.setattr(plans, 'fitting_step', refuse)
  monkeypatch.setattr(train_step, 'make_train_step', compile_anyway)
  config = advice.apply(_CONFIG, {'train.check_memory': is_checked})
  devices = np.array([types.SimpleNamespace(platform='tpu')])
  mesh = types.SimpleNamespace(devices=devices)
  with pytest.raises(UserError if is_checked else ChildProcessError):
    starting.compile_step(config, mesh, None, None)  # pyright: ignore


class _Large:
  """Stands for a compiled step, and for what leads to it."""

  def trace(self, *_):
    return self

  lower = compile = trace

  def memory_analysis(self):
    sizes = {'argument': 3, 'output': 2, 'alias': 2, 'temp': 1}
    return types.SimpleNamespace(
      **{f'{k}_size_in_bytes': n * 2**30 for k, n in sizes.items()}
    )


def test_a_step_that_devices_have_no_room_for_is_refused(machine, monkeypatch):
  mesh = partitioning.make_mesh(_CONFIG.mesh, machine.devices)
  program = programs.make_program('train', _CONFIG, mesh)
  program = dataclasses.replace(program, function=_Large())
  monkeypatch.setattr(programs, 'make_program', lambda *_: program)

  def step(num_bytes):
    device = types.SimpleNamespace(
      memory_stats=lambda: {'bytes_limit': num_bytes}
    )
    mesh = types.SimpleNamespace(local_devices=[device])
    return plans.fitting_step(_CONFIG, mesh, None)  # pyright: ignore

  with pytest.raises(UserError, match=r'needs 4\.00 GiB of each device'):
    step(2**32 - 1)
  assert step(2**32) is program.function


@pytest.mark.slow
def test_the_fitting_step_is_the_step(machine):
  mesh = partitioning.make_mesh(_CONFIG.mesh, machine.devices)
  state = train_step.init_state(_CONFIG, mesh)
  rows = make_batch(_CONFIG.model, [24] * 8)
  # Images have three axes of positions, even where the model reads none.
  rows['positions'] = np.repeat(rows['positions'], 3, axis=2)
  batch = partitioning.global_batch(rows, mesh, _CONFIG.train.batch_size)
  step = plans.fitting_step(_CONFIG, mesh, batch)
  state, sums = step(state, batch)
  assert int(state.step) == 1
  assert float(sums['loss']) > 0


def test_slices_need_an_axis_of_their_own(monkeypatch, machine):
  two = dataclasses.replace(machine, num_slices=2)
  four = advice.apply(_CONFIG, {'mesh.slice': 4})
  with pytest.raises(UserError, match='--num_slices=2'):
    plans.make_plan(four, two, 'train', 2**30)
  assert plans.least_bytes(_CONFIG, two, 'train') > plans.least_bytes(
    _CONFIG, machine, 'train'
  )


def test_loops_and_branches_are_counted_as_they_run():
  def function(x):
    def body(y, _):
      return jax.lax.cond(y[0, 0] > 0, lambda z: z @ z, lambda z: z, y), None

    x = jax.lax.scan(body, x, length=7)[0]
    return jax.lax.while_loop(lambda y: y[0, 0] < 1, lambda y: y @ y, x)

  traced = jax.jit(function).trace(jax.ShapeDtypeStruct((4, 4), 'float32'))
  work = counting.count(traced.jaxpr.jaxpr, while_trips=3)
  assert work == counting.Work(10 * 2 * 4**3, 0, 0)
