"""What saves memory or work leaves losses and gradients as they are."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from steps import LENGTHS, assert_close, config_on, gradients, place
from tiny import make_batch, make_config

from perceiver_ar import partitioning, train_step
from perceiver_ar.errors import UserError
from perceiver_ar.models import tables

_PLAIN = {'model.token_table': 'never'}
_MESH = {'data': 2, 'context': 2, 'model': 2}


@pytest.mark.parametrize(
  ('mesh', 'changes'),
  [
    pytest.param({}, {'model.token_table': 'always'}, marks=pytest.mark.slow),
    pytest.param(
      _MESH, {'model.token_table': 'always'}, marks=pytest.mark.slow
    ),
    pytest.param(
      _MESH,
      {'model.token_table': 'always', 'train.num_microbatches': 2},
      marks=pytest.mark.slow,
    ),
    ({}, {'model.logits_block': 3}),
    # Half as many rows as devices: these split a row's latents.
    pytest.param(
      {'context': 8},
      {'model.logits_block': 1, 'train.num_microbatches': 2},
      marks=pytest.mark.slow,
    ),
    (_MESH, {'model.logits_block': 2}),
    pytest.param({}, {'model.remat': 'attention'}, marks=pytest.mark.slow),
    ({}, {'model.remat': 'offload'}),
    pytest.param(
      _MESH,
      {'model.remat': 'offload', 'train.num_microbatches': 2},
      marks=pytest.mark.slow,
    ),
  ],
  ids=str,
)
def test_gradients_stay_as_they_are(mesh, changes):
  sums, grads, _ = gradients(config_on(mesh, **_PLAIN | changes))
  plain_sums, plain_grads, _ = gradients(config_on({}, **_PLAIN))
  assert_close(sums, plain_sums)
  assert_close(grads, plain_grads)


def test_a_table_computes_keys_and_values_once_per_token():
  has = {}
  for choice in ('always', 'never'):
    config = config_on({}, **{'model.token_table': choice})
    _, _, has[choice] = gradients(config)
  projection = lambda rows: f'tensor<{rows}x16xf32>, tensor<16x16xf32>'
  assert projection('1x31') in has['always']
  assert projection('8x24') not in has['always']
  assert projection('8x24') in has['never']


def test_gradients_of_a_frequent_token_are_summed_in_float32():
  ids = jnp.full((4, 1000), 1, jnp.int32)
  table = jnp.zeros((3, 2), jnp.bfloat16)
  found = jax.grad(lambda x: tables.rows(x, ids).astype(jnp.float32).sum())(
    table
  )
  np.testing.assert_allclose(found[1].astype(jnp.float32), 4000, rtol=0.01)
  assert not found[0].any() and found.dtype == jnp.bfloat16


@pytest.mark.slow
def test_auto_takes_the_table_where_a_device_has_more_inputs_than_tokens():
  # 8 rows of 24 inputs, against 31 tokens.
  for mesh, choice in (({}, 'always'), ({'data': 4}, 'always')):
    _, _, text = gradients(config_on(mesh))
    _, _, same = gradients(config_on(mesh, **{'model.token_table': choice}))
    assert text == same
  _, _, text = gradients(config_on({'data': 8}))
  _, _, same = gradients(config_on({'data': 8}, **_PLAIN))
  assert text == same


def test_a_table_needs_embeddings_without_positions():
  with pytest.raises(UserError) as error:
    make_config(
      {'model.position_encoding': 'sinusoidal', 'model.token_table': 'always'}
    )
  assert 'model.token_table' in str(error.value)
  assert 'sinusoidal' in str(error.value)


def _after_a_step(changes):
  config = config_on({}, **{'optimizer.learning_rate': 0.01} | changes)
  mesh, state = place(config)
  batch = make_batch(config.model, LENGTHS)
  step = train_step.make_train_step(config, mesh)
  for _ in range(2):
    state, _ = step(
      state, partitioning.global_batch(batch, mesh, len(batch['tokens']))
    )
  return state


@pytest.mark.slow
def test_moments_in_host_memory_give_the_same_bits():
  here, away = (
    _after_a_step({'optimizer.offload': offload}) for offload in (False, True)
  )
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.opt_state)}
  assert kinds == {'pinned_host'}
  kinds = {x.sharding.memory_kind for x in jax.tree.leaves(away.params)}
  assert kinds == {'device'}
  for a, b in zip(*map(jax.tree.leaves, (here, away)), strict=True):
    np.testing.assert_array_equal(a, b)


@pytest.mark.slow
def test_types_of_parameters_and_moments_are_what_the_config_says():
  types = ('model.param', 'optimizer.momentum', 'optimizer.variance')
  state = _after_a_step(
    {f'{name}_dtype': 'bfloat16' for name in types} | {'optimizer.b2': 0.95}
  )
  assert {x.dtype for x in jax.tree.leaves(state.params)} == {
    jnp.dtype('bfloat16')
  }
  adam = state.opt_state[1]
  for moments in (adam.mu, adam.nu):
    assert {x.dtype for x in jax.tree.leaves(moments)} == {
      jnp.dtype('bfloat16')
    }
  plain = _after_a_step({'optimizer.b2': 0.95})
  for a, b in zip(
    *(jax.tree.leaves(s.params) for s in (state, plain)), strict=True
  ):
    np.testing.assert_allclose(
      np.asarray(a, np.float32), b, rtol=0.02, atol=0.02
    )


def test_second_moments_are_float32_whatever_the_others_are():
  """Squares of gradients decay too slowly for eight bits, with the usual b2."""
  types = {'model.param_dtype': 'bfloat16'}
  types['optimizer.momentum_dtype'] = 'bfloat16'
  config = make_config(types)
  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  adam = train_step.abstract_state(config, mesh).opt_state[1]
  for moments, dtype in ((adam.mu, 'bfloat16'), (adam.nu, 'float32')):
    assert {x.dtype for x in jax.tree.leaves(moments)} == {jnp.dtype(dtype)}
