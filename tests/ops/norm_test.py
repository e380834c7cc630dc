"""Layer normalisation is flax's, values and gradients."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn

from perceiver_ar.ops import norm


def _arrays(dtype):
  draw = np.random.default_rng(0).normal
  x_BTD = jnp.asarray(3 + 2 * draw(size=(3, 7, 24)), dtype)
  return x_BTD, jnp.asarray(draw(size=24)), jnp.asarray(draw(size=24))


def _value_and_gradients(function, x_BTD, scale_D, offset_D):
  weight_BTD = np.random.default_rng(1).normal(size=x_BTD.shape)

  def loss(*args):
    y_BTD = function(*args)
    return (y_BTD * weight_BTD).sum(), y_BTD

  (_, y_BTD), gradients = jax.value_and_grad(loss, (0, 1, 2), has_aux=True)(
    x_BTD, scale_D, offset_D
  )
  return y_BTD, *gradients


@pytest.mark.parametrize('dtype_in', ['float32', 'bfloat16'])
@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_it_equals_flax(dtype_in, dtype):
  def flax(x_BTD, scale_D, offset_D):
    params = {'params': {'scale': scale_D, 'bias': offset_D}}
    return nn.LayerNorm(epsilon=1e-5, dtype=dtype).apply(params, x_BTD)

  def ours(x_BTD, scale_D, offset_D):
    return norm.layer_norm(x_BTD, scale_D, offset_D, 1e-5, dtype)

  arrays = _arrays(dtype_in)
  wanted = _value_and_gradients(flax, *arrays)
  for got, want in zip(
    _value_and_gradients(ours, *arrays), wanted, strict=True
  ):
    assert got.dtype == want.dtype
    rounded = 2**-7 if got.dtype == jnp.bfloat16 else 1e-6
    got, want = np.float32(got), np.float32(want)
    limit = rounded * np.abs(want).max()
    np.testing.assert_allclose(got, want, rtol=0, atol=limit)


def test_a_row_of_one_value_has_finite_gradients():
  x_BTD, scale_D, offset_D = _arrays('float32')
  flat_BTD = jnp.full_like(x_BTD, 1e4 / 3)
  ours = lambda *args: norm.layer_norm(*args, 1e-5, 'float32')
  for x in _value_and_gradients(ours, flat_BTD, scale_D, offset_D):
    assert np.isfinite(x).all()


def test_sums_of_a_pass_are_made_together():
  """What the module is for: a sum alone would be a pass of its own."""
  x_BTD, scale_D, offset_D = _arrays('float32')
  ours = lambda *args: norm.layer_norm(*args, 1e-5, 'float32')
  text = str(
    jax.make_jaxpr(lambda *args: jax.vjp(ours, *args)[1](args[0]))(
      x_BTD, scale_D, offset_D
    )
  )
  assert text.count(' reduce[') == 2  # of rows: forward and back
  assert text.count(' reduce_sum[') == 2  # of scale and offset
