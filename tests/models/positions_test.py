"""Sines and cosines are exact at any position, and rotations are rotations."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar.models import positions
from perceiver_ar.ops import rotation
from perceiver_ar.ops.rotation import Turn

_FREQUENCIES = positions.rotary_frequencies(5, 8192)


def _spread_positions():
  near = [0, 1, 2, 255, 256, 257, 65535, 65536, 65537, 131072]
  far = [2**24 - 1, 2**24, 2**31 - 2, 2**31 - 1]
  drawn = np.random.default_rng(0).integers(0, 2**31, 500)
  return np.concatenate([near, far, drawn]).astype(np.int32)


def test_unit_circle_equals_float64_at_every_magnitude():
  at = _spread_positions()
  sin, cos = positions.unit_circle(jnp.asarray(at), _FREQUENCIES, 0)
  angles = at[:, None].astype(np.float64) * _FREQUENCIES
  assert sin.dtype == cos.dtype == jnp.float32
  np.testing.assert_allclose(sin, np.sin(angles), rtol=0, atol=1e-6)
  np.testing.assert_allclose(cos, np.cos(angles), rtol=0, atol=1e-6)


@pytest.mark.parametrize('size', [5, 363, 2**17, 2**24])
def test_fewer_positions_need_fewer_digits(size):
  at = np.unique(np.append(_spread_positions() % size, [0, 1, size - 1]))
  found = positions.unit_circle(jnp.asarray(at), _FREQUENCIES, size)
  angles = at[:, None].astype(np.float64) * _FREQUENCIES
  for got, wanted in zip(found, (np.sin(angles), np.cos(angles)), strict=True):
    np.testing.assert_allclose(got, wanted, rtol=0, atol=1e-6)


@pytest.mark.parametrize(
  ('at', 'size'),
  [
    (-1, 0),
    (-(2**24), 0),
    (-1, 100),
    (-100, 100),
    (100, 100),
    (2**30, 100),
    (5, 5),
  ],
)
def test_a_position_that_is_none_gives_nan(at, size):
  for x in positions.unit_circle(jnp.array([3, at]), _FREQUENCIES, size):
    assert np.isfinite(x[0]).all() and np.isnan(x[1]).all()


@pytest.mark.parametrize('width', [4, 10, 16])
def test_sinusoidal_equals_the_published_table(width):
  at, half = np.arange(600), width // 2
  table = np.zeros((600, width))
  for j in range(half):
    frequency = np.exp(-j * np.log(10000.0) / (half - 1))
    table[:, j] = np.sin(at * frequency)
    table[:, half + j] = np.cos(at * frequency)
  got = positions.sinusoidal(jnp.asarray(at), width, 600)
  np.testing.assert_allclose(got, table, rtol=0, atol=1e-6)


def test_rotary_frequencies_include_both_ends_and_fall_geometrically():
  frequencies = positions.rotary_frequencies(7, 8192)
  assert frequencies[0] == 1 and len(frequencies) == 7
  np.testing.assert_allclose(frequencies[-1], 1 / 8192, rtol=1e-12)
  ratios = frequencies[1:] / frequencies[:-1]
  np.testing.assert_allclose(ratios, ratios[0])
  assert positions.rotary_frequencies(1, 8192) == [1]


def _rotated(x_BTHK, at, num_heads):
  turn = Turn(*positions.unit_circle(jnp.asarray(at), _FREQUENCIES, 0))
  return rotation.rotate(x_BTHK, turn, num_heads)


def _vectors(seed):
  x = np.random.default_rng(seed).normal(size=(2, 6, 3, 12))
  return jnp.asarray(x, jnp.float32)


def test_rotation_is_by_the_angle_of_position_times_frequency():
  x, at = np.asarray(_vectors(0)), np.arange(12).reshape(2, 6) * 37
  got = np.asarray(_rotated(jnp.asarray(x), at, 3))
  R = len(_FREQUENCIES)
  turned = x[..., :R] + 1j * x[..., R : 2 * R]
  turned = turned * np.exp(1j * at[..., None, None] * _FREQUENCIES)
  want = np.concatenate([turned.real, turned.imag, x[..., 2 * R :]], -1)
  np.testing.assert_allclose(got, want, rtol=0, atol=2e-6)


def test_rotation_keeps_norms_and_the_other_heads_and_channels():
  x = _vectors(0)
  got = _rotated(x, np.arange(12).reshape(2, 6) * 1000, 2)
  norm = lambda x: np.linalg.norm(np.asarray(x), axis=-1)
  np.testing.assert_allclose(norm(got), norm(x), rtol=1e-6)
  np.testing.assert_array_equal(got[:, :, 2], x[:, :, 2])
  np.testing.assert_array_equal(got[..., 10:], x[..., 10:])
  assert (np.abs(got - x)[:, 1:, :2, :10] > 0).mean() > 0.99


@pytest.mark.parametrize('shift', [1, 1000, 2**23])
def test_scores_of_rotated_vectors_depend_on_differences_only(shift):
  q, k = _vectors(0), _vectors(1)
  at = np.random.default_rng(2).integers(0, 5000, (2, 6))

  def scores(at):
    q_at, k_at = _rotated(q, at, 3), _rotated(k, at, 3)
    return jnp.einsum('bnhk,bmhk->bhnm', q_at, k_at)

  np.testing.assert_allclose(scores(at), scores(at + shift), atol=2e-5)


def test_nothing_is_rotated_without_frequencies_or_heads():
  x, at = _vectors(0), jnp.arange(6)[None]
  no_frequencies = positions.rotary_frequencies(0, 8192)
  none = Turn(*positions.unit_circle(at, no_frequencies, 0))
  assert rotation.rotate(x, none, 3) is x
  some = Turn(*positions.unit_circle(at, _FREQUENCIES, 0))
  assert rotation.rotate(x, some, 0) is x
  assert rotation.rotate(x, None, 3) is x


def test_the_type_of_the_vectors_is_kept():
  x = _vectors(0).astype(jnp.bfloat16)
  assert _rotated(x, np.arange(6)[None], 3).dtype == jnp.bfloat16


def test_no_table_grows_with_the_positions():
  at = jax.ShapeDtypeStruct((2**16,), jnp.int32)
  jaxpr = jax.make_jaxpr(lambda p: positions.unit_circle(p, _FREQUENCIES, 0))(
    at
  )
  sizes = [np.size(c) for c in jaxpr.consts]
  assert max(sizes, default=0) <= 256 * len(_FREQUENCIES)
