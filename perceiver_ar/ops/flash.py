"""Flash attention on TPUs for few queries and very many keys.

Perceiver AR attends N latents (hundreds or thousands) to M inputs (up to a
million), and the kernels are cut to that shape:

- Arrays stay where they are: [B, M, H, K] is read as [B, M, H*K], features on
  lanes, so keys and values are never transposed. A block has the lanes of one
  head, or of the fewest heads that fill whole vectors of 128 lanes. One of
  those is selected by zeros in the other lanes of its query.
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

Keys are rotated in the kernels, as a copy of all of them would cost more than
their attention. The partner of a channel comes by a roll over the lanes, and
cosines and sines share one table, [B or 1, M, W]: each head of a group has R
lanes of cosines, R of sines and K - 2R of zeros.

Letters: B batch, N queries, M keys, H heads, K head size, F = H*K; U groups of
G heads, W = G*K lanes of a group; Q queries of a block, C keys of a block; R
pairs of rotated channels.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from perceiver_ar.ops import flash_blocks
from perceiver_ar.ops.flash_blocks import Plan
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn

_LOWEST = -1e30  # the log-sum-exp of nothing
_HIDDEN = 2 * _LOWEST  # so far below that exp(_HIDDEN - _LOWEST) is exactly 0
_NEVER = jnp.iinfo(jnp.int32).max  # the slot of a key that no query sees


def forward(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array]:
  """Attention of queries, rotated and scaled, to keys that `turn` rotates.

  Returns:
    The output, [B, N, H, K] of q's type, and the log-sum-exp of the visible
    scores, [B, H, N] float32. A query that sees no key gets 0 and -1e30.
  """
  plan = flash_blocks.choose(q_BNHK, k_BMHK, mask, turn, backward=False)
  slot, query, key, stat = _specs(plan)
  bounds, slots_B1M = _key_slots(mask, plan)
  k_BMF, v_BMF = _flat(k_BMHK, 1), _flat(v_BMHK, 1)
  G, Q, W = plan.heads, plan.queries, plan.width
  q_BNF = _flat(q_BNHK, Q)
  lse_BUGN = jax.ShapeDtypeStruct(
    (plan.batch, plan.num_groups, G, q_BNF.shape[1]), jnp.float32
  )
  out_BNF, lse_BUGN = _call(
    _forward_kernel,
    plan,
    bounds,
    [
      *[(slots_B1M, slot), (q_BNF, query), (k_BMF, key), (v_BMF, key)],
      *_table(turn, plan),
    ],
    [(q_BNF, query), (lse_BUGN, stat)],
    [(G, Q), (G, Q), (W, Q)],
    interpret,
  )
  out_BNHK = out_BNF[:, : plan.num_queries].reshape(q_BNHK.shape)
  lse_BHN = lse_BUGN.reshape(plan.batch, -1, q_BNF.shape[1])
  return out_BNHK, lse_BHN[:, :, : plan.num_queries]


def backward(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  lse_BHN: jax.Array,
  delta_BHN: jax.Array,
  dout_BNHK: jax.Array,
  *,
  interpret: bool,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """The gradients of q, k before its rotation and v, in their types.

  Where the keys are a shard of all keys, lse, the output and its gradient dout
  are those of all; delta is the sum over K of output * dout, in float32.
  """
  plan = flash_blocks.choose(q_BNHK, k_BMHK, mask, turn, backward=True)
  slot, query, key, stat = _specs(plan)
  bounds, slots_B1M = _key_slots(mask, plan)
  k_BMF, v_BMF = _flat(k_BMHK, 1), _flat(v_BMHK, 1)
  C, Q, W = plan.keys, plan.queries, plan.width
  q_BNF, dout_BNF = _flat(q_BNHK, Q), _flat(dout_BNHK.astype(q_BNHK.dtype), Q)
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
      *[(_stats(x, plan), stat) for x in (lse_BHN, delta_BHN)],
      (dout_BNF, query),
      *_table(turn, plan),
    ],
    [(q_BNF, dq), (k_BMF, key), (v_BMF, key)],
    [(plan.query_blocks, W, Q), (C, W), (C, W)],
    interpret,
  )
  dq_BNHK = dq_BNF[:, : plan.num_queries].reshape(q_BNHK.shape)
  return dq_BNHK, dk_BMF.reshape(k_BMHK.shape), dv_BMF.reshape(v_BMHK.shape)


def _forward_kernel(plan: Plan, *refs: Any) -> None:
  *bounds, slots, q, k, v = refs[:6]
  *table, out, lse, top, total, acc = refs[6:]
  j, i = pl.program_id(2), pl.program_id(3)

  @pl.when(i == 0)
  def _() -> None:
    top[...] = jnp.full_like(top, _LOWEST)
    total[...] = jnp.zeros_like(total)
    acc[...] = jnp.zeros_like(acc)

  def step(masked: bool) -> None:
    turned_CW = _turned(k[0], table, plan, back=False)
    k_CW, v_CW = (_keys(x, i, plan, masked) for x in (turned_CW, v[0]))
    seen_CQ = _seen(slots, j, plan) if masked else None
    v_WC = v_CW.T
    for h in range(plan.heads):
      one, mine = slice(h, h + 1), plan.lanes(h)
      scores_CQ = _scores(k_CW, _head(q[0], h, plan), seen_CQ)
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
  *table, dq_out, dk_out, dv_out, dq, dk, dv = refs[9:]
  i, j = pl.program_id(2), pl.program_id(3)
  # Rotated once for all queries, and kept where dk goes after the last.
  turned = dk_out if table else k

  @pl.when(i == 0)
  def _() -> None:
    dq[j] = jnp.zeros(dq.shape[1:], dq.dtype)

  @pl.when(j == 0)
  def _() -> None:
    dk[...] = jnp.zeros_like(dk)
    dv[...] = jnp.zeros_like(dv)
    if table:
      turned[0] = _turned(k[0], table, plan, back=False)

  def step(masked: bool) -> None:
    k_CW, v_CW = (_keys(x[0], i, plan, masked) for x in (turned, v))
    seen_CQ = _seen(slots, j, plan) if masked else None
    k_WC = k_CW.T
    for h in range(plan.heads):
      one, mine = slice(h, h + 1), plan.lanes(h)
      q_QW, dout_QW = (_head(x[0], h, plan) for x in (q, dout))
      probs_CQ = jnp.exp(_scores(k_CW, q_QW, seen_CQ) - lse[0, 0, one])
      dv[...] += _dot(probs_CQ.astype(dout_QW.dtype), dout_QW, (1, 0))
      dprobs_CQ = _dot(v_CW, dout_QW, (1, 1)) - delta[0, 0, one]
      dscores_CQ = (probs_CQ * dprobs_CQ).astype(k_CW.dtype)
      dk[...] += _dot(dscores_CQ, q_QW, (1, 0))
      dq[j, mine] += _dot(k_WC, dscores_CQ, (1, 0))[mine]

  _for_a_pair(plan, bounds, i, j, step)

  @pl.when(j == plan.query_blocks - 1)
  def _() -> None:
    dk_CW = _turned(dk[...], table, plan, back=True)
    dk_out[0] = dk_CW.astype(dk_out.dtype)
    dv_out[0] = dv[...].astype(dv_out.dtype)

  @pl.when(i == plan.key_blocks - 1)
  def _() -> None:
    dq_out[0] = dq[j].T.astype(dq_out.dtype)


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
  x_CW: jax.Array, table: Sequence[Any], plan: Plan, *, back: bool
) -> jax.Array:
  """Keys rotated by the angles of a table, if any, or gradients back."""
  if not table:
    return x_CW
  K, R, W = plan.head_size, plan.pairs, plan.width
  lane_1W = jax.lax.broadcasted_iota(jnp.int32, (1, W), 1) % K
  first_1W = lane_1W < R

  def partners(y_CW: jax.Array) -> jax.Array:
    left_CW, right_CW = pltpu.roll(y_CW, W - R, 1), pltpu.roll(y_CW, R, 1)
    return jnp.where(first_1W, left_CW, right_CW)

  x32_CW, table_CW = x_CW.astype(jnp.float32), table[0][0]
  other_CW = partners(table_CW)
  cos_CW = jnp.where(first_1W, table_CW, other_CW)
  sin_CW = jnp.where(first_1W, other_CW, table_CW)
  sin_CW = jnp.where(first_1W ^ back, -sin_CW, sin_CW)
  turned_CW = x32_CW * cos_CW + partners(x32_CW) * sin_CW
  return jnp.where(lane_1W < 2 * R, turned_CW, x32_CW).astype(x_CW.dtype)


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
  # Always said, as jax_default_matmul_precision may not fit bfloat16.
  exact = x.dtype == jnp.float32
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


def _table(
  turn: Turn | None, plan: Plan
) -> list[tuple[jax.Array, pl.BlockSpec]]:
  """Cosines and sines as the lanes of a group have them, if keys rotate."""
  if turn is None or not plan.pairs:
    return []
  table_BMK = jnp.concatenate([turn.cos, turn.sin], -1)
  rest = plan.head_size - 2 * plan.pairs
  table_BMK = jnp.pad(table_BMK, ((0, 0), (0, 0), (0, rest)))
  table_BMW = jnp.tile(table_BMK, (1, 1, plan.heads))
  index = '0i0' if table_BMW.shape[0] == 1 else 'bi0'
  return [(table_BMW, _spec(plan, (1, plan.keys, plan.width), index))]


def _key_slots(
  mask: Mask, plan: Plan
) -> tuple[tuple[jax.Array, jax.Array], jax.Array]:
  """Each block's least and greatest slot, B*blocks; all slots, [B, 1, M]."""
  in_order_BM = jnp.arange(plan.num_keys)[None]
  slots_BM = in_order_BM if mask.slots_BM is None else mask.slots_BM
  if mask.start_B is not None:
    slots_BM = jnp.where(slots_BM < mask.start_B[:, None], _NEVER, slots_BM)
  if mask.kept_BM is not None:
    slots_BM = jnp.where(mask.kept_BM, slots_BM, _NEVER)
  slots_BM = jnp.broadcast_to(slots_BM, (plan.batch, plan.num_keys))
  past = -plan.num_keys % plan.keys
  slots_BM = jnp.pad(slots_BM, ((0, 0), (0, past)), constant_values=_NEVER)
  slots_BM = slots_BM.astype(jnp.int32)
  blocks_BIC = slots_BM.reshape(plan.batch, plan.key_blocks, plan.keys)
  bounds = blocks_BIC.min(-1).ravel(), blocks_BIC.max(-1).ravel()
  return bounds, slots_BM[:, None]


def _flat(x: jax.Array, block: int) -> jax.Array:
  """[B, rows, F], with zeros up to whole blocks: they change no sum."""
  x = x.reshape(*x.shape[:2], -1)
  return jnp.pad(x, ((0, 0), (0, -x.shape[1] % block), (0, 0)))


def _stats(x_BHN: jax.Array, plan: Plan) -> jax.Array:
  """[B, U, G, N]: a group's heads are then a whole dimension of a block."""
  past = -plan.num_queries % plan.queries
  x_BHN = jnp.pad(x_BHN, ((0, 0), (0, 0), (0, past)))
  return x_BHN.reshape(-1, plan.num_groups, plan.heads, x_BHN.shape[-1])
