"""A step is one function, however its batch and its arrays are cut."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from states import same
from tiny import make_batch, make_config, make_params

from perceiver_ar import partitioning, train_step

_SINUSOIDAL = {'model.position_encoding': 'sinusoidal'}
# Documents that fill the context, short ones, one of one token, and none.
_LENGTHS = [24, 11, 24, 5, 1, 24, 0, 17]


def _num_devices(config):
  sizes = dataclasses.asdict(config.mesh)
  return int(np.prod([sizes[k] for k in ('slice', 'data', 'context', 'model')]))


def _place(config):
  """The mesh, and a state of parameters of which none is zero."""
  mesh = partitioning.make_mesh(
    config.mesh, jax.devices()[: _num_devices(config)]
  )
  abstract = train_step.abstract_state(config, mesh)
  optimizer = train_step.make_optimizer(config.optimizer)
  params = make_params(config.model)
  state = train_step.TrainState(
    *(jnp.int32(0), params, jax.jit(optimizer.init)(params)),
    *(jnp.int32(0), jnp.int32(0)),
  )
  # Copies: a step takes over the buffers of its state.
  put = lambda x, a: jax.device_put(np.array(x), a.sharding)
  return mesh, jax.tree.map(put, state, abstract)


def _config(mesh, **changes):
  keys = {'slice': 1, 'data': 1, 'context': 1, 'model': 1} | mesh
  return make_config({f'mesh.{k}': v for k, v in keys.items()} | changes)


def _batch(config, mesh, seed=0):
  rows = make_batch(config.model, _LENGTHS, seed)
  return partitioning.global_batch(rows, mesh)


@functools.cache
def _gradients(config):
  """Sums, gradients on the host, and the lowered program."""
  mesh, state = _place(config)

  def run(params, batch):
    with partitioning.activations(mesh, config.mesh.rules):
      key = jax.random.key(0)
      return train_step._accumulate(params, batch, key, config)

  shardings = jax.tree.map(lambda x: x.sharding, state.params)
  lowered = jax.jit(run, out_shardings=(shardings, None)).lower(
    state.params, _batch(config, mesh)
  )
  grads, sums = lowered.compile()(state.params, _batch(config, mesh))
  return jax.device_get(sums), jax.device_get(grads), lowered.as_text()


_slow = functools.partial(pytest.param, marks=pytest.mark.slow)

# With the number of microbatches, which are rotary if there are several.
_MESHES = [
  ({'slice': 2, 'data': 2, 'model': 2}, 2),
  ({'data': 2, 'context': 2, 'model': 2}, 1),
  ({'data': 8, 'rules': 'replicated'}, 1),
  _slow({'data': 8, 'rules': 'replicated'}, 2),
  _slow({'data': 8}, 1),
  _slow({'data': 8}, 2),
  _slow({'data': 4, 'model': 2}, 1),
  _slow({'data': 4, 'model': 2}, 2),
  _slow({'model': 2, 'rules': 'tensor'}, 1),
  _slow({'model': 2, 'rules': 'tensor'}, 2),
  _slow({'slice': 2, 'data': 2, 'model': 2}, 1),
  _slow({'data': 2, 'context': 2, 'model': 2}, 2),
]


def _assert_close(got, want):
  def leaf(path, a, b):
    # Without rotation the biases of keys have no gradient, only noise.
    scale = max(np.abs(b).max(), 0.1)
    np.testing.assert_allclose(
      a, b, rtol=1e-4, atol=1e-5 * scale, err_msg=jax.tree_util.keystr(path)
    )

  jax.tree_util.tree_map_with_path(leaf, got, want)


@pytest.mark.parametrize(('mesh', 'num_microbatches'), _MESHES, ids=str)
def test_sums_and_gradients_do_not_depend_on_the_mesh(mesh, num_microbatches):
  positions = _SINUSOIDAL if num_microbatches == 1 else {}
  changes = {'train.num_microbatches': num_microbatches}
  one_sums, one_grads, _ = _gradients(_config({}, **positions))
  sums, grads, _ = _gradients(_config(mesh, **changes, **positions))
  assert sums['num_targets'] == 3 * 8 + 8 + 5 + 1 + 8
  _assert_close(sums, one_sums)
  assert all(np.abs(g).max() > 0 for g in jax.tree.leaves(one_grads))
  _assert_close(grads, one_grads)


@pytest.mark.parametrize('num_microbatches', [4, _slow(2), _slow(8)])
def test_microbatches_give_the_sums_of_the_batch(num_microbatches):
  changes = {'train.num_microbatches': num_microbatches}
  want, got = _gradients(_config({})), _gradients(_config({}, **changes))
  _assert_close(got[:2], want[:2])


def test_constraints_reach_the_program():
  """Without a mesh in the context Linen would leave them out in silence."""
  mesh = {'data': 2, 'context': 2, 'model': 2}
  _, _, text = _gradients(_config(mesh, **_SINUSOIDAL))
  constraints = [x for x in text.splitlines() if 'sharding_constraint' in x]
  assert len(constraints) > 20
  for axis in ('data', 'context', 'model'):
    assert any(f'"{axis}"' in x for x in constraints), axis
  # The token table is gathered where it is used.
  assert any('tensor<31x16xf32>' in x for x in constraints)


def _steps(config, num_steps, change=lambda step, batch: batch):
  """Yields metrics and state, both on the host, after every step."""
  mesh, state = _place(config)
  run = _compiled(config)
  for step in range(num_steps):
    batch = change(step, make_batch(config.model, _LENGTHS, step))
    state, metrics = run(state, partitioning.global_batch(batch, mesh))
    yield jax.device_get(metrics), jax.device_get(state)


@functools.cache
def _compiled(config):
  return train_step.make_train_step(config, _place(config)[0])


# Not Adam: it divides the noise of vanishing gradients by itself.
_SGD = {'optimizer.name': 'sgd', 'optimizer.learning_rate': 0.1}


@pytest.mark.parametrize(
  'mesh',
  [{'slice': 2, 'data': 2, 'model': 2}, _slow({'data': 4, 'model': 2})],
  ids=str,
)
def test_updates_do_not_depend_on_the_mesh(mesh):
  one = _steps(_config({}, **_SGD), 3)
  many = _steps(_config(mesh, **_SGD, **{'train.num_microbatches': 2}), 3)
  for (want, want_state), (got, got_state) in zip(one, many, strict=True):
    _assert_close(got, want)
    _assert_close(got_state.params, want_state.params)


def test_shardings_survive_a_step():
  mesh = {'slice': 2, 'data': 2, 'model': 2}
  config = _config(mesh, **_SGD, **{'train.num_microbatches': 2})
  where, state = _place(config)
  want = train_step.abstract_state(config, where)
  state, _ = _compiled(config)(state, _batch(config, where))
  for x, a in zip(*map(jax.tree.leaves, (state, want)), strict=True):
    assert x.sharding.is_equivalent_to(a.sharding, x.ndim)


_DROPOUT = {
  'model.dropout_rate': 0.2,
  'model.attention': 'reference',
  'optimizer.gradient': 'mean',
  'optimizer.learning_rate': 1e-2,
}


def test_a_bad_step_changes_nothing_and_is_counted():
  config = _config({}, **_DROPOUT)

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


def test_the_same_seed_gives_the_same_bits_and_dropout_follows_the_step():
  config = _config({}, **_DROPOUT)
  first, again = (list(_steps(config, 3)) for _ in range(2))
  assert same(first, again)
  # One batch and the same parameters at another step: other dropout.
  mesh, state = _place(config)
  later = dataclasses.replace(state, step=jnp.int32(1) + state.step)
  _, sums = _compiled(config)(later, _batch(config, mesh))
  assert sums['num_targets'] == first[0][0]['num_targets']
  assert sums['loss'] != first[0][0]['loss']


@pytest.mark.parametrize('gradient', ['sum', _slow('mean')])
def test_the_norm_that_is_clipped_is_of_the_sum_or_of_the_mean(gradient):
  config = _config({}, **_SGD, **{'optimizer.gradient': gradient})
  ((metrics, state),) = _steps(config, 1)
  sums, grads, _ = _gradients(_config({}))
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
  _assert_close(state.params, want)


def test_steps_lower_the_loss_of_a_batch():
  config = _config({}, **_DROPOUT)
  again = lambda step, batch: make_batch(config.model, _LENGTHS, 0)
  losses = [m['loss'] for m, _ in _steps(config, 8, again)]
  assert losses[-1] < 0.8 * losses[0]


def test_a_fresh_state_is_where_it_belongs_and_the_same_on_any_mesh():
  states = []
  for mesh in ({}, {'data': 4, 'model': 2}):
    config = _config(mesh)
    devices = jax.devices()[: _num_devices(config)]
    where = partitioning.make_mesh(config.mesh, devices)
    state = train_step.init_state(config, where)
    abstract = train_step.abstract_state(config, where)
    for x, a in zip(*map(jax.tree.leaves, (state, abstract)), strict=True):
      assert (x.shape, x.dtype, x.sharding) == (a.shape, a.dtype, a.sharding)
    states.append(jax.device_get(state))
  assert same(*states)


def test_targets_are_the_next_tokens_and_padding_weighs_nothing():
  tokens = jnp.array([[0, 0, 0, 5, 6, 7], [1, 2, 3, 4, 5, 6], [0] * 6])
  inputs, targets, weights = train_step.shift(tokens, 3)
  np.testing.assert_array_equal(inputs, tokens[:, :5])
  np.testing.assert_array_equal(targets, [[5, 6, 7], [4, 5, 6], [0, 0, 0]])
  np.testing.assert_array_equal(weights, [[0, 1, 1], [1, 1, 1], [0, 0, 0]])
