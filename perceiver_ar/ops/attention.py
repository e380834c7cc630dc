"""The one seam of attention, and its plain implementation.

Every implementation computes the same function: softmax over the visible keys
in float32, and zero for a query that sees none. Letters: B batch, N queries,
M keys, H heads, K head size.
"""

import jax
import jax.numpy as jnp

from perceiver_ar.ops import chunked
from perceiver_ar.ops.masks import Mask, visible


def attend(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  *,
  implementation: str,
  block: int,
) -> jax.Array:
  """Multi-head attention, [B, N, H, K] of the queries' type.

  Args:
    q_BNHK: queries, not yet scaled.
    k_BMHK: keys.
    v_BMHK: values.
    mask: which keys a query sees.
    implementation: 'chunked' (memory linear in M) or 'reference'.
    block: keys per block of 'chunked'; any size, M need not divide by it.
  """
  q_BNHK = q_BNHK * q_BNHK.shape[-1] ** -0.5
  if implementation == 'chunked':
    block = min(block, k_BMHK.shape[1])
    return chunked.attend(q_BNHK, k_BMHK, v_BMHK, mask, block)
  assert implementation == 'reference', implementation
  return reference(q_BNHK, k_BMHK, v_BMHK, mask)


def reference(
  q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, mask: Mask
) -> jax.Array:
  """Einsum, softmax, einsum: what every other implementation is held to."""
  scores_BHNM = jnp.einsum(
    'bnhk,bmhk->bhnm', q_BNHK, k_BMHK, preferred_element_type=jnp.float32
  )
  seen = visible(mask, q_BNHK.shape[1], 0, k_BMHK.shape[1])
  assert seen is not None
  probs_BHNM = jax.nn.softmax(jnp.where(seen, scores_BHNM, -1e30), axis=-1)
  probs_BHNM = jnp.where(seen, probs_BHNM, 0.0)
  return jnp.einsum('bhnm,bmhk->bnhk', probs_BHNM.astype(v_BMHK.dtype), v_BMHK)
