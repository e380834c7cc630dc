"""Rows of tables by id, with gradients that are sums in float32.

Letters: V rows of the table, B batch, M ids, F channels.
"""

import jax
import jax.numpy as jnp

from perceiver_ar import sharded_attention
from perceiver_ar.config import ModelConfig


@jax.custom_vjp
def rows(table_VF: jax.Array, ids_BM: jax.Array) -> jax.Array:
  """Rows of a table, of ids that are in it (see `inside`).

  Gradients are summed in float32 whatever the table is in: a token may occur
  thousands of times, and bfloat16 cannot count to 257.
  """
  return table_VF.at[ids_BM].get(mode='clip', wrap_negative_indices=False)


def _rows_forward(
  table_VF: jax.Array, ids_BM: jax.Array
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  return rows(table_VF, ids_BM), (table_VF, ids_BM)


def _rows_backward(
  kept: tuple[jax.Array, jax.Array], d_BMF: jax.Array
) -> tuple[jax.Array, None]:
  table_VF, ids_BM = kept
  d_VF = jnp.zeros(table_VF.shape, jnp.float32)
  d_VF = d_VF.at[ids_BM].add(
    d_BMF.astype(jnp.float32), mode='drop', wrap_negative_indices=False
  )
  return d_VF.astype(table_VF.dtype), None


rows.defvjp(_rows_forward, _rows_backward)


@jax.custom_vjp
def input_rows(table_VF: jax.Array, ids_BM: jax.Array) -> jax.Array:
  """The same, of inputs: their gradients are summed where they lie."""
  return rows(table_VF, ids_BM)


def _input_rows_backward(
  kept: tuple[jax.Array, jax.Array], d_BMF: jax.Array
) -> tuple[jax.Array, None]:
  table_VF, ids_BM = kept
  d_VF = sharded_attention.sum_inputs(d_BMF, ids_BM, len(table_VF))
  return d_VF.astype(table_VF.dtype), None


input_rows.defvjp(_rows_forward, _input_rows_backward)


def inside(ids_BM: jax.Array, num_rows: int) -> jax.Array:
  """Which ids a table has; callers show others as NaN, not as another id."""
  return (ids_BM >= 0) & (ids_BM < num_rows)


def has_keys_and_values(config: ModelConfig, num_inputs: int) -> bool:
  """Whether those of tokens are looked up, for so many inputs a device."""
  if config.token_table != 'auto':
    return config.token_table == 'always'
  is_rotary = config.position_encoding == 'rotary'
  return is_rotary and config.vocab_size < num_inputs
