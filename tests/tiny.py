"""A tiny model, its parameters and batches, for the tests of model and step."""

import functools
import pathlib
import runpy
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

from perceiver_ar import config as config_lib
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.models.perceiver_ar import PerceiverAR

CONFIGS = pathlib.Path(__file__).parents[1] / 'configs'

# Two frequencies per head, and no size divides another by accident.
_TINY = {
  'model.vocab_size': 31,
  'model.context_length': 24,
  'model.num_latents': 8,
  'model.num_layers': 2,
  'model.width': 16,
  'model.num_cross_heads': 2,
  'model.num_self_heads': 2,
  'model.cross_mlp_width': 24,
  'model.mlp_width': 32,
  'model.dropout_rate': 0.0,
  'model.attention_block': 5,
  'train.num_steps': 10,
  'train.batch_size': 8,
  'optimizer.warmup_steps': 0,
}


def default_config() -> Any:
  """The ConfigDict of `configs/default.py`."""
  return runpy.run_path(str(CONFIGS / 'default.py'))['get_config']()


def make_config(changes: dict[str, Any]) -> Config:
  raw = default_config()
  raw.update_from_flattened_dict(_TINY | changes)
  return config_lib.resolve(raw)


def make_model(**changes: Any) -> ModelConfig:
  return make_config({f'model.{k}': v for k, v in changes.items()}).model


POSITIONS = {
  'rotary': {},
  'rotary_from_end': {'position_source': 'from_end'},
  'rotary_from_end_negated': {'position_source': 'from_end_negated'},
  'rotary_half_heads': {'rotary_head_fraction': 0.5},
  'sinusoidal': {'position_encoding': 'sinusoidal'},
  'sinusoidal_from_end': {
    'position_encoding': 'sinusoidal',
    'position_source': 'from_end',
  },
  'learned_3d': {
    'position_encoding': 'learned',
    'position_sizes': (90, 7, 5),
  },
  'learned_from_end': {
    'position_encoding': 'learned',
    'position_source': 'from_end',
    'position_sizes': (40,),
  },
}


@functools.cache
def make_params(model: ModelConfig) -> Any:
  """Drawn for every leaf, zero-initialised ones too, so that nothing hides."""
  M, N, P = model.context_length, model.num_latents, len(model.position_sizes)
  ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  boxed = jax.eval_shape(
    functools.partial(PerceiverAR(model).init, num_latents=N),
    jax.random.key(0),
    ids((1, M)),
    ids((1, M, P)),
  )['params']
  rng = np.random.default_rng(0)

  def draw(path: Any, leaf: Any) -> jax.Array:
    noise = rng.normal(size=leaf.shape).astype(np.float32)
    kind = path[-1].key
    if kind == 'scale':
      return jnp.asarray(1 + 0.2 * noise)
    if kind == 'kernel':
      return jnp.asarray(noise * (0.5 if 'logits' in str(path) else 0.3))
    return jnp.asarray(noise * 0.4)

  return jax.tree_util.tree_map_with_path(draw, nn.unbox(boxed))


def make_batch(
  model: ModelConfig, lengths: Sequence[int], seed: int = 0
) -> dict[str, np.ndarray]:
  """Rows of so many inputs, right-aligned, that begin inside a document."""
  rng = np.random.default_rng(seed)
  M, P = model.context_length, len(model.position_sizes)
  tokens = rng.integers(1, model.vocab_size, (len(lengths), M + 1), np.int32)
  positions = np.zeros((len(lengths), M, P), np.int32)
  for row, length in enumerate(lengths):
    tokens[row, : M - length] = 0
    index = 1 + 3 * row + np.arange(length)
    sizes = [size or 2**20 for size in model.position_sizes]
    for axis, size in enumerate(sizes):
      positions[row, M - length :, axis] = 1 + (index + axis) % (size - 1)
    if not length:
      tokens[row] = 0
  return {'tokens': tokens, 'positions': positions}


@functools.cache
def score(model: ModelConfig) -> Any:
  """`score(model)(params, tokens, positions, num_latents=N)`: logits."""

  @functools.partial(jax.jit, static_argnames='num_latents')
  def apply(
    params: Any, tokens: jax.Array, positions: jax.Array, *, num_latents: int
  ) -> Any:
    return PerceiverAR(model).apply(
      {'params': params}, tokens, positions, num_latents=num_latents
    )

  return apply
