"""The parameters of a model before there are any: shapes, places, a start.

Letters: M inputs, N latents, P position axes.
"""

import functools
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.sharding import Mesh

from perceiver_ar import partitioning
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.partitioning import AnyMesh

Params: TypeAlias = Any


def initial(config: ModelConfig, key: jax.Array) -> Params:
  """The published distribution of weights, drawn by `key`."""
  return nn.unbox(_initial(config, key))


@functools.partial(jax.jit, static_argnums=0)
def _initial(config: ModelConfig, key: jax.Array) -> Params:
  """The same, boxed with their logical axes."""
  M, N, P = config.context_length, config.num_latents, config.position_sizes
  params = PerceiverAR(config).init(
    key,
    jnp.ones((1, M), jnp.int32),
    jnp.ones((1, M, len(P)), jnp.int32),
    num_latents=N,
  )['params']
  return jax.tree.map(lambda x: x.astype(config.param_dtype), params)


@functools.cache
def _shapes(config: ModelConfig) -> Params:
  """Of `_initial`, whose trace is kept: a step takes less time than that."""
  return _initial.eval_shape(config, jax.random.key(0))


def shardings(config: Config, mesh: AnyMesh) -> Any:
  """Where `mesh.rules` put the parameters."""
  rules = partitioning.parameter_rules(config.mesh.rules)
  return partitioning.parameter_shardings(_shapes(config.model), mesh, rules)


def abstract(config: Config, mesh: Mesh) -> Params:
  """Shapes, types and shardings of the parameters; nothing is allocated."""
  shapes = nn.unbox(_shapes(config.model))
  return with_shardings(shapes, shardings(config, mesh))


def in_float32(tree: Any) -> Any:
  """What the optimizer sees, of arrays or of their shapes."""

  def one(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x.update(dtype=jnp.float32)
    return x.astype(jnp.float32)

  return jax.tree.map(one, tree)


def with_shardings(tree: Any, shardings: Any) -> Any:
  """Shapes and types of a tree, and where it lies."""
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )
