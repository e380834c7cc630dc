"""The blocks by themselves."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar.models import layers


def _plain(x):
  return jnp.square(jax.nn.relu(x))


def test_squared_relu_has_the_values_and_gradients_of_its_definition():
  x = jnp.asarray([-3.0, -1e-30, 0.0, 1e-30, 0.5, 7.0])
  got, got_vjp = jax.vjp(layers.squared_relu, x)
  want, want_vjp = jax.vjp(_plain, x)
  np.testing.assert_array_equal(got, want)
  np.testing.assert_array_equal(got_vjp(x)[0], want_vjp(x)[0])


def test_squared_relu_keeps_no_signs_for_the_backward_pass():
  def backward(function):
    gradient = jax.grad(lambda x: function(x).sum())
    return str(jax.make_jaxpr(gradient)(jnp.ones(3)))

  assert 'bool' in backward(_plain)
  assert 'bool' not in backward(layers.squared_relu)


@pytest.mark.parametrize('dtype', ['float32', 'bfloat16'])
def test_the_gradient_of_a_bias_is_the_sum_of_all_rows(dtype):
  rng = np.random.default_rng(0)
  y, dy = (jnp.asarray(rng.normal(size=(3, 200, 8)), dtype) for _ in range(2))
  bias = jnp.arange(8, dtype=dtype)
  got, vjp = jax.vjp(layers.add_bias, y, bias)
  np.testing.assert_array_equal(got, y + bias[None, None])
  d_y, d_bias = vjp(dy)
  np.testing.assert_array_equal(d_y, dy)
  want = np.asarray(dy, np.float64).sum((0, 1))
  assert d_bias.dtype == dtype
  np.testing.assert_allclose(
    np.asarray(d_bias, np.float64), want, rtol=0.01, atol=1e-5
  )


def test_dropout_keeps_so_many_and_the_mean_and_rows_draw_by_their_number():
  x = jnp.ones((4, 100, 100))
  run = lambda rows: layers.Dropout(0.3).apply(
    {}, x, jnp.asarray(rows), rngs={'dropout': jax.random.key(0)}
  )
  out = np.asarray(run([0, 1, 2, 1]))
  assert abs((out == 0).mean() - 0.3) < 0.01
  np.testing.assert_allclose(out[out != 0], 1 / 0.7, rtol=1e-6)
  np.testing.assert_array_equal(out[1], out[3])
  assert (out[0] != out[1]).any() and (out[1] != out[2]).any()
