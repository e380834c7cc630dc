"""The compiled functions of train, evaluate and sample, with what goes in."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from perceiver_ar import (
  evaluate,
  flops,
  gradients,
  mesh_checks,
  parameters,
  partitioning,
  sample,
  train_step,
)
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import can_cache


@dataclasses.dataclass(frozen=True, kw_only=True)
class Program:
  """One jitted function as a command runs it.

  Attributes:
    command: train, evaluate or sample.
    function: jitted.
    args: their shapes and shardings.
    params: of these, the parameters.
    gradients: that it adds up, if it does.
    model_flops: that the model needs in one call, over all devices.
    saved_flops: that it does not, thanks to the token table.
    num_tokens: predicted in one call, over all devices.
  """

  command: str
  function: Any
  args: tuple[Any, ...]
  params: Any
  gradients: Any | None
  model_flops: int
  saved_flops: int
  num_tokens: int


def make_program(command: str, config: Config, mesh: Mesh) -> Program:
  """Raises UserError if the config does not fit the mesh."""
  make = {'train': _train, 'evaluate': _evaluate, 'sample': _sample}
  return make[command](config, mesh)


def _train(config: Config, mesh: Mesh) -> Program:
  train, M = config.train, config.model.context_length
  mesh_checks.check_train(config, mesh)
  state = train_step.abstract_state(config, mesh)
  saved = train_step.saved_flops(config, mesh)
  return Program(
    command='train',
    function=train_step.make_train_step(config, mesh),
    args=(state, _batch(config, train.batch_size, M, mesh)),
    params=state.params,
    gradients=gradients.abstract(config, mesh),
    model_flops=flops.train_flops(config.model) * train.batch_size - saved,
    saved_flops=saved,
    num_tokens=train.batch_size * config.model.num_latents,
  )


def _evaluate(config: Config, mesh: Mesh) -> Program:
  how = config.evaluate
  mesh_checks.check_evaluate(config, mesh)
  params = parameters.abstract(config, mesh)
  batch = _batch(config, how.batch_size, how.context_length, mesh)
  batch['num_scored'] = _ids(mesh, how.batch_size)
  needed = flops.forward_flops(
    config.model,
    context_length=how.context_length,
    num_latents=how.num_latents,
  )
  saved = flops.saved_flops(
    config.model,
    num_inputs=how.batch_size * how.context_length,
    num_parts=partitioning.num_input_parts(mesh),
  )
  return Program(
    command='evaluate',
    function=evaluate.make_score(config, mesh),
    args=(params, batch),
    params=params,
    gradients=None,
    model_flops=needed * how.batch_size - saved,
    saved_flops=saved,
    num_tokens=how.batch_size * how.stride,
  )


def _sample(config: Config, mesh: Mesh) -> Program:
  """A segment: the latents are refilled, and drawn from until N are in use."""
  how, model = config.sample, config.model
  mesh_checks.check_sample(config, mesh)
  if not can_cache(model):
    raise UserError(
      f'model.position_source {model.position_source} moves the positions of '
      'all inputs at every token, so sampling has no compiled segment to plan; '
      'plan evaluate instead'
    )
  params = parameters.abstract(config, mesh)
  B, N, R = how.num_samples, how.num_latents, how.refill_latents
  M = model.context_length
  cache = jax.eval_shape(sample.make_empty(config, mesh))
  count = jax.ShapeDtypeStruct((), jnp.int32)
  tokens_BR = jax.ShapeDtypeStruct((B, R), jnp.int32)
  positions_BSP = jax.ShapeDtypeStruct(
    (B, N + 1, len(model.position_sizes)), jnp.int32
  )
  drawn = N - R + 1
  refill, draw = (
    flops.decode_flops(model, context_length=M, num_latents=N, num_new=num)
    for num in (R, 1)
  )
  return Program(
    command='sample',
    function=sample.make_segment(config, mesh, ()),
    args=(params, tokens_BR, positions_BSP, cache, count, count),
    params=params,
    gradients=None,
    model_flops=B * (refill + (drawn - 1) * draw),
    saved_flops=0,
    num_tokens=B * drawn,
  )


def _batch(
  config: Config, batch_size: int, context_length: int, mesh: Mesh
) -> dict[str, Any]:
  B, M, P = batch_size, context_length, len(config.model.position_sizes)
  return {'tokens': _ids(mesh, B, M + 1), 'positions': _ids(mesh, B, M, P)}


def _ids(mesh: Mesh, *shape: int) -> jax.ShapeDtypeStruct:
  return jax.ShapeDtypeStruct(
    shape, jnp.int32, sharding=partitioning.batch_sharding(mesh)
  )
