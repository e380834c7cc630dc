"""Every implementation of attention computes what `reference` does."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar.ops import attention
from perceiver_ar.ops.masks import Mask, visible
from perceiver_ar.ops.rotation import Turns

_B, _H, _K = 3, 2, 4

# N, M, block: not divisible, block > M, one query, N = M, M = N + 1, divisible.
_SIZES = [
  (4, 13, 5),
  (4, 13, 64),
  (1, 13, 4),
  (7, 7, 3),
  (6, 7, 2),
  (5, 16, 4),
]


def _arrays(N, M, dtype='float32', seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(_B, size, _H * _K) for size in (N, M, M, N)]
  return [jnp.asarray(rng.normal(size=s), dtype) for s in shapes]


def _mask(N, M, names):
  """The first row is whole, the second padded, the third is all padding."""
  rng = np.random.default_rng(1)
  offset, fields = M - N, {}
  if 'slots' in names:
    # M of the 2M slots, so that the offset of the last N slots is 2M - N.
    slots = rng.permuted(np.tile(np.arange(2 * M), (_B, 1)), axis=1)[:, :M]
    offset = 2 * M - N
    fields['slots_BM'] = jnp.asarray(np.sort(slots, 1), jnp.int32)
  if 'start' in names:
    last = 2 * M if 'slots' in names else M
    # Inside the latents: the first of them see nothing.
    fields['start_B'] = jnp.asarray([0, offset + N // 2, last], jnp.int32)
  if 'kept' in names:
    fields['kept_BM'] = jnp.asarray(rng.random((_B, M)) < 0.5)
  return Mask(offset=offset, **fields)


@functools.partial(jax.jit, static_argnames=('implementation', 'block'))
def _run(q, k, v, dout, mask, implementation, block):
  """Values, and the gradients of <dout, values>."""

  kernel = attention.Kernel(implementation, block, _K, interpret=True)

  def attend(q, k, v):
    return attention.attend(q, k, v, mask, Turns(), kernel)

  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(dout)


def _compare(N, M, block, names, dtype, **tolerance):
  arrays, mask = _arrays(N, M, dtype), _mask(N, M, names)
  got = _run(*arrays, mask, 'chunked', block)
  want = _run(*arrays, mask, 'reference', block)
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), got, want, strict=True):
    assert a.dtype == b.dtype == jnp.dtype(dtype)
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.isfinite(a).all(), name
    np.testing.assert_allclose(a, b, **tolerance, err_msg=name)
  return got, mask


@pytest.mark.parametrize(('N', 'M', 'block'), _SIZES)
@pytest.mark.parametrize('names', ['', 'start kept slots'])
def test_chunked_equals_reference_in_values_and_gradients(N, M, block, names):
  _compare(N, M, block, names, 'float32', rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('names', ['start', 'kept', 'slots', 'start kept'])
def test_chunked_equals_reference_with_each_kind_of_mask(names):
  _compare(4, 13, 5, names, 'float32', rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize('names', ['', 'start kept'])
def test_bfloat16_is_close_and_stays_bfloat16(names):
  _compare(4, 13, 5, names, 'bfloat16', rtol=0.05, atol=0.08)


@pytest.mark.parametrize('implementation', ['chunked', 'reference'])
def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient(
  implementation,
):
  N, M = 4, 13
  q, k, v, dout = _arrays(N, M)
  mask = _mask(N, M, 'start')
  out, dq, dk, dv = _run(q, k, v, dout, mask, implementation, 5)
  seen = visible(mask, N, 0, M)
  assert seen is not None
  blind = ~np.asarray(seen.any(-1))[:, 0]
  assert blind.sum() == N // 2 + N
  assert not np.asarray(out)[blind].any()
  assert not np.asarray(dq)[blind].any()
  assert not np.asarray(dk)[2].any() and not np.asarray(dv)[2].any()


@pytest.mark.parametrize('implementation', ['chunked', 'reference'])
def test_hidden_keys_have_exactly_no_influence(implementation):
  N, M = 4, 13
  q, k, v, dout = _arrays(N, M)
  mask = _mask(N, M, 'start kept')
  seen = visible(mask, N, 0, M)
  assert seen is not None
  hidden = ~np.asarray(seen.any((1, 2)))[..., None]
  other = [jnp.where(hidden, 1e4, x) for x in (k, v)]
  want = _run(q, k, v, dout, mask, implementation, 5)
  got = _run(q, *other, dout, mask, implementation, 5)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_scores_too_large_for_exp_stay_finite():
  q, k, v, dout = _arrays(4, 13)
  mask = _mask(4, 13, 'start')
  got = _run(q * 100, k * 100, v, dout, mask, 'chunked', 5)
  want = _run(q * 100, k * 100, v, dout, mask, 'reference', 5)
  for a, b in zip(got, want, strict=True):
    assert np.isfinite(a).all()
    np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-3)


@functools.cache
def _temporaries(M, backward):
  """Bytes of temporaries at N=1,024 with 8 heads of 64; nothing is run."""
  shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.float32)
  q, kv = shape((1, 1024, 512)), shape((1, M, 512))

  def forward(q, k, v, start):
    mask = Mask(offset=M - 1024, start_B=start)
    kernel = attention.Kernel('chunked', 1024, 64, interpret=False)
    return attention.attend(q, k, v, mask, Turns(), kernel)

  def gradients(q, k, v, start):
    loss = lambda q, k, v: forward(q, k, v, start).sum()
    return jax.grad(loss, (0, 1, 2))(q, k, v)

  start = jax.ShapeDtypeStruct((1,), jnp.int32)
  lowered = jax.jit(gradients if backward else forward).lower(q, kv, kv, start)
  memory: Any = lowered.compile().memory_analysis()
  return memory.temp_size_in_bytes


@pytest.mark.parametrize('backward', [False, True])
def test_chunked_never_holds_scores_of_all_keys(backward):
  # All scores would take 4 GiB. Keys and values are arguments, not temporaries.
  at_once, twice = (_temporaries(M, backward) for M in (2**17, 2**18))
  assert at_once < 2**30
  assert twice < 1.05 * at_once
