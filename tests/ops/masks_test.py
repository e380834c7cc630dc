"""The described mask is the one that the words describe."""

import dataclasses
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar.ops.masks import Mask, visible

_B, _N, _M = 3, 4, 9
_rng = np.random.default_rng(0)
_START = np.array([0, 6, 20], np.int32)
_KEPT = _rng.random((_B, _M)) < 0.6
_SLOTS = np.sort(_rng.permuted(np.tile(np.arange(14), (_B, 1)), axis=1)[:, :_M])


def _brute_force(mask, first, size, causal):
  seen = np.zeros((_B, 1, _N, size), bool)
  for b, n, m in itertools.product(range(_B), range(_N), range(size)):
    slot = first + m if mask.slots_BM is None else mask.slots_BM[b, first + m]
    seen[b, 0, n, m] = (
      (not causal or slot <= n + mask.offset)
      and (mask.start_B is None or slot >= mask.start_B[b])
      and (mask.kept_BM is None or mask.kept_BM[b, first + m])
    )
  return seen


@pytest.mark.parametrize('start', [None, _START])
@pytest.mark.parametrize('kept', [None, _KEPT])
@pytest.mark.parametrize('slots', [None, _SLOTS])
def test_every_block_equals_a_loop_over_its_definition(start, kept, slots):
  arrays = {'start_B': start, 'kept_BM': kept, 'slots_BM': slots}
  described = {
    k: None if v is None else jnp.asarray(v) for k, v in arrays.items()
  }
  for offset in (0, 5, -2):
    mask = Mask(offset=offset, **described)
    plain = Mask(offset=offset, **arrays)
    for (first, size), causal in itertools.product(
      ((0, 9), (3, 4), (8, 1)), (True, False)
    ):
      seen = visible(mask, _N, first, size, causal=causal)
      want = _brute_force(plain, first, size, causal)
      if seen is None:
        assert want.all() and not causal
      else:
        np.testing.assert_array_equal(np.broadcast_to(seen, want.shape), want)


def test_the_drawing_in_the_module_is_true():
  mask = Mask(offset=3, start_B=jnp.array([1, 0]))
  seen = visible(mask, 3, 0, 6)
  assert seen is not None
  rows = [
    ''.join('.#'[int(x)] for x in row) for row in seen[:, 0].reshape(6, 6)
  ]
  assert rows == ['.###..', '.####.', '.#####', '####..', '#####.', '######']


def test_the_first_key_of_a_block_may_be_traced():
  mask = Mask(offset=5, kept_BM=jnp.asarray(_KEPT))
  got = jax.jit(lambda first: visible(mask, _N, first, 4))(jnp.int32(3))
  want = visible(mask, _N, 3, 4)
  assert want is not None
  np.testing.assert_array_equal(got, want)


def test_a_mask_passes_through_jit_with_a_static_offset():
  mask = Mask(offset=5, start_B=jnp.asarray(_START))
  got = jax.jit(lambda m: dataclasses.replace(m, offset=m.offset + 1))(mask)
  assert got.offset == 6 and got.kept_BM is None
  np.testing.assert_array_equal(got.start_B, _START)
