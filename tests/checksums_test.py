"""Any other bits have another sum, and the mesh does not matter."""

import jax.numpy as jnp
import numpy as np
import pytest
from states import make_mesh, make_state

from perceiver_ar import checksums


def test_checksums_do_not_depend_on_the_mesh():
  states = [make_state(3, make_mesh(*s)) for s in [(4, 2), (2, 4), (1, 1)]]
  first, *others = [checksums.checksums(state) for state in states]
  assert all(other == first for other in others)
  names = {'step', 'params/layers/scale', 'opt_state/1/0/mu/embed/table'}
  assert names < set(first)


@pytest.mark.parametrize(
  'dtype', ['float32', 'bfloat16', 'int32', 'uint32', 'int8']
)
def test_checksums_see_every_flipped_bit(dtype):
  x = jnp.arange(12).astype(dtype).reshape(3, 4)
  width = 8 * x.dtype.itemsize
  as_uint = np.asarray(x).view(f'uint{width}')
  found = {checksums.checksums([x])['0']}
  for bit in range(width):
    for index in [(0, 0), (1, 2), (2, 3)]:
      flipped = as_uint.copy()
      flipped[index] ^= as_uint.dtype.type(1 << bit)
      found.add(checksums.checksums([flipped.view(x.dtype)])['0'])
  assert len(found) == 1 + 3 * width


def test_checksums_see_moved_elements_and_pairs_of_flipped_signs():
  x = jnp.arange(1.0, 65.0).reshape(8, 8)
  variants = [
    x,
    x.T,
    -x,
    x[::-1],
    x.at[0, 0].multiply(-1).at[5, 5].multiply(-1),
  ]
  swapped = x.at[0, 0].set(x[7, 7]).at[7, 7].set(x[0, 0])
  found = {checksums.checksums([v])['0'] for v in [*variants, swapped]}
  assert len(found) == 6


def test_checksums_tell_booleans_and_scalars_apart():
  values = [jnp.array(v) for v in (True, False)] + [jnp.int32(5), jnp.int32(6)]
  assert len(set(checksums.checksums(values).values())) == 4
  assert checksums.checksums({}) == {}
