"""A step is one function, however its batch and its arrays are cut."""

import dataclasses
import functools
import os
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import same
from steps import (
  LENGTHS,
  SINUSOIDAL,
  assert_close,
  config_on,
  global_batch,
  gradients,
  num_devices,
  place,
  sent,
)
from tiny import make_batch, make_params

from perceiver_ar import gradients as gradients_lib
from perceiver_ar import partitioning, skipping, train_step

_TESTS = pathlib.Path(__file__).parent
_slow = functools.partial(pytest.param, marks=pytest.mark.slow)

# With the number of microbatches. Where these have fewer rows than devices, the
# latents are split over `context`.
_MESHES = [
  ({'slice': 2, 'data': 2, 'model': 2}, 2),
  _slow({'data': 2, 'context': 2, 'model': 2}, 1),
  _slow({'data': 8, 'rules': 'replicated'}, 1),
  ({'context': 8}, 2),
  _slow({'slice': 2}, 1),
  _slow({'slice': 2}, 2),
  _slow({'slice': 2, 'data': 2}, 1),
  _slow({'data': 8}, 1),
  _slow({'data': 4, 'rules': 'fsdp'}, 2),
  _slow({'data': 4}, 2),
  _slow({'data': 4, 'rules': 'replicated'}, 2),
  _slow({'context': 8}, 1),
  _slow({'data': 2, 'context': 2, 'rules': 'context'}, 2),
  _slow({'model': 2, 'rules': 'tensor'}, 1),
  _slow({'model': 2, 'rules': 'tensor'}, 2),
  _slow({'slice': 2, 'data': 2, 'rules': 'replicated'}, 2),
  _slow({'slice': 2, 'context': 4}, 1),
  _slow({'slice': 2, 'context': 4}, 2),
  _slow({'slice': 2, 'model': 2}, 2),
  _slow({'data': 2, 'context': 4}, 1),
  _slow({'data': 2, 'context': 4, 'rules': 'context'}, 2),
  _slow({'data': 4, 'model': 2}, 1),
  _slow({'data': 4, 'model': 2}, 2),
  _slow({'context': 4, 'model': 2}, 1),
  _slow({'context': 4, 'model': 2}, 2),
  _slow({'slice': 2, 'data': 2, 'model': 2}, 1),
  _slow({'slice': 2, 'data': 2, 'context': 2}, 1),
  _slow({'slice': 2, 'context': 2, 'model': 2}, 2),
  _slow({'data': 2, 'context': 2, 'model': 2}, 2),
  _slow({'data': 2, 'context': 2, 'rules': 'context'}, 1),
  _slow({'slice': 2, 'model': 2}, 1),
  _slow({'slice': 2, 'context': 2, 'model': 2}, 1),
  _slow({'slice': 2, 'data': 2}, 2),
]
_ALL_FOUR = {'slice': 2, 'data': 2, 'context': 2, 'model': 2}


def _positions(num_microbatches, other):
  """Rotary ones with several, unless it is the other way round."""
  return SINUSOIDAL if (num_microbatches == 1) != other else {}


@pytest.mark.parametrize('other', [False, _slow(True)])
@pytest.mark.parametrize(('mesh', 'num_microbatches'), _MESHES, ids=str)
def test_sums_and_gradients_do_not_depend_on_the_mesh(
  mesh, num_microbatches, other
):
  positions = _positions(num_microbatches, other)
  changes = {'train.num_microbatches': num_microbatches}
  one_sums, one_grads, _ = gradients(config_on({}, **positions))
  sums, grads, _ = gradients(config_on(mesh, **changes, **positions))
  assert sums['num_targets'] == 3 * 8 + 8 + 5 + 1 + 8
  assert_close(sums, one_sums)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(one_grads))
  assert_close(grads, one_grads)


@pytest.mark.slow
@pytest.mark.parametrize(
  ('rules', 'changes'),
  [
    (
      'fsdp_tensor',
      {
        'model.position_encoding': 'learned',
        'model.position_sizes': (90, 7, 5),
      },
    ),
    ('fsdp_tensor_vocab', {'model.vocab_size': 32}),
    (
      'fsdp_tensor_vocab',
      {'model.vocab_size': 32, 'train.num_microbatches': 1},
    ),
    ('fsdp_tensor_vocab', {'model.vocab_size': 32, 'model.logits_block': 3}),
    ('fsdp_tensor', {'train.reduce_gradients_once': False}),
    ('tensor', {'train.reduce_gradients_once': False}),
    ('fsdp_tensor', {'model.attention': 'flash'}),  # interpreted
    ('fsdp_tensor', {'model.attention': 'flash'} | SINUSOIDAL),
  ],
  ids=str,
)
def test_nor_do_they_with_what_else_a_model_may_have(rules, changes):
  one_sums, one_grads, _ = gradients(config_on({}, **changes))
  mesh = {'data': 2, 'context': 2, 'model': 2, 'rules': rules}
  changes = {'train.num_microbatches': 2} | changes
  sums, grads, _ = gradients(config_on(mesh, **changes))
  assert_close(sums, one_sums)
  assert_close(grads, one_grads)


@pytest.mark.slow
@pytest.mark.parametrize(
  'mesh',
  [{'slice': 2, 'data': 2}, {'slice': 2, 'data': 2, 'model': 2}],
  ids=str,
)
def test_nor_where_sums_wait_for_slices_alone(mesh):
  parts = {
    'train.reduce_gradients_once': False,
    'train.num_microbatches': 2,
  }
  sums, grads, _ = gradients(
    config_on(mesh | {'rules': 'fsdp_tensor'}, **parts)
  )
  one_sums, one_grads, _ = gradients(config_on({}))
  assert_close(sums, one_sums)
  assert_close(grads, one_grads)


@pytest.mark.slow
@pytest.mark.parametrize('other', [False, True])
@pytest.mark.parametrize('num_microbatches', [1, 2])
def test_all_four_axes_together_give_the_sums_of_one_device(
  num_microbatches, other
):
  """On sixteen devices, which is what it takes, in another process."""
  positions = _positions(num_microbatches, other)
  changes = positions | {'train.num_microbatches': num_microbatches}
  code = f"""
import conftest, jax
jax.config.update('jax_num_cpu_devices', 16)
from steps import assert_close, config_on, gradients
sums, grads, _ = gradients(config_on({_ALL_FOUR!r}, **{changes!r}))
one_sums, one_grads, _ = gradients(config_on({{}}, **{positions!r}))
assert_close(sums, one_sums)
assert_close(grads, one_grads)
"""
  paths = [str(path) for path in (_TESTS, _TESTS.parent)]
  subprocess.run(
    [sys.executable, '-c', code],
    check=True,
    env=os.environ | {'PYTHONPATH': os.pathsep.join(paths)},
  )


@pytest.mark.parametrize('num_microbatches', [4, _slow(2), _slow(8)])
def test_microbatches_give_the_sums_of_the_batch(num_microbatches):
  changes = {'train.num_microbatches': num_microbatches}
  want, got = gradients(config_on({})), gradients(config_on({}, **changes))
  assert_close(got[:2], want[:2])


@pytest.mark.parametrize(
  'mesh',
  [{'slice': 2, 'data': 2, 'context': 2}, {'data': 2, 'context': 2}, {}],
  ids=str,
)
@pytest.mark.parametrize(
  'drop',
  [
    _slow({'model.dropout_rate': 0.3}),
    _slow({'model.input_dropout_rate': 0.3}),
    _slow({'model.num_kept_inputs': 12}),
  ],
  ids=str,
)
def test_what_is_dropped_of_a_row_does_not_depend_on_how_rows_are_cut(
  mesh, drop
):
  want = gradients(config_on({}, **drop))
  got = gradients(config_on(mesh, **drop, **{'train.num_microbatches': 2}))
  assert_close(got[:2], want[:2])
  none = gradients(config_on({}))
  assert got[0]['loss'] != none[0]['loss']


@pytest.mark.parametrize(
  'mesh',
  [
    {'data': 2, 'context': 2},
    _slow({'slice': 2, 'data': 2}),
    _slow({'data': 2, 'context': 2, 'model': 2}),
    _slow({'context': 4, 'rules': 'context'}),
  ],
  ids=str,
)
def test_gradients_of_all_microbatches_cross_the_mesh_once(mesh):
  two, four = (_traffic(mesh, num) for num in (2, 4))
  # Activations go over `model`, where it splits a sum, and over `context`, from
  # inputs to latents.
  phases = {
    r.phase
    for r in four
    if r.axis not in ('model', 'context')
    or (r.axis, r.kind) == ('context', 'all-reduce')
  }
  assert phases <= {'gradient', 'optimizer'}
  # Nor are gradients gathered over `model` to be added up.
  gathers = [r for r in four if (r.axis, r.kind) == ('model', 'all-gather')]
  assert {r.phase for r in gathers} <= {'input'}
  sums = [[r for r in rows if r.phase == 'gradient'] for rows in (two, four)]
  assert sums[0] == sums[1]
  split = {'data'} if mesh.get('rules') != 'context' else {'context'}
  assert split & {r.axis for r in sums[0] if r.kind == 'reduce-scatter'}


@pytest.mark.slow
@pytest.mark.parametrize(
  ('mesh', 'waiting'),
  [
    ({'slice': 2, 'data': 2}, ['slice']),
    ({'data': 2, 'context': 2, 'rules': 'replicated'}, ['data', 'context']),
    ({'data': 2, 'context': 2}, []),
  ],
  ids=str,
)
def test_or_only_axes_before_the_first_that_splits_parameters(mesh, waiting):
  two, four = (_traffic(mesh, num, once=False) for num in (2, 4))

  def sums(rows, axes):
    return [
      (r.axis, r.bytes)
      for r in rows
      if r.phase == 'gradient' and set(r.axis.split('+')) & {*axes}
    ]

  assert sums(two, waiting) == sums(four, waiting)
  assert bool(sums(two, waiting)) == bool(waiting)
  others = {'slice', 'data', 'context'} & {*mesh} - {*waiting}
  for (_, least), (_, most) in zip(
    sums(two, others), sums(four, others), strict=True
  ):
    assert most == 2 * least


def _traffic(mesh, num_microbatches, once=True):
  keys = {
    'train.batch_size': 16,
    'train.num_microbatches': num_microbatches,
    'train.reduce_gradients_once': once,
  }
  return sent(config_on(mesh, **keys, **{'model.scan_unroll': 1}))


def test_constraints_reach_the_program():
  """Where no rules are in force they would be left out in silence."""
  mesh = {'data': 2, 'context': 2, 'model': 2}
  _, _, text = gradients(config_on(mesh, **SINUSOIDAL))
  constraints = [x for x in text.splitlines() if 'sharding_constraint' in x]
  assert len(constraints) > 20
  for axis in ('data', 'context', 'model'):
    assert any(f'"{axis}"' in x for x in constraints), axis
  # The token table is gathered where it is used.
  assert any('tensor<31x16xf32>' in x for x in constraints)


def _steps(config, num_steps, change=lambda step, batch: batch):
  """Yields metrics and state, both on the host, after every step."""
  mesh, state = place(config)
  run = _compiled(config)
  for step in range(num_steps):
    batch = change(step, make_batch(config.model, LENGTHS, step))
    state, metrics = run(
      state, partitioning.global_batch(batch, mesh, len(batch['tokens']))
    )
    yield jax.device_get(metrics), jax.device_get(state)


@functools.cache
def _compiled(config):
  return train_step.make_train_step(config, place(config)[0])


# Not Adam: it divides the noise of vanishing gradients by itself.
_SGD = {'optimizer.name': 'sgd', 'optimizer.learning_rate': 0.1}


@pytest.mark.parametrize(
  'mesh',
  [
    _slow({'slice': 2, 'data': 2, 'model': 2}),
    _slow({'data': 2, 'model': 2}),
    _slow({'data': 2}),
  ],
  ids=str,
)
def test_updates_do_not_depend_on_the_mesh(mesh):
  one = _steps(config_on({}, **_SGD), 3)
  many = _steps(config_on(mesh, **_SGD, **{'train.num_microbatches': 2}), 3)
  for (want, want_state), (got, got_state) in zip(one, many, strict=True):
    assert_close(got, want)
    assert_close(got_state.params, want_state.params)


def test_shardings_survive_a_step():
  mesh = {'slice': 2, 'data': 2, 'model': 2}
  config = config_on(mesh, **_SGD, **{'train.num_microbatches': 2})
  where, state = place(config)
  want = train_step.abstract_state(config, where)
  state, _ = _compiled(config)(state, global_batch(config, where))
  for x, a in zip(*map(jax.tree.leaves, (state, want)), strict=True):
    assert x.sharding.is_equivalent_to(a.sharding, x.ndim)


_DROPOUT = {
  'model.dropout_rate': 0.2,
  'model.attention': 'reference',
  'optimizer.gradient': 'mean',
  'optimizer.learning_rate': 1e-2,
}


def test_a_bad_step_changes_nothing_and_is_counted():
  config = config_on({}, **_DROPOUT)

  def change(step, batch):
    if step in (1, 2):
      # Not in the vocabulary, so that the logits are NaN.
      batch['tokens'][0, 10] = 31
    return batch

  steps = list(_steps(config, 5, change))
  states = [state for _, state in steps]
  assert [int(s.step) for s in states] == [1, 2, 3, 4, 5]
  assert [int(s.num_skipped) for s in states] == [0, 1, 2, 2, 2]
  assert [int(s.num_skipped_in_a_row) for s in states] == [0, 1, 2, 0, 0]
  assert [int(m['skipped']) for m, _ in steps] == [0, 1, 1, 0, 0]
  assert [int(m['num_skipped_in_a_row']) for m, _ in steps] == [0, 1, 2, 0, 0]
  kept = [(s.params, s.opt_state) for s in states]
  assert same(kept[0], kept[1]) and same(kept[1], kept[2])
  assert not same(kept[2][0], kept[3][0])
  assert not same(kept[2][1], kept[3][1])
  assert all(np.isfinite(x).all() for x in jax.tree.leaves(kept))
  assert np.isnan(steps[1][0]['loss'])


@pytest.fixture
def judged_early(monkeypatch):
  monkeypatch.setattr(skipping, 'USUAL_STEPS', 3)


# So slow that the losses of one batch are much alike.
_SLOW = _SGD | {'optimizer.learning_rate': 1e-3}
_SPIKES = _SLOW | {'train.spike_deviations': 5.0}


def _learnt(config, with_other):
  """Steps on one batch, and in between on another whose loss is higher."""
  seeds = [0, 0, 0, 0, 1, 0] if with_other else [0, 0, 0, 0, 0]
  batches = lambda step, batch: make_batch(config.model, LENGTHS, seeds[step])
  return list(_steps(config, len(seeds), batches))


@pytest.mark.parametrize(
  'mesh', [{}, _slow({'slice': 2, 'data': 2, 'model': 2})], ids=str
)
def test_a_spike_changes_nothing_as_if_it_had_never_been(judged_early, mesh):
  config = config_on(mesh, **_SPIKES)
  steps = _learnt(config, with_other=True)
  assert [int(m['is_spike']) for m, _ in steps] == [0, 0, 0, 0, 1, 0]
  assert [int(m['skipped']) for m, _ in steps] == [0, 0, 0, 0, 1, 0]
  assert [int(m['num_skipped_in_a_row']) for m, _ in steps] == [0] * 4 + [1, 0]
  assert np.isfinite(steps[4][0]['loss'])
  (_, last), (_, want) = steps[-1], _learnt(config, with_other=False)[-1]
  for name in ('params', 'opt_state', 'usual_loss'):
    assert same(getattr(last, name), getattr(want, name)), name
  assert (last.step, last.num_skipped, want.num_skipped) == (6, 1, 0)
  assert last.usual_loss.num_steps == 5
  losses = [m['loss'] / m['num_targets'] for m, _ in steps if not m['skipped']]
  # The fourth takes a third from the three before, the fifth from all four.
  mean = (np.mean(losses[:3]) * 2 / 3 + losses[3] / 3) * 2 / 3 + losses[4] / 3
  np.testing.assert_allclose(last.usual_loss.mean, mean, rtol=1e-5)


@pytest.mark.slow
def test_without_the_key_a_spike_counts_like_any_other_step(judged_early):
  steps = _learnt(config_on({}, **_SLOW), with_other=True)
  assert not any(m['skipped'] or m['is_spike'] for m, _ in steps)
  assert steps[-1][1].usual_loss.num_steps == 6


def test_the_same_seed_gives_the_same_bits_and_dropout_follows_the_step():
  config = config_on({}, **_DROPOUT)
  first, again = (list(_steps(config, 3)) for _ in range(2))
  assert same(first, again)
  # One batch and the same parameters at another step: other dropout.
  mesh, state = place(config)
  later = dataclasses.replace(state, step=jnp.int32(1) + state.step)
  _, sums = _compiled(config)(later, global_batch(config, mesh))
  assert sums['num_targets'] == first[0][0]['num_targets']
  assert sums['loss'] != first[0][0]['loss']


@pytest.mark.parametrize('gradient', ['sum', _slow('mean')])
def test_the_norm_that_is_clipped_is_of_the_sum_or_of_the_mean(gradient):
  config = config_on({}, **_SGD, **{'optimizer.gradient': gradient})
  ((metrics, state),) = _steps(config, 1)
  sums, grads, _ = gradients(config_on({}))
  count = sums['num_targets'] if gradient == 'mean' else 1
  grads = jax.tree.map(lambda g: g / count, grads)
  norm = np.sqrt(sum(np.square(g).sum() for g in jax.tree.leaves(grads)))
  np.testing.assert_allclose(metrics['grad_norm'], norm, rtol=1e-4)
  np.testing.assert_allclose(metrics['learning_rate'], 0.1, rtol=1e-6)
  # Nesterov's first update is 1.9 times the clipped gradient.
  clipped = jax.tree.map(lambda g: g / max(norm, 1), grads)
  want = jax.tree.map(
    lambda p, g: p - 0.1 * 1.9 * g, make_params(config.model), clipped
  )
  assert_close(state.params, want)


def test_steps_lower_the_loss_of_a_batch():
  config = config_on({}, **_DROPOUT)
  again = lambda step, batch: make_batch(config.model, LENGTHS, 0)
  losses = [m['loss'] for m, _ in _steps(config, 8, again)]
  assert losses[-1] < 0.8 * losses[0]


def test_a_fresh_state_is_where_it_belongs_and_the_same_on_any_mesh():
  states = []
  for mesh in ({}, {'data': 4, 'model': 2}):
    config = config_on(mesh)
    devices = jax.devices()[: num_devices(config)]
    where = partitioning.make_mesh(config.mesh, devices)
    state = train_step.init_state(config, where)
    abstract = train_step.abstract_state(config, where)
    for x, a in zip(*map(jax.tree.leaves, (state, abstract)), strict=True):
      assert (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding)
    states.append(jax.device_get(state))
  assert same(*states)


def test_targets_are_the_next_tokens_and_padding_weighs_nothing():
  tokens = jnp.array([[0, 0, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6], [0] * 6])
  inputs, targets, weights = gradients_lib.shift(tokens, 3)
  np.testing.assert_array_equal(inputs, tokens[:, :5])
  np.testing.assert_array_equal(targets, [[5, 6, 7], [4, 5, 6], [0, 0, 0]])
  np.testing.assert_array_equal(weights, [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
