"""What a run begins with: what it says, its first state, its compiled step."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from perceiver_ar import (
  checkpoint,
  replicas,
  sharded_attention,
  train_step,
  workdir,
)
from perceiver_ar.config import Config
from perceiver_ar.data import pipeline
from perceiver_ar.plan import plans
from perceiver_ar.train_step import Batch, TrainState


def announce(
  config: Config,
  mesh: Mesh,
  abstract: TrainState,
  documents: pipeline.DocumentSource,
  first_step: int,
) -> None:
  """What runs where, in a few lines."""
  if jax.process_index():
    return
  num = sum(x.size for x in jax.tree.leaves(abstract.params))
  device = mesh.devices.flat[0]
  axes = ', '.join(f'{n} {s}' for n, s in mesh.shape.items() if s > 1)
  model = config.model
  sizes = (
    model.embed_width // model.num_cross_heads,
    model.width // model.num_self_heads,
  )
  kernels = dict.fromkeys(
    sharded_attention.choose(model, mesh.abstract_mesh, size).name
    for size in sizes
  )
  print(
    f'{mesh.size} x {device.device_kind}'
    + (f' ({axes})' if axes else '')
    + f'; {num:,} parameters; {", ".join(kernels)} attention, {model.dtype}'
  )
  every = config.train.check_replicas_every
  if unseen := replicas.uncompared(abstract.params, every):
    print(unseen)
  if config.data.kind != 'copy':  # whose documents have no end
    tokens = int(documents.num_tokens.sum())
    print(f'train data: {len(documents):,} documents, {tokens:,} tokens')
  num_steps = config.train.num_steps
  if first_step >= num_steps:
    print(f'nothing to do: step {first_step} of {num_steps} is reached')
  elif first_step:
    print(f'goes on from step {first_step} of {num_steps}')


def first_state(
  config: Config, mesh: Mesh, documents: pipeline.DocumentSource
) -> TrainState:
  """Step 0: drawn from the seed, or with the parameters of another run."""
  state = train_step.init_state(config, mesh)
  source = config.checkpoint.init_from
  if not source:
    return state
  workdir.check_vocabulary(source, documents)
  abstract = train_step.abstract_params(config, mesh)
  step, params = checkpoint.restore_params(
    source, abstract, None, config.checkpoint.max_host_gb
  )
  if jax.process_index() == 0:
    print(f'begins with the parameters of {source} at step {step:,}')
  return dataclasses.replace(state, params=params)


def compile_step(
  config: Config, mesh: Mesh, state: TrainState, batch: Batch
) -> Any:
  """`train_step.make_train_step`'s, compiled.

  Raises:
    UserError: it does not fit the memory of a TPU.
  """
  is_tpu = mesh.devices.flat[0].platform == 'tpu'
  if is_tpu and config.train.check_memory:
    return plans.fitting_step(config, mesh, batch)
  step = train_step.make_train_step(config, mesh)
  return step.lower(state, batch).compile()
