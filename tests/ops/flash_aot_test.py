"""The kernels compile for TPUs that are not here, and hold no scores."""

import functools
import os
from typing import Any

import jax
import jax.numpy as jnp
import pytest

from perceiver_ar.ops import flash
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn
from perceiver_ar.plan import machine

pytest.importorskip('libtpu')

# Nobody holds a TPU here, so processes may share the compiler.
os.environ.setdefault('ALLOW_MULTIPLE_LIBTPU_LOAD', '1')

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
  """Forward and backward, of arrays in which heads share the last axis."""
  device = machine.open_machine(f'{chip}:{_CHIPS[chip]}', 1).devices[0]
  sharding = jax.sharding.SingleDeviceSharding(device)
  shape = functools.partial(jax.ShapeDtypeStruct, sharding=sharding)

  def both(q, k, v, dout, start, turn):
    q, k, v, dout = (x.reshape(*x.shape[:2], H, K) for x in (q, k, v, dout))
    mask = Mask(offset=M - N, start_B=start)
    out, lse = flash.forward(q, k, v, mask, turn, interpret=False)
    delta = (out * dout).sum(-1, dtype=jnp.float32).transpose(0, 2, 1)
    stats = lse, delta
    grads = flash.backward(q, k, v, mask, turn, *stats, dout, interpret=False)
    return [x.reshape(*x.shape[:2], H * K) for x in (out, *grads)]

  q, k = (shape((B, size, H * K), jnp.dtype(dtype)) for size in (N, M))
  angle: Any = shape((B, M, int(K * rotated) // 2), jnp.float32)
  turn = Turn(angle, angle) if rotated else None
  start = shape((B,), jnp.int32)
  return jax.jit(both).lower(q, k, k, q, start, turn).compile()


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
  # The table of angles is 0.5 GiB.
  assert temporaries(2**20, 0.5) < 2**30
