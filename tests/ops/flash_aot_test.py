"""The kernels compile for TPUs that are not here, and hold no scores."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from perceiver_ar.ops import attention, flash
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn, Turns
from perceiver_ar.plan import machine

pytest.importorskip('libtpu')

_CHIPS = {'v4': '2x2x1', 'v5e': '2x2', 'v5p': '2x2x1', 'v6e': '2x2'}

# B, N, M, H, K.
_SIZES = {
  'long': (1, 1024, 65536, 16, 128),
  'books': (1, 1024, 2048, 128, 32),
  'music': (1, 2048, 4096, 1, 1024),
  'images': (1, 1024, 12416, 16, 64),
  'latents': (1, 1024, 1024, 16, 64),
  'most latents': (1, 8192, 32768, 8, 128),
  'head size 96': (1, 1024, 2048, 16, 96),
  'odd width': (1, 1024, 2048, 3, 96),
  'tiny': (2, 100, 300, 2, 8),
}


@functools.cache
def _compile(
  chip: str, B: int, N: int, M: int, H: int, K: int, dtype: str, rotated: float
):
  """Forward and backward."""
  device = machine.open_machine(f'{chip}:{_CHIPS[chip]}', 1).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

  def both(q, k, v, dout, start, turns):
    rest = Mask(offset=M - N, start_B=start), turns, K
    out, lse = flash.forward(q, k, v, *rest, interpret=False)
    kernel = attention.Kernel('flash', 1, K, interpret=False)
    stats = lse, attention.delta(out, dout, kernel)
    grads = flash.backward(q, k, v, *rest, *stats, dout, interpret=False)
    return out, *grads

  q, k = (shape((B, size, H * K), jnp.dtype(dtype)) for size in (N, M))
  angles: list[Any] = [
    shape((B, size, int(K * rotated) // 2), jnp.float32) for size in (N, M)
  ]
  turns = Turns(*(Turn(x, x) for x in angles)) if rotated else Turns()
  start = shape((B,), jnp.int32)
  return jax.jit(both).lower(q, k, k, q, start, turns).compile()


@pytest.mark.parametrize('rotated', [0, 0.5])
def test_the_largest_head_fits_the_smallest_memory(rotated):
  _compile('v4', *_SIZES['music'], 'bfloat16', rotated)


@pytest.mark.slow
@pytest.mark.parametrize('chip', _CHIPS)
@pytest.mark.parametrize('name', _SIZES)
def test_it_compiles_for_every_chip(chip, name):
  _compile(chip, *_SIZES[name], 'bfloat16', 0.5)


@pytest.mark.slow
@pytest.mark.parametrize('name', _SIZES)
@pytest.mark.parametrize('rotated', [0, 0.25, 1])
def test_it_compiles_with_any_part_of_a_head_rotated(name, rotated):
  _compile('v4', *_SIZES[name], 'bfloat16', rotated)


@pytest.mark.slow
@pytest.mark.parametrize('name', ['latents', 'tiny'])
@pytest.mark.parametrize('rotated', [0, 0.5])
def test_float32_compiles_too(name, rotated):
  _compile('v4', *_SIZES[name], 'float32', rotated)


@pytest.mark.slow
def test_temporaries_are_no_scores_and_no_copies_of_keys():
  def temporaries(M, rotated):
    compiled: Any = _compile('v5p', 1, 1024, M, 16, 128, 'bfloat16', rotated)
    return compiled.memory_analysis().temp_size_in_bytes

  # A byte for each score would be 1 or 16 GiB, a copy of the keys 0.25 or 4.
  assert temporaries(2**16, 0) < 2**25
  assert temporaries(2**20, 0) < 2**25
  # The table of angles is 0.25 GiB.
  assert temporaries(2**20, 0.5) < 2**29
