"""Arrays as the kernels of `flash` read them.

Letters: B batch, N queries, M keys, H heads, K head size, F = H*K; U groups of
G heads, W = G*K lanes of a group; C keys of a block, I blocks of keys; T is N
or M.
"""

from typing import Any

import jax
import jax.numpy as jnp

from perceiver_ar.ops.flash_blocks import Plan
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn

_NEVER = jnp.iinfo(jnp.int32).max  # the slot of a key that no query sees


def table(turn: Turn, plan: Plan, dtype: Any) -> jax.Array:
  """Cosines and sines as the lanes of a group have them, [B, T, W]."""
  cos, sin = turn.cos.astype(dtype), turn.sin.astype(dtype)
  rest = jnp.zeros((*cos.shape[:2], plan.head_size - 2 * plan.pairs), dtype)
  # In one go: XLA would copy a tiled array in every layer.
  return jnp.concatenate([cos, sin, rest] * plan.heads, -1)


def key_slots(
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


def whole(x_BNF: jax.Array, block: int) -> jax.Array:
  """With zeros up to whole blocks of rows: they change no sum."""
  return jnp.pad(x_BNF, ((0, 0), (0, -x_BNF.shape[1] % block), (0, 0)))


def stats(x_BHN: jax.Array, plan: Plan) -> jax.Array:
  """[B, U, G, N]: a group's heads are then a whole dimension of a block."""
  past = -plan.num_queries % plan.queries
  x_BHN = jnp.pad(x_BHN, ((0, 0), (0, 0), (0, past)))
  return x_BHN.reshape(-1, plan.num_groups, plan.heads, x_BHN.shape[-1])
