"""The TPU kernels, interpreted, compute what `reference` does."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar.errors import UserError
from perceiver_ar.ops import (
  attention,
  flash,
  flash_blocks,
  flash_delta,
  rotation,
)
from perceiver_ar.ops.masks import Mask, visible
from perceiver_ar.ops.rotation import Turn, Turns

# Blocks of 128: three of keys, two of queries, and the last of each is ragged.
_B, _N, _M = 6, 150, 300
_WHOLE, _PREFIX, _LATENTS, _ALL_PADDING, _DROPPED, _GATHERED = range(_B)


@pytest.fixture(autouse=True)
def _small_blocks(monkeypatch):
  monkeypatch.setattr(flash_blocks, '_SIZES', (128,))


def _arrays(H, K, dtype='float32'):
  rng = np.random.default_rng(0)
  return [
    jnp.asarray(rng.normal(size=(_B, size, H, K)), dtype)
    for size in (_N, _M, _M, _N)
  ]


def _mask():
  """A row of the batch for each way to hide keys."""
  rng = np.random.default_rng(1)
  start_B = np.zeros(_B, np.int32)
  start_B[_PREFIX], start_B[_ALL_PADDING] = 140, 2 * _M
  start_B[_LATENTS] = _M - _N // 2  # the first half of the latents see nothing
  kept_BM = np.ones((_B, _M), bool)
  kept_BM[_DROPPED] = rng.random(_M) < 0.5
  slots_BM = np.tile(np.arange(_M, dtype=np.int32), (_B, 1))
  gathered = np.sort(rng.permutation(2 * _M)[:_M])
  slots_BM[_GATHERED] = gathered - _M  # of 2M slots, of which the last is M - 1
  start_B[_GATHERED] = -_M + 20
  return Mask(
    offset=_M - _N,
    start_B=jnp.asarray(start_B),
    kept_BM=jnp.asarray(kept_BM),
    slots_BM=jnp.asarray(slots_BM),
  )


def _turns(pairs):
  rng = np.random.default_rng(2)

  def turn(size):
    angles = rng.uniform(-np.pi, np.pi, (_B, size, pairs)).astype(np.float32)
    return Turn(jnp.sin(angles), jnp.cos(angles))

  return Turns(turn(_N), turn(_M))


def _delta(out, dout):
  K = out.shape[-1]
  return flash_delta.delta(_flat(out), _flat(dout), K, interpret=True)


def _flat(x):
  return x.reshape(*x.shape[:2], -1)


def _forward(q, k, v, mask, turns):
  """Of arrays with an axis for heads."""
  rest = mask, turns, q.shape[-1]
  out, lse = flash.forward(_flat(q), _flat(k), _flat(v), *rest, interpret=True)
  return out.reshape(q.shape), lse


def _backward(q, k, v, mask, turns, lse, delta, dout):
  rest = mask, turns, q.shape[-1], lse, delta, _flat(dout)
  grads = flash.backward(_flat(q), _flat(k), _flat(v), *rest, interpret=True)
  return [g.reshape(x.shape) for g, x in zip(grads, (q, k, v), strict=True)]


@jax.jit
def _flash(q, k, v, dout, mask, turns):
  out, lse = _forward(q, k, v, mask, turns)
  stats = lse, _delta(out, dout)
  return (out, *_backward(q, k, v, mask, turns, *stats, dout)), lse


@jax.jit
def _reference(q, k, v, dout, mask, turns):
  def attend(q, k, v):
    q = rotation.rotate(q, turns.queries, q.shape[2]) * q.shape[-1] ** -0.5
    k = rotation.rotate(k, turns.keys, k.shape[2])
    return attention.reference(q, k, v, mask)

  out, vjp = jax.vjp(attend, q, k, v)
  return out, *vjp(dout)


def _assert_close(got, want, tolerance):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), got, want, strict=True):
    assert a.dtype == b.dtype and a.shape == b.shape, name
    a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
    assert np.isfinite(a).all(), name
    np.testing.assert_allclose(
      a, b, rtol=tolerance, atol=tolerance, err_msg=name
    )


def _compare(H, K, mask, turns, dtype, tolerance):
  arrays = _arrays(H, K, dtype)
  got, lse = _flash(*arrays, mask, turns)
  _assert_close(got, _reference(*arrays, mask, turns), tolerance)
  return got, lse


# Heads that share 128 lanes, all heads in fewer than 128, and wide heads.
@pytest.mark.parametrize(
  ('H', 'K'),
  [
    (2, 8),
    pytest.param(2, 64, marks=pytest.mark.slow),
    pytest.param(4, 32, marks=pytest.mark.slow),
    pytest.param(4, 96, marks=pytest.mark.slow),
    pytest.param(1, 128, marks=pytest.mark.slow),
    pytest.param(1, 256, marks=pytest.mark.slow),
    pytest.param(1, 512, marks=pytest.mark.slow),
    pytest.param(1, 1024, marks=pytest.mark.slow),
  ],
)
def test_it_equals_reference_at_every_head_size(H, K):
  _compare(H, K, _mask(), Turns(), 'float32', 5e-5)


@pytest.mark.parametrize(
  ('H', 'K', 'pairs'),
  [
    (2, 64, 16),
    pytest.param(2, 8, 4, marks=pytest.mark.slow),
    pytest.param(3, 8, 1, marks=pytest.mark.slow),
    pytest.param(4, 96, 12, marks=pytest.mark.slow),
    pytest.param(2, 128, 32, marks=pytest.mark.slow),
    pytest.param(1, 256, 128, marks=pytest.mark.slow),
  ],
)
def test_queries_and_keys_are_rotated_and_their_gradients_back(H, K, pairs):
  _compare(H, K, _mask(), _turns(pairs), 'float32', 5e-5)


@pytest.mark.slow
def test_a_rotation_of_no_channels_is_none():
  arrays, mask = _arrays(2, 8), _mask()
  (got, _), (want, _) = (
    _flash(*arrays, mask, turns) for turns in (_turns(0), Turns())
  )
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_bfloat16_without_padding_is_close_and_stays_bfloat16():
  mask = Mask(offset=_M - _N)
  _compare(1, 128, mask, _turns(32), 'bfloat16', 0.08)


def test_a_query_that_sees_nothing_gets_zeros_and_gives_no_gradient():
  mask = _mask()
  (out, dq, dk, dv), lse = _compare(2, 64, mask, Turns(), 'float32', 5e-5)
  seen = visible(mask, _N, 0, _M)
  assert seen is not None
  blind = ~np.asarray(seen.any(-1))[:, 0]
  assert blind[_LATENTS].sum() == _N // 2 and blind[_ALL_PADDING].all()
  assert not np.asarray(out)[blind].any()
  assert not np.asarray(dq)[blind].any()
  assert not np.asarray(dk)[_ALL_PADDING].any()
  assert not np.asarray(dv)[_ALL_PADDING].any()
  lse_BNH = np.asarray(lse).transpose(0, 2, 1)
  assert (lse_BNH[blind] == np.float32(-1e30)).all()
  assert (np.abs(lse_BNH[~blind]) < 100).all()


@pytest.mark.parametrize(('H', 'K'), [(4, 32), (3, 8), (2, 128)])
def test_inner_products_are_of_each_head(H, K):
  out, _, _, dout = (x[:, :_N] for x in _arrays(H, K))
  want = jnp.einsum('bnhk,bnhk->bhn', out, dout)
  np.testing.assert_allclose(_delta(out, dout), want, rtol=1e-5, atol=1e-5)


def test_hidden_keys_have_exactly_no_influence():
  (q, k, v, dout), mask, turns = _arrays(2, 64), _mask(), _turns(16)
  seen = visible(mask, _N, 0, _M)
  assert seen is not None
  hidden = ~np.asarray(seen.any((1, 2)))[..., None, None]
  other = [jnp.where(hidden, 1e4, x) for x in (k, v)]
  want, _ = _flash(q, k, v, dout, mask, turns)
  got, _ = _flash(q, *other, dout, mask, turns)
  for a, b in zip(got, want, strict=True):
    np.testing.assert_array_equal(a, b)


def test_scores_too_large_for_exp_stay_finite():
  q, k, v, dout = _arrays(2, 64)
  arrays = q * 30, k * 30, v, dout
  got, _ = _flash(*arrays, _mask(), Turns())
  assert all(np.isfinite(x).all() for x in got)
  want = _reference(*arrays, _mask(), Turns())
  np.testing.assert_allclose(got[0], want[0], rtol=1e-2, atol=1e-2)


@jax.jit
def _in_shards(q, k, v, dout, mask):
  """Two shards of keys, each by itself; the partial outputs are merged."""
  cut = lambda x: x.reshape(_B, 2, _M // 2, *x.shape[2:]).swapaxes(0, 1)
  shards = tuple(map(cut, (k, v, mask.kept_BM, mask.slots_BM)))

  def its_mask(kept, slots):
    return dataclasses.replace(mask, kept_BM=kept, slots_BM=slots)

  def forward(shard):
    k, v, *hidden = shard
    return _forward(q, k, v, its_mask(*hidden), Turns())

  def backward(shard):
    k, v, *hidden = shard
    stats = lse, _delta(out, dout)
    return _backward(q, k, v, its_mask(*hidden), Turns(), *stats, dout)

  outs, lses = jax.lax.map(forward, shards)
  lse = jax.nn.logsumexp(lses, axis=0)
  weights = jnp.exp(lses - lse[None]).swapaxes(2, 3)[..., None]
  out = (outs * weights).sum(0)
  dq, dk, dv = jax.lax.map(backward, shards)
  join = lambda x: x.swapaxes(0, 1).reshape(_B, _M, *x.shape[3:])
  return out, dq.sum(0), join(dk), join(dv)


def test_shards_of_keys_merged_by_log_sum_exp_equal_the_whole():
  arrays, mask = _arrays(2, 64), _mask()
  want = _reference(*arrays, mask, Turns())
  _assert_close(_in_shards(*arrays, mask), want, tolerance=5e-5)


def test_more_queries_than_a_core_can_keep_are_refused_in_one_sentence():
  many = jax.ShapeDtypeStruct((1, 2**20, 128), jnp.bfloat16)
  stat = jax.ShapeDtypeStruct((1, 1, 2**20), jnp.float32)

  def gradients(x, lse):
    mask = Mask(offset=0)
    rest = mask, Turns(), 128, lse, lse, x
    return flash.backward(x, x, x, *rest, interpret=True)

  with pytest.raises(UserError, match='1048576 latents with heads of 128'):
    jax.eval_shape(gradients, many, stat)
