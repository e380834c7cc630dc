"""Schedules at their ends, and optax's own optimizers with our settings."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from tiny import make_config

from perceiver_ar import optimizer as optimizer_lib


def _config(**changes):
  fixed = {'learning_rate': 0.1, 'clip_norm': 0.0} | changes
  return make_config({f'optimizer.{k}': v for k, v in fixed.items()}).optimizer


def _rates(**changes):
  schedule: Any = optimizer_lib.make_schedule(_config(**changes))
  return lambda *steps: [float(schedule(step)) / 0.1 for step in steps]


@pytest.mark.parametrize('shape', ['constant', 'cosine', 'steps', 'rsqrt'])
def test_warm_up_is_linear_from_zero_to_the_full_rate(shape):
  rate = _rates(schedule=shape, warmup_steps=4, decay_start=4, decay_end=100)
  np.testing.assert_allclose(rate(0, 1, 2, 3, 4), [0, 0.25, 0.5, 0.75, 1])


@pytest.mark.parametrize('shape', ['constant', 'cosine', 'steps', 'rsqrt'])
def test_without_warm_up_the_first_step_has_the_full_rate(shape):
  rate = _rates(schedule=shape, warmup_steps=0, decay_start=0, decay_end=100)
  np.testing.assert_allclose(rate(0), [1])


def test_constant_stays():
  np.testing.assert_allclose(_rates()(0, 7, 10**7), [1, 1, 1])


def test_cosine_falls_from_its_start_to_its_fraction_in_the_last_step():
  rate = _rates(
    schedule='cosine',
    warmup_steps=2,
    decay_start=50,
    decay_end=101,
    final_fraction=0.1,
  )
  # Constant, then cosine, half-way at the middle, and never below its end.
  np.testing.assert_allclose(rate(2, 50), [1, 1])
  np.testing.assert_allclose(rate(75), [0.55], rtol=1e-5)
  np.testing.assert_allclose(rate(100, 101, 10**6), [0.1] * 3, rtol=1e-5)
  assert 0.1 < rate(99)[0] < 0.102 and 0.998 < rate(51)[0] < 1
  to_zero = _rates(schedule='cosine', decay_start=0, decay_end=10)
  np.testing.assert_allclose(to_zero(9), [0], atol=1e-7)


def test_steps_fall_tenfold_at_half_four_fifths_and_nineteen_twentieths():
  rate = _rates(schedule='steps', decay_end=100)
  np.testing.assert_allclose(
    rate(0, 49, 50, 79, 80, 94, 95, 200),
    [1, 1, 0.1, 0.1, 0.01, 0.01, 0.001, 0.001],
    rtol=1e-5,
  )


def test_rsqrt_falls_with_the_root_of_the_steps_after_warm_up():
  rate = _rates(schedule='rsqrt', warmup_steps=100)
  np.testing.assert_allclose(
    rate(100, 400, 1000), [1, 0.5, 0.1**0.5], rtol=1e-5
  )


def _params(seed=0):
  rng = np.random.default_rng(seed)
  draw = lambda *shape: jnp.asarray(rng.normal(size=shape), jnp.float32)
  return {
    'layer': {'kernel': draw(3, 130, 140), 'bias': draw(140)},
    'norm': {'scale': draw(5), 'bias': draw(5)},
    'token': draw(6, 5),
  }


def _run(optimizer, num_steps=4):
  params = _params()
  state = optimizer.init(params)
  update = jax.jit(optimizer.update)
  for step in range(num_steps):
    updates, state = update(_params(step + 1), state, params)
    params = optax.apply_updates(params, updates)
  return params


_IS_DECAYED = {
  'layer': {'kernel': True, 'bias': False},
  'norm': {'scale': False, 'bias': False},
  'token': True,
}


@pytest.mark.parametrize(
  ('changes', 'theirs'),
  [
    (
      {'name': 'adam', 'b1': 0.8, 'b2': 0.95, 'eps': 1e-6},
      lambda rate: optax.adam(rate, 0.8, 0.95, 1e-6),
    ),
    (
      {'name': 'adamw', 'weight_decay': 0.1},
      lambda rate: optax.adamw(rate, weight_decay=0.1, mask=_IS_DECAYED),
    ),
    (
      {'name': 'lamb', 'weight_decay': 0.1, 'eps': 1e-6},
      lambda rate: optax.lamb(rate, weight_decay=0.1, mask=_IS_DECAYED),
    ),
    (
      {'name': 'sgd', 'b1': 0.9},
      lambda rate: optax.sgd(rate, 0.9, nesterov=True),
    ),
    ({'name': 'adafactor'}, lambda rate: optax.adafactor(rate)),
    (
      {'name': 'adam', 'clip_norm': 0.5},
      lambda rate: optax.chain(
        optax.clip_by_global_norm(0.5), optax.adam(rate)
      ),
    ),
  ],
)
def test_every_optimizer_is_the_one_of_optax(changes, theirs):
  config = _config(schedule='rsqrt', warmup_steps=2, **changes)
  ours = _run(optimizer_lib.make_optimizer(config))
  want = _run(theirs(optimizer_lib.make_schedule(config)))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6),
    ours,
    want,
  )


@pytest.mark.parametrize('name', ['adam', 'adamw', 'adafactor', 'sgd', 'lamb'])
def test_every_optimizer_goes_down_a_bowl(name):
  config = _config(name=name, learning_rate=0.02)
  optimizer = optimizer_lib.make_optimizer(config)
  loss = lambda p: sum(jnp.square(x).sum() for x in jax.tree.leaves(p))
  params = {'a': {'kernel': jnp.array([[3.0, -2.0]]), 'bias': jnp.array([1.0])}}

  @jax.jit
  def step(params, state):
    updates, state = optimizer.update(jax.grad(loss)(params), state, params)
    return optax.apply_updates(params, updates), state

  state, before = optimizer.init(params), loss(params)
  for _ in range(100):
    params, state = step(params, state)
  assert loss(params) < 0.5 * before


@pytest.mark.parametrize('name', ['adamw', 'lamb', 'adafactor'])
def test_weight_decay_leaves_biases_and_scales_alone(name):
  plain = _run(optimizer_lib.make_optimizer(_config(name=name)), 1)
  config = _config(name=name, weight_decay=0.5)
  decayed = _run(optimizer_lib.make_optimizer(config), 1)
  changed = jax.tree.map(lambda a, b: not np.array_equal(a, b), plain, decayed)
  assert changed == _IS_DECAYED


def test_clipping_bounds_the_norm_and_zero_does_not_clip():
  grads = jax.tree.map(lambda x: 100 * x, _params())
  for clip_norm, norm in ((0.5, 0.5), (0.0, float(optax.tree.norm(grads)))):
    config = _config(name='sgd', b1=0.0, clip_norm=clip_norm)
    # Nesterov's update without momentum is the gradient itself.
    optimizer = optimizer_lib.make_optimizer(
      dataclasses.replace(config, learning_rate=1.0)
    )
    updates, _ = optimizer.update(grads, optimizer.init(grads), grads)
    np.testing.assert_allclose(optax.tree.norm(updates), norm, rtol=1e-5)


def test_second_moments_in_bfloat16_rise_and_fall_like_those_in_float32():
  """Until they rest: for a gradient that is large, small, and as before."""
  grads = [4.0] * 300 + [0.25] * 500 + [1.0] * 300
  found = {}
  for dtype in ('float32', 'bfloat16'):
    config = _config(warmup_steps=0, b2=0.95, variance_dtype=dtype)
    optimizer = optimizer_lib.make_optimizer(config)
    params = {'kernel': jnp.ones((3,))}
    state, update = optimizer.init(params), jax.jit(optimizer.update)
    found[dtype] = []
    for size in grads:
      updates, state = update({'kernel': jnp.full((3,), size)}, state, params)
      found[dtype].append(float(updates['kernel'][0]))
    nu = optax.tree.get(state, 'nu')['kernel']
    assert nu.dtype == jnp.dtype(dtype)
  np.testing.assert_allclose(
    found['bfloat16'], found['float32'], rtol=0.05, atol=0.0
  )
