"""What a step costs, from the config, and what this machine can do.

The count is of multiply-adds that the model needs: masked scores included,
recomputation, normalisation and softmax not.

Letters: M inputs, N latents, D width, E embedding width, V vocabulary.
"""

import time

import jax
import jax.numpy as jnp

from perceiver_ar.config import ModelConfig


def forward_flops(
  config: ModelConfig, *, context_length: int, num_latents: int
) -> int:
  """Floating-point operations of one sequence's forward pass."""
  M, N = context_length, num_latents
  D, E, V = config.width, config.embed_width, config.vocab_size
  cross = (
    N * D * E  # queries
    + 2 * M * E * E  # keys and values
    + 2 * N * M * E  # scores and weighted sums
    + N * E * D  # output
    + 2 * N * D * config.cross_mlp_width
  )
  layer = 4 * N * D * D + 2 * N * N * D + 2 * N * D * config.mlp_width
  return 2 * (N * E * D + cross + config.num_layers * layer + N * D * V)


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
