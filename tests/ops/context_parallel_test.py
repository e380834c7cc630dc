"""Attention with its keys over devices equals attention with them on one."""

import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType, Mesh, PartitionSpec

from perceiver_ar.ops import attention, context_parallel
from perceiver_ar.ops.attention import Kernel
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn, Turns
from perceiver_ar.plan import collectives
from perceiver_ar.plan.hlo import Module

_B, _N, _M, _H, _K = 8, 8, 24, 2, 4
_CHUNKED = Kernel('chunked', 5, _K, interpret=True)


def _arrays(seed=0):
  rng = np.random.default_rng(seed)
  shapes = [(_B, size, _H * _K) for size in (_N, _M, _M, _N)]
  return [jnp.asarray(rng.normal(size=s), jnp.float32) for s in shapes]


def _mask(names):
  """Whole rows, short ones, one that begins among the latents, and none."""
  rng = np.random.default_rng(1)
  fields, offset = {}, _M - _N
  if 'start' in names:
    fields['start_B'] = jnp.asarray([0, 3, 0, 11, 20, 0, _M, 7], jnp.int32)
  if 'kept' in names:
    fields['kept_BM'] = jnp.asarray(rng.random((_B, _M)) < 0.5)
  if 'slots' in names:
    slots = rng.permuted(np.tile(np.arange(2 * _M), (_B, 1)), axis=1)[:, :_M]
    fields['slots_BM'] = jnp.asarray(np.sort(slots, 1), jnp.int32)
    offset = 2 * _M - _N
  return Mask(offset=offset, **fields)


def _turns():
  rng = np.random.default_rng(2)
  turn = lambda size: Turn(*rng.normal(size=(2, _B, size, 1)).astype('float32'))
  return Turns(turn(_N), turn(_M))


def _gradients(attend, arrays):
  *qkv, dout = arrays
  out, vjp = jax.vjp(attend, *qkv)
  return out, *vjp(dout)


def _assert_close(got, want, **tolerance):
  for name, a, b in zip(('out', 'dq', 'dk', 'dv'), got, want, strict=True):
    assert np.isfinite(a).all(), name
    np.testing.assert_allclose(a, b, **tolerance, err_msg=name)


def _sharded(mask, turns, kernel, dim, num):
  """`context_parallel.attend` on `num` devices, of whole arrays."""
  mesh = Mesh(
    np.array(jax.devices()[: 2 * num]).reshape(2, num),
    ('data', 'context'),
    axis_types=(AxisType.Auto,) * 2,
  )
  queries = [
    PartitionSpec(('data', 'context')),
    PartitionSpec('data', 'context'),
  ][dim]
  keys = PartitionSpec('data', 'context')
  split = context_parallel.Split('context', dim)
  run = jax.jit(
    jax.shard_map(
      lambda q, k, v, mask, turns: context_parallel.attend(
        q, k, v, mask, turns, kernel, split
      ),
      mesh=mesh,
      in_specs=(
        *(queries, keys, keys),
        jax.tree.map(lambda x: PartitionSpec(*keys[: x.ndim]), mask),
        Turns(
          jax.tree.map(lambda _: queries, turns.queries),
          jax.tree.map(lambda _: keys, turns.keys),
        ),
      ),
      out_specs=queries,
      check_vma=False,
    )
  )
  return lambda q, k, v: run(q, k, v, mask, turns)


@pytest.mark.parametrize('names', ['', 'start', 'kept', 'start kept slots'])
@pytest.mark.parametrize(('dim', 'num'), [(0, 4), (1, 4), (0, 2)])
def test_parts_merge_to_the_whole_in_values_and_gradients(names, dim, num):
  arrays, mask, turns = _arrays(), _mask(names), _turns()
  run = _sharded(mask, turns, _CHUNKED, dim, num)
  plain = Kernel('reference', 1, _K, interpret=True)
  want = _gradients(
    lambda q, k, v: attention.attend(q, k, v, mask, turns, plain), arrays
  )
  _assert_close(_gradients(run, arrays), want, rtol=1e-4, atol=1e-5)


def test_a_query_that_sees_nothing_anywhere_gets_zeros():
  run = _sharded(_mask('start'), Turns(), _CHUNKED, 0, 4)
  out, dq, dk, dv = _gradients(run, _arrays())
  for x in (out[6], dq[6], dk[6], dv[6], out[4, :4], dq[4, :4]):
    assert not np.asarray(x).any()


def test_scores_too_large_for_exp_merge_to_the_whole():
  q, k, v, dout = _arrays()
  mask = _mask('start')
  run = _sharded(mask, Turns(), _CHUNKED, 0, 4)
  arrays = (q * 100, k * 100, v, dout)
  plain = Kernel('chunked', 64, _K, interpret=True)
  want = _gradients(
    lambda q, k, v: attention.attend(q, k, v, mask, Turns(), plain), arrays
  )
  _assert_close(_gradients(run, arrays), want, rtol=1e-3, atol=1e-3)


def test_no_key_or_value_crosses_the_axis():
  rng = np.random.default_rng(0)
  M = 4 * _M
  q, k, v = (
    jnp.asarray(rng.normal(size=(_B, n, _H * _K)), jnp.float32)
    for n in (_N, M, M)
  )
  run = _sharded(Mask(offset=M - _N), Turns(), _CHUNKED, 0, 4)
  loss = lambda q, k, v: (run(q, k, v) ** 2).sum()
  compiled = jax.jit(jax.grad(loss, (0, 1, 2))).lower(q, k, v).compile()
  text: Any = compiled.as_text()
  module = Module(text)
  moved = [
    math.prod(array.dims)
    for _, outer, _ in module.runs(1)
    for inner in module.within(outer)
    if collectives.kind_of(inner)
    for array in inner.arrays
  ]
  # Queries of four rows at most, where a device has M / 4 keys of as many.
  assert max(moved) == 4 * _N * _H * _K < 4 * (M // 4) * _H * _K
