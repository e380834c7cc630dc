"""The blocks by themselves."""

import jax
import jax.numpy as jnp
import numpy as np

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
