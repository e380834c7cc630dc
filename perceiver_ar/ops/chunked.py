"""Attention over blocks of keys: memory linear in M, on any device.

A scan over blocks keeps a running maximum, sum and output (Milakov and
Gimelshein 2018; Rabe and Staats 2021). The backward pass recomputes each
block's probabilities from the log-sum-exp, as flash attention does (Dao et al.
2022), so nothing of size N x M is ever held.

Blocks are counted from the last key: the first may be short, so M need not
divide by the block, and only the blocks that reach into the last N keys
compare positions. Letters: B batch, N queries, M keys, H heads, K head size,
F = H*K, C keys of a block.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from perceiver_ar.ops.masks import Mask, visible

_LOWEST = -1e30


def _over_blocks(
  mask: Mask,
  num_queries: int,
  num_keys: int,
  block: int,
  body: Callable[[Any, jax.Array | int, int, jax.Array | None], Any],
  carry: Any,
) -> Any:
  """Folds body(carry, first_key, num_keys, seen) over all blocks of keys."""
  short = num_keys % block
  # Whole blocks that every query sees as far as causality goes.
  whole = num_keys // block
  if mask.slots_BM is None:
    open_keys = max(0, min(mask.offset + 1, num_keys) - short)
    num_open = open_keys // block
  else:
    num_open = 0

  def step(causal: bool) -> Callable[[int, Any], Any]:
    def one(i: Any, carry: Any) -> Any:
      first = short + i * block
      seen = visible(mask, num_queries, first, block, causal=causal)
      return body(carry, first, block, seen)

    return one

  if short:
    carry = body(carry, 0, short, visible(mask, num_queries, 0, short))
  carry = jax.lax.fori_loop(0, num_open, step(causal=False), carry)
  return jax.lax.fori_loop(num_open, whole, step(causal=True), carry)


def _block(
  x_BMF: jax.Array, first: jax.Array | int, size: int, num_heads: int
) -> jax.Array:
  """Keys or values of a block, heads before keys as the matmuls want them."""
  x_BCF = jax.lax.dynamic_slice_in_dim(x_BMF, first, size, 1)
  x_BCHK = x_BCF.reshape(*x_BCF.shape[:2], num_heads, -1)
  return x_BCHK.transpose(0, 2, 1, 3)


def _write(x_BMF: jax.Array, block: jax.Array, first: Any) -> jax.Array:
  """Puts [B, C, H, K] where a block of keys is."""
  block = block.reshape(*block.shape[:2], -1).astype(x_BMF.dtype)
  return jax.lax.dynamic_update_slice_in_dim(x_BMF, block, first, 1)


def _dot(spec: str, x: jax.Array, y: jax.Array) -> jax.Array:
  return jnp.einsum(spec, x, y, preferred_element_type=jnp.float32)


def _exp(scores: jax.Array, seen: jax.Array | None) -> jax.Array:
  probs = jnp.exp(scores)
  return probs if seen is None else jnp.where(seen, probs, 0.0)


def forward(
  q_BNHK: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  block: int,
) -> tuple[jax.Array, jax.Array]:
  """Outputs [B, N, H, K] of scaled queries, and log-sum-exps [B, H, N].

  A query that sees no key has zeros and the lowest log-sum-exp there is.
  """
  block = min(block, k_BMF.shape[1])
  q_BHNK = q_BNHK.transpose(0, 2, 1, 3)
  B, H, N = q_BHNK.shape[:3]

  def body(
    carry: Any, first: jax.Array | int, size: int, seen: jax.Array | None
  ) -> Any:
    max_BHN1, sum_BHN1, out_BHNK = carry
    k_BHCK, v_BHCK = (_block(x, first, size, H) for x in (k_BMF, v_BMF))
    scores_BHNC = _dot('bhnk,bhck->bhnc', q_BHNK, k_BHCK)
    if seen is not None:
      scores_BHNC = jnp.where(seen, scores_BHNC, _LOWEST)
    top_BHN1 = jnp.maximum(max_BHN1, scores_BHNC.max(-1, keepdims=True))
    shrink_BHN1 = jnp.exp(max_BHN1 - top_BHN1)
    probs_BHNC = _exp(scores_BHNC - top_BHN1, seen)
    sum_BHN1 = sum_BHN1 * shrink_BHN1 + probs_BHNC.sum(-1, keepdims=True)
    part_BHNK = _dot('bhnc,bhck->bhnk', probs_BHNC.astype(v_BHCK.dtype), v_BHCK)
    return top_BHN1, sum_BHN1, out_BHNK * shrink_BHN1 + part_BHNK

  zeros = functools.partial(jnp.zeros, dtype=jnp.float32)
  start = (
    zeros((B, H, N, 1)) + _LOWEST,
    zeros((B, H, N, 1)),
    zeros(q_BHNK.shape),
  )
  max_BHN1, sum_BHN1, out_BHNK = _over_blocks(
    mask, N, k_BMF.shape[1], block, body, start
  )
  safe_BHN1 = jnp.where(sum_BHN1 == 0, 1.0, sum_BHN1)
  lse_BHN1 = max_BHN1 + jnp.log(safe_BHN1)
  out_BNHK = (out_BHNK / safe_BHN1).transpose(0, 2, 1, 3).astype(q_BNHK.dtype)
  return out_BNHK, lse_BHN1[..., 0]


def backward(
  q_BNHK: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  block: int,
  lse_BHN: jax.Array,
  delta_BHN: jax.Array,
  dout_BNHK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of queries, keys and values.

  Args:
    q_BNHK: scaled, like all of the rest as `forward` took it.
    k_BMF: keys.
    v_BMF: values.
    mask: which keys a query sees.
    block: keys per block.
    lse_BHN: of all keys that the queries see, here or on other devices.
    delta_BHN: inner products of outputs and their gradients.
    dout_BNHK: gradients of the outputs.
  """
  block, H = min(block, k_BMF.shape[1]), q_BNHK.shape[2]
  lse_BHN1, delta_BHN1 = lse_BHN[..., None], delta_BHN[..., None]
  q_BHNK, dout_BHNK = (x.transpose(0, 2, 1, 3) for x in (q_BNHK, dout_BNHK))

  def body(
    carry: Any, first: jax.Array | int, size: int, seen: jax.Array | None
  ) -> Any:
    dq_BHNK, dk_BMF, dv_BMF = carry
    k_BHCK, v_BHCK = (_block(x, first, size, H) for x in (k_BMF, v_BMF))
    scores_BHNC = _dot('bhnk,bhck->bhnc', q_BHNK, k_BHCK)
    probs_BHNC = _exp(scores_BHNC - lse_BHN1, seen)
    dprobs_BHNC = _dot('bhnk,bhck->bhnc', dout_BHNK, v_BHCK)
    dscores_BHNC = (probs_BHNC * (dprobs_BHNC - delta_BHN1)).astype(
      q_BHNK.dtype
    )
    dq_BHNK += _dot('bhnc,bhck->bhnk', dscores_BHNC, k_BHCK)
    dk_BCHK = _dot('bhnc,bhnk->bchk', dscores_BHNC, q_BHNK)
    dv_BCHK = _dot(
      'bhnc,bhnk->bchk', probs_BHNC.astype(dout_BHNK.dtype), dout_BHNK
    )
    dk_BMF = _write(dk_BMF, dk_BCHK, first)
    dv_BMF = _write(dv_BMF, dv_BCHK, first)
    return dq_BHNK, dk_BMF, dv_BMF

  start = (
    jnp.zeros(q_BHNK.shape, jnp.float32),
    jnp.zeros_like(k_BMF),
    jnp.zeros_like(v_BMF),
  )
  dq_BHNK, dk_BMF, dv_BMF = _over_blocks(
    mask, q_BNHK.shape[1], k_BMF.shape[1], block, body, start
  )
  dq_BNHK = dq_BHNK.transpose(0, 2, 1, 3).astype(q_BNHK.dtype)
  return dq_BNHK, dk_BMF, dv_BMF
