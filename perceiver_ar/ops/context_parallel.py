"""Attention to keys that are spread over devices, merged once.

Each device holds the rows of a few queries and a part of the keys of several
devices' rows. It gathers the queries, which are few, attends all of them to its
own keys, and one reduce-scatter over the axis adds up the outputs, weighted by
their log-sum-exps, and leaves each device with its own queries' rows again. The
keys, which are many, never move: what a device sends does not grow with M.

The backward pass of each part is the kernel's own, with the log-sum-exp and
the inner products of the whole, so it is exact as well.

All of this runs inside `jax.shard_map`. Letters: B rows that share the keys of
this device, N queries, M keys of this device, H heads of K channels, F = H*K.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from perceiver_ar.ops import attention
from perceiver_ar.ops.attention import Kernel
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns


@dataclasses.dataclass(frozen=True)
class Split:
  """How queries lie on the devices of an axis that splits the keys.

  Attributes:
    axis: the mesh axis.
    dim: of queries [B, N, F]: 0 if it splits the rows, 1 the latents.
  """

  axis: str
  dim: int


def attend(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
  split: Split,
) -> jax.Array:
  """Attention of this device's queries to the keys of all along an axis.

  Args:
    q_BNF: this device's part of the queries, neither rotated nor scaled.
    k_BMF: this device's keys, the part of its index along the axis, not yet
      rotated.
    v_BMF: their values.
    mask: of all queries of the rows and this device's keys; without slots,
      the keys stand in the order of the devices.
    turns: of this device's queries and keys.
    kernel: of those that give log-sum-exps.
    split: how the queries are split.
  """
  if mask.slots_BM is None:
    B, M = k_BMF.shape[:2]
    slots_M = lax.axis_index(split.axis) * M + jnp.arange(M)
    slots_BM = jnp.broadcast_to(slots_M[None], (B, M))
    mask = dataclasses.replace(mask, slots_BM=slots_BM)
  return _attend(q_BNF, k_BMF, v_BMF, mask, turns, kernel, split)


def with_all_keys(
  k_BNF: jax.Array,
  v_BNF: jax.Array,
  mask: Mask,
  turns: Turns,
  axis: str,
) -> tuple[jax.Array, jax.Array, Mask, Turns]:
  """For latents that are split over `axis`: all keys, and their mask here."""
  first = lax.axis_index(axis) * k_BNF.shape[1]
  k_BNF, v_BNF, keys = jax.tree.map(
    lambda x: lax.all_gather(x, axis, axis=1, tiled=True),
    (k_BNF, v_BNF, turns.keys),
  )
  B, N = k_BNF.shape[:2]
  slots_BN = jnp.broadcast_to((jnp.arange(N) - first)[None], (B, N))
  start_B = None if mask.start_B is None else mask.start_B - first
  mask = dataclasses.replace(mask, slots_BM=slots_BN, start_B=start_B)
  return k_BNF, v_BNF, mask, dataclasses.replace(turns, keys=keys)


def _gather(x: jax.Array, split: Split, dim: int) -> jax.Array:
  return lax.all_gather(x, split.axis, axis=dim, tiled=True)


def _all_queries(
  q_BNF: jax.Array, turns: Turns, split: Split
) -> tuple[jax.Array, Turns]:
  q_BNF, queries = jax.tree.map(
    lambda x: _gather(x, split, split.dim), (q_BNF, turns.queries)
  )
  return q_BNF, dataclasses.replace(turns, queries=queries)


def _scatter(x_BNF: jax.Array, split: Split) -> jax.Array:
  return lax.psum_scatter(
    x_BNF, split.axis, scatter_dimension=split.dim, tiled=True
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
  split: Split,
) -> jax.Array:
  return _forward(q_BNF, k_BMF, v_BMF, mask, turns, kernel, split)[0]


def _forward(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
  split: Split,
) -> tuple[jax.Array, tuple[Any, ...]]:
  all_BNF, all_turns = _all_queries(q_BNF, turns, split)
  part_BNF, lse_BHN = attention.forward(
    all_BNF, k_BMF, v_BMF, mask, all_turns, kernel
  )
  # Small next to the outputs, by a factor of K.
  whole_BHN = jax.nn.logsumexp(lax.all_gather(lse_BHN, split.axis), axis=0)
  weight_BHN = jnp.exp(lse_BHN - whole_BHN)
  weight_BNF = jnp.repeat(
    weight_BHN.transpose(0, 2, 1), kernel.head_size, axis=-1
  )
  with jax.named_scope('merge'):
    part_BNF = (part_BNF * weight_BNF).astype(q_BNF.dtype)
    out_BNF = _scatter(part_BNF, split)
  out_BNF, whole_BHN = map(attention.named, (out_BNF, whole_BHN))
  return out_BNF, (
    *(q_BNF, k_BMF, v_BMF, mask, turns),
    out_BNF,
    whole_BHN,
  )


def _backward(
  kernel: Kernel, split: Split, kept: tuple[Any, ...], dout_BNF: jax.Array
) -> tuple[Any, ...]:
  q_BNF, k_BMF, v_BMF, mask, turns, out_BNF, whole_BHN = kept
  delta_BHN = attention.delta(out_BNF, dout_BNF, kernel)
  # Queries are dimension 1 of outputs, and the last of what is per query.
  delta_BHN = _gather(delta_BHN, split, (0, 2)[split.dim])
  all_BNF, all_turns = _all_queries(q_BNF, turns, split)
  dall_BNF = _gather(dout_BNF, split, split.dim)
  dq_BNF, dk_BMF, dv_BMF = attention.backward(
    *(all_BNF, k_BMF, v_BMF, mask, all_turns, kernel),
    *(whole_BHN, delta_BHN, dall_BNF),
  )
  return _scatter(dq_BNF, split), dk_BMF, dv_BMF, None, None


_attend.defvjp(_forward, _backward)
