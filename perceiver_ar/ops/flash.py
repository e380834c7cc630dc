"""Flash attention on TPUs for few queries and very many keys.

Perceiver AR attends N latents (hundreds or thousands) to M inputs (up to a
million), and the kernels are cut to that shape:

- Arrays stay as projections make them: [B, M, F], the channels of all heads on
  lanes, so nothing is ever transposed. A block has the lanes of one head, or of
  the fewest heads that fill whole vectors of 128 lanes. One of those is
  selected by zeros in the other lanes of its query.
- The gradient of all N queries of a group, float32, fits a core's own memory
  (VMEM). So one backward kernel walks the keys once: dk and dv of a block of
  keys are complete after an inner loop over the queries, and dq stays until the
  last keys are added. That is five products per pair of blocks and nothing of
  size N x M. Kernels made for N = M walk twice, with seven products, or write
  one partial dq for each block of keys.
- Scores are transposed, keys on sublanes and queries on lanes: a query's
  maximum, sum, log-sum-exp and delta then take one lane each.

A mask becomes one number per key: its slot, or the largest integer if it is
hidden from all. Query n sees the slots up to n + offset. The least and the
greatest slot of a block of keys say which pairs of blocks to skip, and which
need no comparison.

Queries and keys are rotated in the kernels, as a copy of all keys would cost
more than their attention. The partner of a channel comes by a roll over the
lanes, and cosines and sines share a table, [B, T, W] in the type of the keys:
each head of a group has R lanes of cosines, R of sines and K - 2R of zeros.

Letters: B batch, N queries, M keys, H heads, K head size, F = H*K; U groups of
G heads, W = G*K lanes of a group; Q queries of a block, C keys of a block; R
pairs of rotated channels; T is Q or C.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from perceiver_ar.ops import flash_arrays, flash_blocks
from perceiver_ar.ops.flash_blocks import Plan
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns

_LOWEST = -1e30  # the log-sum-exp of nothing
_HIDDEN = 2 * _LOWEST  # so far below that exp(_HIDDEN - _LOWEST) is exactly 0


def forward(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  head_size: int,
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """Attention of queries, which are rotated and scaled here, to keys.

  Returns:
    The output, [B, N, F] of q's type, and the log-sum-exp of the visible
    scores, [B, H, N] float32. A query that sees no key gets 0 and -1e30.
  """
  plan = flash_blocks.choose(
    q_BNF, k_BMF, mask, turns, head_size, backward=False
  )
  slot, query, key, stat = _specs(plan)
  bounds, slots_B1M = flash_arrays.key_slots(mask, plan)
  G, Q, W = plan.heads, plan.queries, plan.width
  q_BNF = flash_arrays.whole(q_BNF, Q)
  lse_BUGN = jax.ShapeDtypeStruct(
    (plan.batch, plan.num_groups, G, q_BNF.shape[1]), jnp.float32
  )
  out_BNF, lse_BUGN = _call(
    _forward_kernel,
    plan,
    bounds,
    [
      *[(slots_B1M, slot), (q_BNF, query), (k_BMF, key), (v_BMF, key)],
      *_tables(turns, plan, q_BNF.dtype),
    ],
    [(q_BNF, query), (lse_BUGN, stat)],
    [(G, Q), (G, Q), (W, Q)],
    interpret,
  )
  lse_BHN = lse_BUGN.reshape(plan.batch, -1, q_BNF.shape[1])
  N = plan.num_queries
  return out_BNF[:, :N], lse_BHN[:, :, :N]


def backward(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  head_size: int,
  lse_BHN: jax.Array,
  delta_BHN: jax.Array,
  dout_BNF: jax.Array,
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of q and k before their rotations and of v, in their types.

  Where the keys are a shard of all keys, lse, the output and its gradient dout
  are those of all; delta is the sum over K of output * dout, in float32.
  """
  plan = flash_blocks.choose(
    q_BNF, k_BMF, mask, turns, head_size, backward=True
  )
  slot, query, key, stat = _specs(plan)
  bounds, slots_B1M = flash_arrays.key_slots(mask, plan)
  C, Q, W = plan.keys, plan.queries, plan.width
  q_BNF, dout_BNF = (
    flash_arrays.whole(q_BNF, Q),
    flash_arrays.whole(dout_BNF.astype(q_BNF.dtype), Q),
  )
  # Written during the last keys only; until then the first block waits.
  last = plan.key_blocks - 1
  dq = pl.BlockSpec(
    (1, Q, W), lambda b, u, i, j, *_: (b, jnp.where(i == last, j, 0), u)
  )
  dq_BNF, dk_BMF, dv_BMF = _call(
    _backward_kernel,
    plan,
    bounds,
    [
      *[(slots_B1M, slot), (q_BNF, query), (k_BMF, key), (v_BMF, key)],
      *[(flash_arrays.stats(x, plan), stat) for x in (lse_BHN, delta_BHN)],
      (dout_BNF, query),
      *_tables(turns, plan, q_BNF.dtype),
    ],
    [(q_BNF, dq), (k_BMF, key), (v_BMF, key)],
    [(plan.query_blocks, W, Q), (C, W), (C, W)],
    interpret,
  )
  return dq_BNF[:, : plan.num_queries], dk_BMF, dv_BMF


def _forward_kernel(plan: Plan, *refs: Any) -> None:
  *bounds, slots, q, k, v = refs[:6]
  *tables, out, lse, top, total, acc = refs[6:]
  q_table, k_table = tables or (None, None)
  j, i = pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def _() -> None:
    top[...] = jnp.full_like(top, _LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def step(masked: bool) -> None:
    q_QW = _turned(q[0], q_table, plan, scale=plan.scale)
    turned_CW = _turned(k[0], k_table, plan)
    k_CW, v_CW = (_keys(x, i, plan, masked) for x in (turned_CW, v[0]))
    seen_CQ = _seen(slots, j, plan) if masked else None
    v_WC = v_CW.T
    for h in range(plan.heads):
      one, mine = slice(h, h + 1), plan.lanes(h)
      scores_CQ = _scores(k_CW, _head(q_QW, h, plan), seen_CQ)
      top_1Q = jnp.maximum(top[one], scores_CQ.max(0, keepdims=True))
      shrink_1Q = jnp.exp(top[one] - top_1Q)
      probs_CQ = jnp.exp(scores_CQ - top_1Q)
      total[one] = total[one] * shrink_1Q + probs_CQ.sum(0, keepdims=True)
      part_WQ = _dot(v_WC, probs_CQ.astype(v_WC.dtype), (1, 0))
      acc[mine] = acc[mine] * shrink_1Q + part_WQ[mine]
      top[one] = top_1Q

  _for_a_pair(plan, bounds, i, j, step)

  @pl.when(i == plan.key_blocks - 1)
  def _() -> None:
    safe_GQ = jnp.where(total[...] == 0, 1.0, total[...])
    lse[0, 0] = top[...] + jnp.log(safe_GQ)
    for h in range(plan.heads):
      acc[plan.lanes(h)] = acc[plan.lanes(h)] / safe_GQ[h : h + 1]
    out[0] = acc[...].T.astype(out.dtype)


def _backward_kernel(plan: Plan, *refs: Any) -> None:
  *bounds, slots, q, k, v, lse, delta, dout = refs[:9]
  *tables, dq_out, dk_out, dv_out, dq, dk, dv = refs[9:]
  q_table, k_table = tables or (None, None)
  i, j = pl.program_id(2), pl.program_id(3)
  # Rotated once for all queries, and kept where dk goes after the last.
  turned = dk_out if tables else k

  @pl.when(i == 0)
  def _() -> None:
    dq[j] = jnp.zeros(dq.shape[1:], dq.dtype)

  @pl.when(j == 0)
  def _() -> None:
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)
    if tables:
      turned[0] = _turned(k[0], k_table, plan)

  def step(masked: bool) -> None:
    k_CW, v_CW = (_keys(x[0], i, plan, masked) for x in (turned, v))
    seen_CQ = _seen(slots, j, plan) if masked else None
    k_WC = k_CW.T
    turned_QW = _turned(q[0], q_table, plan, scale=plan.scale)
    for h in range(plan.heads):
      one, mine = slice(h, h + 1), plan.lanes(h)
      q_QW, dout_QW = (_head(x, h, plan) for x in (turned_QW, dout[0]))
      probs_CQ = jnp.exp(_scores(k_CW, q_QW, seen_CQ) - lse[0, 0, one])
      dv[...] += _dot(probs_CQ.astype(dout_QW.dtype), dout_QW, (1, 0))
      dprobs_CQ = _dot(v_CW, dout_QW, (1, 1)) - delta[0, 0, one]
      dscores_CQ = (probs_CQ * dprobs_CQ).astype(k_CW.dtype)
      dk[...] += _dot(dscores_CQ, q_QW, (1, 0))
      dq[j, mine] += _dot(k_WC, dscores_CQ, (1, 0))[mine]

  _for_a_pair(plan, bounds, i, j, step)

  @pl.when(j == plan.query_blocks - 1)
  def _() -> None:
    dk_CW = _turned(dk[...], k_table, plan, back=True)
    dk_out[0] = dk_CW.astype(dk_out.dtype)
    dv_out[0] = dv[...].astype(dv_out.dtype)

  @pl.when(i == plan.key_blocks - 1)
  def _() -> None:
    dq_QW = _turned(dq[j].T, q_table, plan, back=True, scale=plan.scale)
    dq_out[0] = dq_QW.astype(dq_out.dtype)


def _for_a_pair(
  plan: Plan, bounds: Any, i: Any, j: Any, step: Callable[[bool], None]
) -> None:
  """Calls step(masked), or nothing if no query of j sees a key of i."""
  lowest, highest = bounds
  block = pl.program_id(0) * plan.key_blocks + i
  first = plan.offset + j * plan.queries  # what the first query sees
  whole = highest[block] <= first
  some = lowest[block] < first + plan.queries

  @pl.when(some)
  def _() -> None:
    jax.lax.cond(whole, lambda: step(False), lambda: step(True))


def _seen(slots: Any, j: jax.Array, plan: Plan) -> jax.Array:
  # A row of slots becomes a column: a turn takes at least 8 sublanes.
  slots_8C = jnp.broadcast_to(slots[0], (8, plan.keys))
  slots_C1 = slots_8C.T[:, :1]
  within_1Q = jax.lax.broadcasted_iota(jnp.int32, (1, plan.queries), 1)
  return slots_C1 <= within_1Q + (plan.offset + j * plan.queries)


def _turned(
  x_TW: jax.Array,
  table: Any,
  plan: Plan,
  *,
  back: bool = False,
  scale: float = 1.0,
) -> jax.Array:
  """Queries or keys rotated by a table, if any, or gradients back; scaled."""
  if table is None and scale == 1:
    return x_TW
  x32_TW = x_TW.astype(jnp.float32)
  if table is not None:
    x32_TW = _rotated(x32_TW, table[0].astype(jnp.float32), plan, back)
  return (x32_TW * scale).astype(x_TW.dtype)


def _rotated(
  x_TW: jax.Array, table_TW: jax.Array, plan: Plan, back: bool
) -> jax.Array:
  K, R, W = plan.head_size, plan.pairs, plan.width
  lane_1W = jax.lax.broadcasted_iota(jnp.int32, (1, W), 1) % K
  first_1W = lane_1W < R

  def partners(y_TW: jax.Array) -> jax.Array:
    left_TW, right_TW = pltpu.roll(y_TW, W - R, 1), pltpu.roll(y_TW, R, 1)
    return jnp.where(first_1W, left_TW, right_TW)

  other_TW = partners(table_TW)
  cos_TW = jnp.where(first_1W, table_TW, other_TW)
  sin_TW = jnp.where(first_1W, other_TW, table_TW)
  sin_TW = jnp.where(first_1W ^ back, -sin_TW, sin_TW)
  turned_TW = x_TW * cos_TW + partners(x_TW) * sin_TW
  return jnp.where(lane_1W < 2 * R, turned_TW, x_TW)


def _keys(x_CW: jax.Array, i: Any, plan: Plan, masked: bool) -> jax.Array:
  """A block of keys or values, zeros past the end: no 0 * NaN in a sum."""
  if not masked or plan.num_keys % plan.keys == 0:
    return x_CW
  row_C1 = jax.lax.broadcasted_iota(jnp.int32, (plan.keys, 1), 0)
  inside_C1 = row_C1 < plan.num_keys - i * plan.keys
  x32_CW = jnp.where(inside_C1, x_CW.astype(jnp.float32), 0.0)
  return x32_CW.astype(x_CW.dtype)


def _head(x_QW: jax.Array, h: int, plan: Plan) -> jax.Array:
  """Zero in the lanes of the group's other heads."""
  if plan.heads == 1:
    return x_QW
  lane_1W = jax.lax.broadcasted_iota(jnp.int32, (1, plan.width), 1)
  mine_1W = (lane_1W >= plan.lanes(h).start) & (lane_1W < plan.lanes(h).stop)
  return x_QW * jnp.where(mine_1W, 1.0, 0.0).astype(x_QW.dtype)


def _scores(k_CW: Any, q_QW: Any, seen_CQ: jax.Array | None) -> jax.Array:
  scores_CQ = _dot(k_CW, q_QW, (1, 1))
  if seen_CQ is None:
    return scores_CQ
  return jnp.where(seen_CQ, scores_CQ, _HIDDEN)


def _dot(x: jax.Array, y: jax.Array, over: tuple[int, int]) -> jax.Array:
  dims = (((over[0],), (over[1],)), ((), ()))
  # As all matmuls of the step; a kernel knows the least and the most only.
  wanted = jax.config.values['jax_default_matmul_precision']
  exact = x.dtype == jnp.float32 and wanted in ('highest', 'float32')
  precision = jax.lax.Precision.HIGHEST if exact else jax.lax.Precision.DEFAULT
  return jax.lax.dot_general(x, y, dims, precision, jnp.float32)


def _call(
  kernel: Callable[..., None],
  plan: Plan,
  bounds: tuple[jax.Array, jax.Array],
  inputs: list[tuple[jax.Array, pl.BlockSpec]],
  outputs: list[tuple[Any, pl.BlockSpec]],
  scratch: list[tuple[int, ...]],
  interpret: bool,
) -> list[jax.Array]:
  """Runs a kernel for each example, group of heads, and pair of blocks."""
  arrays, in_specs = zip(*inputs, strict=True)
  likes, out_specs = zip(*outputs, strict=True)
  inner = [plan.query_blocks, plan.key_blocks]
  if plan.backward:
    inner.reverse()
  return pl.pallas_call(
    functools.partial(kernel, plan),
    grid_spec=pltpu.PrefetchScalarGridSpec(
      num_scalar_prefetch=2,
      grid=(plan.batch, plan.num_groups, *inner),
      in_specs=in_specs,
      out_specs=out_specs,
      scratch_shapes=[pltpu.VMEM(shape, jnp.float32) for shape in scratch],
    ),
    out_shape=[jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes],
    compiler_params=pltpu.CompilerParams(
      dimension_semantics=('parallel', 'parallel', 'arbitrary', 'arbitrary'),
      vmem_limit_bytes=plan.granted,
    ),
    interpret=interpret,
  )(*bounds, *arrays)


def _specs(plan: Plan) -> list[pl.BlockSpec]:
  """How slots, queries, keys and statistics are cut."""
  return [
    _spec(plan, (1, 1, plan.keys), 'b0i'),
    _spec(plan, (1, plan.queries, plan.width), 'bju'),
    _spec(plan, (1, plan.keys, plan.width), 'biu'),
    _spec(plan, (1, 1, plan.heads, plan.queries), 'bu0j'),
  ]


def _spec(plan: Plan, shape: tuple[int, ...], index: str) -> pl.BlockSpec:
  """An array cut along the grid: `index` names the grid's axis, or 0."""
  # Example, group, block of keys, block of queries: the last moves first.
  order = 'buij' if plan.backward else 'buji'

  def at(*ids: Any) -> tuple[Any, ...]:
    return tuple(0 if x == '0' else ids[order.index(x)] for x in index)

  return pl.BlockSpec(shape, at)


def _tables(
  turns: Turns, plan: Plan, dtype: Any
) -> list[tuple[jax.Array, pl.BlockSpec]]:
  """Angles of queries and keys, if they rotate."""
  if turns.queries is None or turns.keys is None or not plan.pairs:
    return []
  query = flash_arrays.table(turns.queries, plan, dtype)
  return [
    (
      flash_arrays.whole(query, plan.queries),
      _spec(plan, (1, plan.queries, plan.width), 'bj0'),
    ),
    (
      flash_arrays.table(turns.keys, plan, dtype),
      _spec(plan, (1, plan.keys, plan.width), 'bi0'),
    ),
  ]
