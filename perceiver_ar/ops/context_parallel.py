"""Attention to keys that are spread over devices, merged once.

Each device holds the rows of a few queries and a part of the keys of several
devices' rows. It gathers the queries, which are few, attends all of them to its
own keys, and one reduce-scatter over the axis adds up the outputs, weighted by
their log-sum-exps, and leaves each device with its own queries' rows again. The
keys, which are many, never move: what a device sends does not grow with M.

The backward pass of each part is the kernel's own, with the log-sum-exp and
the inner products of the whole, so it is exact as well.

All of this runs inside `jax.shard_map`. Letters: B rows that share the keys of
this device, N queries, M keys of this device, H heads, K head size.
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
from perceiver_ar.ops.rotation import Turn


@dataclasses.dataclass(frozen=True)
class Split:
  """How queries lie on the devices of an axis that splits the keys.

  Attributes:
    axis: the mesh axis.
    dim: of queries [B, N, H, K]: 0 if it splits the rows, 1 the latents.
  """

  axis: str
  dim: int


def attend(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
  split: Split,
) -> jax.Array:
  """Attention of this device's queries to the keys of all along an axis.

  Args:
    q_BNHK: this device's part of the queries, rotated, not yet scaled.
    k_BMHK: this device's keys, the part of its index along the axis, not yet
      rotated.
    v_BMHK: their values.
    mask: of all queries of the rows and this device's keys; without slots,
      the keys stand in the order of the devices.
    turn: the rotation of this device's keys.
    kernel: of those that give log-sum-exps.
    split: how the queries are split.
  """
  q_BNHK = attention.scaled(q_BNHK)
  if mask.slots_BM is None:
    B, M = k_BMHK.shape[:2]
    slots_M = lax.axis_index(split.axis) * M + jnp.arange(M)
    slots_BM = jnp.broadcast_to(slots_M[None], (B, M))
    mask = dataclasses.replace(mask, slots_BM=slots_BM)
  return _attend(q_BNHK, k_BMHK, v_BMHK, mask, turn, kernel, split)


def with_all_keys(
  k_BNHK: jax.Array,
  v_BNHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  axis: str,
) -> tuple[jax.Array, jax.Array, Mask, Turn | None]:
  """For latents that are split over `axis`: all keys, and their mask here."""
  first = lax.axis_index(axis) * k_BNHK.shape[1]
  k_BNHK, v_BNHK, turn = jax.tree.map(
    lambda x: lax.all_gather(x, axis, axis=1, tiled=True),
    (k_BNHK, v_BNHK, turn),
  )
  B, N = k_BNHK.shape[:2]
  slots_BN = jnp.broadcast_to((jnp.arange(N) - first)[None], (B, N))
  start_B = None if mask.start_B is None else mask.start_B - first
  mask = dataclasses.replace(mask, slots_BM=slots_BN, start_B=start_B)
  return k_BNHK, v_BNHK, mask, turn


def _gather(x: jax.Array, split: Split, dim: int) -> jax.Array:
  return lax.all_gather(x, split.axis, axis=dim, tiled=True)


def _scatter(x_BNHK: jax.Array, split: Split) -> jax.Array:
  return lax.psum_scatter(
    x_BNHK, split.axis, scatter_dimension=split.dim, tiled=True
  )


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _attend(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
  split: Split,
) -> jax.Array:
  return _forward(q_BNHK, k_BMHK, v_BMHK, mask, turn, kernel, split)[0]


def _forward(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
  split: Split,
) -> tuple[jax.Array, tuple[Any, ...]]:
  all_BNHK = _gather(q_BNHK, split, split.dim)
  part_BNHK, lse_BHN = attention.forward(
    all_BNHK, k_BMHK, v_BMHK, mask, turn, kernel
  )
  # Small next to the outputs, by a factor of K.
  whole_BHN = jax.nn.logsumexp(lax.all_gather(lse_BHN, split.axis), axis=0)
  weight_BHN = jnp.exp(lse_BHN - whole_BHN)
  weight_BNH1 = weight_BHN.transpose(0, 2, 1)[..., None]
  with jax.named_scope('merge'):
    part_BNHK = (part_BNHK * weight_BNH1).astype(q_BNHK.dtype)
    out_BNHK = _scatter(part_BNHK, split)
  out_BNHK, whole_BHN = map(attention.named, (out_BNHK, whole_BHN))
  return out_BNHK, (
    *(q_BNHK, k_BMHK, v_BMHK, mask, turn),
    out_BNHK,
    whole_BHN,
  )


def _backward(
  kernel: Kernel, split: Split, kept: tuple[Any, ...], dout_BNHK: jax.Array
) -> tuple[Any, ...]:
  q_BNHK, k_BMHK, v_BMHK, mask, turn, out_BNHK, whole_BHN = kept
  delta_BHN = attention.delta(out_BNHK, dout_BNHK)
  # Queries are dimension 1 of outputs, and the last of what is per query.
  delta_BHN = _gather(delta_BHN, split, (0, 2)[split.dim])
  all_BNHK, dall_BNHK = (
    _gather(x, split, split.dim) for x in (q_BNHK, dout_BNHK)
  )
  dq_BNHK, dk_BMHK, dv_BMHK = attention.backward(
    *(all_BNHK, k_BMHK, v_BMHK, mask, turn, kernel),
    *(whole_BHN, delta_BHN, dall_BNHK),
  )
  return _scatter(dq_BNHK, split), dk_BMHK, dv_BMHK, None, None


_attend.defvjp(_forward, _backward)
