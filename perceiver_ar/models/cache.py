"""What sampling remembers between tokens.

Keys and values of the inputs stand in a ring: input i is in row i mod M, so a
new one replaces the oldest and nothing is moved. Keys and values of the
latents fill up from row 0; when they are full the sampler starts them anew.

Letters: B batch, M inputs, N latents, L layers, D width, E embedding width.
"""

import dataclasses

import jax
import jax.numpy as jnp

from perceiver_ar.config import ModelConfig
from perceiver_ar.ops.masks import Mask


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class KeyValue:
  key: jax.Array
  value: jax.Array

  def write(self, rows_T: jax.Array, new: 'KeyValue') -> 'KeyValue':
    """Replaces rows of [B, rows, channels] arrays."""
    return KeyValue(
      self.key.at[:, rows_T].set(new.key.astype(self.key.dtype)),
      self.value.at[:, rows_T].set(new.value.astype(self.value.dtype)),
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Cache:
  """Keys and values so far; all rows of the batch are equally long.

  Attributes:
    inputs: of the cross-attend, [B, M, E].
    latents: of every self-attend, [L, B, N, D].
    num_inputs: inputs written since the start, may exceed M.
    num_latents: latents written since the last refill, at most N.
  """

  inputs: KeyValue
  latents: KeyValue
  num_inputs: jax.Array
  num_latents: jax.Array


def empty(
  config: ModelConfig, batch: int, context_length: int, num_latents: int
) -> Cache:
  """A cache of nothing, for M and N that may differ from training's."""
  zeros = lambda *shape: jnp.zeros(shape, config.dtype)
  pair = lambda *shape: KeyValue(zeros(*shape), zeros(*shape))
  return Cache(
    inputs=pair(batch, context_length, config.embed_width),
    latents=pair(config.num_layers, batch, num_latents, config.width),
    num_inputs=jnp.int32(0),
    num_latents=jnp.int32(0),
  )


def inputs_mask(cache: Cache, num_queries: int) -> Mask:
  """For queries that are the last inputs written: the ring, in its order."""
  rows = cache.inputs.key.shape[1]
  last = cache.num_inputs - 1
  index_M = last - (last - jnp.arange(rows)) % rows
  slots_M = index_M - (cache.num_inputs - num_queries)
  return Mask(offset=0, slots_BM=slots_M[None], kept_BM=(index_M >= 0)[None])


def latents_mask(cache: Cache) -> Mask:
  """For queries that come right after the latents written so far."""
  slots_N = jnp.arange(cache.latents.key.shape[2]) - cache.num_latents
  return Mask(offset=0, slots_BM=slots_N[None])
