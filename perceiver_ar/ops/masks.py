"""Attention masks as descriptions: dense only where a block of them is used.

A query is one of the last inputs (a latent), a key is any input. Drawn for
M=6 keys, N=3 queries, offset M - N = 3, and a first example that starts at
key 1, `Mask(offset=3, start_B=[1, 0])` is

    . # # # . .         # # # # . .
    . # # # # .         # # # # # .
    . # # # # #         # # # # # #

Letters: B batch, N queries, M keys.
"""

import dataclasses

import jax
import jax.numpy as jnp


@dataclasses.dataclass(frozen=True, kw_only=True)
class Mask:
  """Query n sees the keys of slots up to n + offset that are not hidden.

  Attributes:
    offset: static; M - N when the queries are the last N of M inputs.
    start_B: the slots before it are padding; None if there is no padding.
    kept_BM: False hides a key; None keeps all.
    slots_BM: the slot of each key; None if key m is in slot m.
  """

  offset: int
  start_B: jax.Array | None = None
  kept_BM: jax.Array | None = None
  slots_BM: jax.Array | None = None


jax.tree_util.register_dataclass(
  Mask,
  data_fields=['start_B', 'kept_BM', 'slots_BM'],
  meta_fields=['offset'],
)


def visible(
  mask: Mask,
  num_queries: int,
  first_key: jax.Array | int,
  num_keys: int,
  *,
  causal: bool = True,
) -> jax.Array | None:
  """The mask of a block of keys, [B or 1, 1, N or 1, num_keys] booleans.

  Args:
    mask: the description.
    num_queries: N.
    first_key: the block's first key, may be traced.
    num_keys: how many keys the block has.
    causal: False if the caller knows that the offset hides none of these keys.

  Returns:
    None where nothing can be hidden.
  """
  block = lambda x_BM: jax.lax.dynamic_slice_in_dim(
    x_BM, first_key, num_keys, 1
  )
  slots_bm = (first_key + jnp.arange(num_keys))[None]
  if mask.slots_BM is not None:
    slots_bm = block(mask.slots_BM)
  seen = None
  if causal:
    last_slot_N = jnp.arange(num_queries) + mask.offset
    seen = slots_bm[:, None, None, :] <= last_slot_N[None, None, :, None]
  if mask.start_B is not None:
    inside_bm = slots_bm >= mask.start_B[:, None]
    seen = _and(seen, inside_bm[:, None, None, :])
  if mask.kept_BM is not None:
    seen = _and(seen, block(mask.kept_BM)[:, None, None, :])
  return seen


def _and(a: jax.Array | None, b: jax.Array) -> jax.Array:
  return b if a is None else a & b
