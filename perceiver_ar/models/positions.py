"""Position encodings: sinusoidal and rotary.

Both need sines and cosines of position times frequency. A table of them grows
with the longest document (60 % of the published 131k model was one), and a
float32 product loses 0.01 radians at position 131,072. Here a position is
written in digits and its angle is the sum of its digits' angles: four tables of
256 rows, made in float64, serve every int32 position to float32 precision; for
fewer positions two tables do, of the square root of their number. They are
constants of the compiled step, never parameters.

Letters: T positions, E embedding width, R frequencies.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

_MOST = 2**31  # positions, if nothing is said of them
_LONGEST = 2**12  # rows of a table


def unit_circle(
  positions: jax.Array, frequencies_R: np.ndarray, size: int
) -> tuple[jax.Array, jax.Array]:
  """Sines and cosines of positions * frequencies, [..., R] float32 each.

  Args:
    positions: int32, not negative, any shape; others find NaN.
    frequencies_R: radians per position, float64.
    size: of the positions, which are below it; 0: any int32.
  """
  base, num_digits = _digits(size)
  sin, cos = jnp.float32(0), jnp.float32(1)
  for i in range(num_digits):
    is_highest = i == num_digits - 1
    rows = -(-(size or _MOST) // base**i) if is_highest else base
    angles = np.arange(rows)[:, None] * float(base**i) * frequencies_R
    digit = positions // base**i
    if is_highest and size:
      digit = jnp.where(positions < size, digit, rows)
    elif not is_highest:
      digit %= base  # of a negative position, too, from 0 to base - 1
    s, c = (
      jnp.asarray(table, jnp.float32)
      .at[digit]
      .get(
        mode='fill' if is_highest else 'clip',
        fill_value=jnp.nan,
        wrap_negative_indices=False,
      )
      for table in (np.sin(angles), np.cos(angles))
    )
    sin, cos = (s, c) if i == 0 else (sin * c + cos * s, cos * c - sin * s)
  return sin, cos


def _digits(size: int) -> tuple[int, int]:
  """The base in which positions below `size` are written, and their digits."""
  if 0 < size <= _LONGEST**2:
    return math.ceil(math.sqrt(size)), 2
  return 256, 4


def sinusoidal(positions: jax.Array, width: int, size: int) -> jax.Array:
  """All sines, then all cosines, [..., E]; wavelengths from 2 pi to 2e4 pi."""
  half = width // 2
  rates = np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1))
  return jnp.concatenate(unit_circle(positions, rates, size), axis=-1)


def rotary_frequencies(num: int, max_wavelength: int) -> np.ndarray:
  """From 1 down to 1 / max_wavelength, both ends included (as published)."""
  return max_wavelength ** -np.linspace(0.0, 1.0, num)
