"""Layer normalisation that goes over its input as seldom as it can.

Of long inputs it is the largest thing outside of matmuls and attention. On TPU
XLA makes five passes of the usual formula and its gradient, one for each sum;
here two sums are one pass, and there are three. (Where matmuls are around, as
in the layers, XLA sums in them, and the usual formula costs less.)

Letters: B batch, T positions, D width.
"""

import functools

import jax
import jax.numpy as jnp


@functools.partial(jax.custom_vjp, nondiff_argnums=(3, 4))
def layer_norm(
  x_BTD: jax.Array,
  scale_D: jax.Array,
  offset_D: jax.Array,
  epsilon: float,
  dtype: str,
) -> jax.Array:
  """Zero mean and unit variance of the last axis, scaled and offset.

  Ba et al. 2016, with moments in float32.

  Args:
    x_BTD: of any float type.
    scale_D: what the result is multiplied with.
    offset_D: what is added then.
    epsilon: added to the variance.
    dtype: of the result.
  """
  return _forward(x_BTD, scale_D, offset_D, epsilon, dtype)[0]


def _sums(*terms: jax.Array) -> list[jax.Array]:
  """Of the last axis, of all terms in one pass."""
  zeros = (jnp.float32(0),) * len(terms)
  add = lambda a, b: tuple(x + y for x, y in zip(a, b, strict=True))
  sums = jax.lax.reduce(terms, zeros, add, (2,))
  return [x[..., None] for x in sums]


def _forward(
  x_BTD: jax.Array,
  scale_D: jax.Array,
  offset_D: jax.Array,
  epsilon: float,
  dtype: str,
) -> tuple[jax.Array, tuple[jax.Array, ...]]:
  kept_BTD, D = x_BTD, x_BTD.shape[-1]
  x_BTD = x_BTD.astype(jnp.float32)
  sum_BT1, sum_of_squares_BT1 = _sums(x_BTD, x_BTD * x_BTD)
  mean_BT1 = sum_BT1 / D
  # Rounding can make it negative where all of a row is the same.
  variance_BT1 = jnp.maximum(0, sum_of_squares_BT1 / D - mean_BT1**2)
  inverse_BT1 = jax.lax.rsqrt(variance_BT1 + epsilon)
  y_BTD = (x_BTD - mean_BT1) * (inverse_BT1 * scale_D[None, None])
  y_BTD += offset_D[None, None]
  return y_BTD.astype(dtype), (kept_BTD, scale_D, mean_BT1, inverse_BT1)


def _backward(
  epsilon: float,
  dtype: str,
  kept: tuple[jax.Array, ...],
  d_BTD: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  del epsilon, dtype
  x_BTD, scale_D, mean_BT1, inverse_BT1 = kept
  D = x_BTD.shape[-1]
  d_BTD = d_BTD.astype(jnp.float32)
  normal_BTD = (x_BTD.astype(jnp.float32) - mean_BT1) * inverse_BT1
  scaled_BTD = d_BTD * scale_D[None, None]
  sum_BT1, projection_BT1 = _sums(scaled_BTD, scaled_BTD * normal_BTD)
  along_BTD = (sum_BT1 + normal_BTD * projection_BT1) / D
  d_x_BTD = (scaled_BTD - along_BTD) * inverse_BT1
  return (
    d_x_BTD.astype(x_BTD.dtype),
    (d_BTD * normal_BTD).sum((0, 1)).astype(scale_D.dtype),
    d_BTD.sum((0, 1)).astype(scale_D.dtype),
  )


layer_norm.defvjp(_forward, _backward)
