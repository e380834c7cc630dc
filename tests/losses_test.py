"""The loss is its formula in float64, and so is its gradient."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import scipy.special
from tiny import make_batch, make_config

from perceiver_ar import gradients, losses, parameters

_V = 7


def _draw(scale=2.0):
  rng = np.random.default_rng(0)
  logits = (rng.normal(size=(2, 5, _V)) * scale).astype(np.float32)
  return logits, rng.integers(0, _V, (2, 5))


def _loss(logits, targets, z_loss=0.0, label_smoothing=0.0):
  return losses.softmax_cross_entropy(
    jnp.asarray(logits, jnp.float32),
    jnp.asarray(targets),
    z_loss=z_loss,
    label_smoothing=label_smoothing,
  )


@pytest.mark.parametrize('scale', [2.0, 100.0])
@pytest.mark.parametrize('smoothing', [0.0, 0.1, 0.6])
def test_it_equals_the_formula_in_float64(scale, smoothing):
  logits, targets = _draw(scale)
  exact = logits.astype(np.float64)
  log_z = np.log(np.exp(exact).sum(-1))
  label = np.full((2, 5, _V), smoothing / (_V - 1))
  np.put_along_axis(label, targets[..., None], 1 - smoothing, -1)
  loss = -(label * (exact - log_z[..., None])).sum(-1)
  loss += scipy.special.xlogy(label, label).sum(-1)
  got, got_z = _loss(logits, targets, 1e-3, smoothing)
  np.testing.assert_allclose(got, loss, rtol=2e-5, atol=1e-5)
  np.testing.assert_allclose(got_z, 1e-3 * log_z**2, rtol=1e-5, atol=1e-7)


def test_the_gradient_is_the_published_one():
  logits, targets = _draw()
  z_loss = 0.01
  got = jax.grad(lambda x: sum(x.sum() for x in _loss(x, targets, z_loss)))(
    jnp.asarray(logits)
  )
  log_z = np.log(np.exp(logits.astype(np.float64)).sum(-1, keepdims=True))
  onehot = np.eye(_V)[targets]
  want = (1 + 2 * z_loss * log_z) * scipy.special.softmax(logits, -1) - onehot
  np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def test_the_prediction_that_equals_its_smoothed_label_costs_nothing():
  targets = np.arange(_V)[None]
  for smoothing in (0.0, 0.1):
    label = np.full((_V, _V), smoothing / (_V - 1)) + 1e-30
    np.fill_diagonal(label, 1 - smoothing)
    loss, _ = _loss(np.log(label)[None], targets, 0.0, smoothing)
    np.testing.assert_allclose(loss, 0, atol=1e-6)


def test_other_types_than_float32_are_refused():
  logits = jnp.zeros((1, 1, _V), jnp.bfloat16)
  with pytest.raises(AssertionError):
    losses.softmax_cross_entropy(
      logits, jnp.zeros((1, 1), jnp.int32), z_loss=0.0, label_smoothing=0.0
    )


def test_a_fresh_model_is_at_the_logarithm_of_its_vocabulary():
  config = make_config({'model.attention': 'reference'})
  batch = make_batch(config.model, [24, 24, 9, 0])

  @jax.jit
  def first(key, batch):
    params = parameters.initial(config.model, key)
    rows = batch | {'row': jnp.arange(4)}
    return gradients._loss_sum(params, rows, key, config)[1]

  sums = first(jax.random.key(0), batch)
  # Eight latents of every row that has as many tokens, none of padding.
  assert sums['num_targets'] == 3 * 8
  np.testing.assert_allclose(sums['loss'] / 24, np.log(31), rtol=1e-6)
  np.testing.assert_allclose(
    sums['z_loss'] / 24, 1e-4 * np.log(31) ** 2, rtol=1e-5
  )
