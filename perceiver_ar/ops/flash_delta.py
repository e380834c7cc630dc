"""Inner products of outputs and their gradients, for the kernels of `flash`.

Letters: B batch, N queries, H heads, K head size, F = H*K; U groups of G heads,
W = G*K lanes of a group; Q queries of a block.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from perceiver_ar.ops import flash_arrays, flash_blocks

_QUERIES = 128


def delta(
  out_BNF: jax.Array, dout_BNF: jax.Array, head_size: int, *, interpret: bool
) -> jax.Array:
  """Inner products of outputs and their gradients, [B, H, N] float32.

  A kernel, as XLA would lay both arrays out anew to sum over each head.
  """
  B, N, F = out_BNF.shape
  Q = _QUERIES
  G = flash_blocks.heads_of_a_group(F // head_size, head_size)
  out_BNF, dout_BNF = (flash_arrays.whole(x, Q) for x in (out_BNF, dout_BNF))
  N_whole, W = out_BNF.shape[1], G * head_size
  query = pl.BlockSpec((1, Q, W), lambda b, u, j: (b, j, u))
  delta_BUGN = pl.pallas_call(
    functools.partial(_kernel, head_size),
    grid=(B, F // W, N_whole // Q),
    in_specs=[query, query],
    out_specs=pl.BlockSpec((1, 1, G, Q), lambda b, u, j: (b, u, 0, j)),
    out_shape=jax.ShapeDtypeStruct((B, F // W, G, N_whole), jnp.float32),
    interpret=interpret,
  )(out_BNF, dout_BNF)
  return delta_BUGN.reshape(B, -1, N_whole)[:, :, :N]


def _kernel(head_size: int, out: Any, dout: Any, delta: Any) -> None:
  product_QW = out[0].astype(jnp.float32) * dout[0].astype(jnp.float32)
  product_WQ = product_QW.T
  for h in range(delta.shape[2]):
    mine = slice(h * head_size, (h + 1) * head_size)
    delta[0, 0, h] = product_WQ[mine].sum(0)
