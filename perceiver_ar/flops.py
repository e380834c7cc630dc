"""What a step costs, from the config, and what this machine can do.

The count is of what multiply-adds of the model take, two each: masked scores
included, recomputation, normalisation and softmax not.

Letters: T new latents, M inputs, N latents, D width, E embedding width,
V vocabulary.
"""

import time

import jax
import jax.numpy as jnp

from perceiver_ar.config import ModelConfig
from perceiver_ar.models import tables


def forward_flops(
  config: ModelConfig, *, context_length: int, num_latents: int
) -> int:
  """Floating-point operations of one sequence's forward pass."""
  M, N = context_length, num_latents
  logits = 2 * N * config.width * config.vocab_size
  inputs = projection_flops(config, M)
  return _latent_flops(config, N, M, N) + logits + inputs


def decode_flops(
  config: ModelConfig, *, context_length: int, num_latents: int, num_new: int
) -> int:
  """Of one sequence's step of sampling.

  One input's keys and values go to the cache, and the last `num_new` inputs
  become latents, of which the last predicts. Both attend to whole caches.
  """
  latents = _latent_flops(config, num_new, context_length, num_latents)
  logits = 2 * config.width * config.vocab_size
  return latents + logits + projection_flops(config, 1)


def _latent_flops(config: ModelConfig, T: int, M: int, N: int) -> int:
  """Of T latents, from their embedding to the last of the layers."""
  D, E = config.width, config.embed_width
  cross = (
    T * D * E  # queries
    + 2 * T * M * E  # scores and weighted sums
    + T * E * D  # output
    + 2 * T * D * config.cross_mlp_width
  )
  layer = 4 * T * D * D + 2 * T * N * D + 2 * T * D * config.mlp_width
  return 2 * (T * E * D + cross + config.num_layers * layer)


def projection_flops(config: ModelConfig, num_inputs: int) -> int:
  """Of the keys and values of the cross-attend, forward."""
  return 4 * num_inputs * config.embed_width**2


def saved_flops(config: ModelConfig, *, num_inputs: int, num_parts: int) -> int:
  """Of these, what the token table makes needless; 0 if it is not used.

  Args:
    config: of the model.
    num_inputs: in all rows of a batch.
    num_parts: in which it is computed, in turn and on different devices; each
      projects the whole vocabulary.
  """
  if not tables.has_keys_and_values(config, num_inputs // num_parts):
    return 0
  saved = num_inputs - num_parts * config.vocab_size
  return projection_flops(config, max(saved, 0))


def train_flops(config: ModelConfig) -> int:
  """Of one sequence's forward and backward pass, without recomputation."""
  M = config.num_kept_inputs or config.context_length
  return 3 * forward_flops(
    config, context_length=M, num_latents=config.num_latents
  )


def matmul_rate(dtype: str, size: int) -> float:
  """FLOP/s of square matmuls on one device, measured now: the best of five."""
  x = jnp.ones((size, size), dtype)
  product = jax.jit(lambda a, b: a @ b)
  product(x, x).block_until_ready()
  best = float('inf')
  for _ in range(5):
    start = time.perf_counter()
    product(x, x).block_until_ready()
    best = min(best, time.perf_counter() - start)
  return 2 * size**3 / best
