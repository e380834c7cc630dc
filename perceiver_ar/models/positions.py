"""Position encodings: sinusoidal and rotary.

Both need sines and cosines of position times frequency. A table of them grows
with the longest document (60 % of the published 131k model was one), and a
float32 product loses 0.01 radians at position 131,072. Here a position is
written in base 256 and its angle is the sum of its digits' angles, so four
tables of 256 rows, made in float64, serve every int32 position to float32
precision. They are constants of the compiled step, never parameters.

Letters: T positions, E embedding width, R frequencies.
"""

import jax
import jax.numpy as jnp
import numpy as np

_BASE = 256
_NUM_DIGITS = 4


def unit_circle(
  positions: jax.Array, frequencies_R: np.ndarray
) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines of positions * frequencies, [..., R] float32 each.

  Args:
    positions: int32, not negative, any shape.
    frequencies_R: radians per position, float64.
  """
  digits = np.arange(_BASE, dtype=np.float64)[:, None]
  sin, cos = jnp.float32(0), jnp.float32(1)
  for i in range(_NUM_DIGITS):
    angles = digits * _BASE**i * frequencies_R
    digit = positions // _BASE**i
    if i < _NUM_DIGITS - 1:
      digit %= _BASE
    # The highest digit of a negative position finds NaN.
    look_up = lambda x, digit=digit: (
      jnp.asarray(x, jnp.float32)
      .at[digit]
      .get(mode='fill', fill_value=jnp.nan, wrap_negative_indices=False)
    )
    s, c = look_up(np.sin(angles)), look_up(np.cos(angles))
    sin, cos = (s, c) if i == 0 else (sin * c + cos * s, cos * c - sin * s)
  return sin, cos


def sinusoidal(positions: jax.Array, width: int) -> jax.Array:
  """All sines, then all cosines, [..., E]; wavelengths from 2 pi to 2e4 pi."""
  half = width // 2
  rates = np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1))
  return jnp.concatenate(unit_circle(positions, rates), axis=-1)


def rotary_frequencies(num: int, max_wavelength: int) -> np.ndarray:
  """From 1 down to 1 / max_wavelength, both ends included (as published)."""
  return max_wavelength ** -np.linspace(0.0, 1.0, num)
