"""What a run begins with: what it says, its first state, its compiled step."""

import dataclasses
import sys
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from perceiver_ar import (
  checkpoint,
  distributed,
  parameters,
  partitioning,
  replicas,
  sharded_attention,
  train_step,
  workdir,
)
from perceiver_ar.config import Config
from perceiver_ar.data import pipeline
from perceiver_ar.gradients import Batch
from perceiver_ar.parameters import Params
from perceiver_ar.plan import plans
from perceiver_ar.train_step import TrainState
from perceiver_ar.watchdog import Watchdog


def announce(
  config: Config,
  mesh: Mesh,
  abstract: TrainState,
  documents: pipeline.DocumentSource,
  first_step: int,
  is_evaluation_owed: bool,
) -> None:
  """What runs where, in a few lines."""
  if jax.process_index():
    return
  num = sum(x.size for x in jax.tree.leaves(abstract.params))
  kernels = sharded_attention.names(config.model, mesh.abstract_mesh)
  print(
    f'{_devices(mesh)}; {num:,} parameters; {", ".join(kernels)} attention, '
    f'{config.model.dtype}'
  )
  every = config.train.check_replicas_every
  if unseen := replicas.uncompared(abstract.params, every):
    print(unseen)
  if config.data.kind != 'copy':  # whose documents have no end
    tokens = int(documents.num_tokens.sum())
    print(f'train data: {len(documents):,} documents, {tokens:,} tokens')
  num_steps = config.train.num_steps
  if first_step >= num_steps:
    doing = 'the last evaluation' if is_evaluation_owed else 'nothing'
    print(f'{doing} to do: step {first_step} of {num_steps} is reached')
  elif first_step:
    print(f'goes on from step {first_step} of {num_steps}')


def _devices(mesh: Mesh) -> str:
  axes = ', '.join(f'{n} {s}' for n, s in mesh.shape.items() if s > 1)
  kind = mesh.devices.flat[0].device_kind
  return f'{mesh.size} x {kind}' + (f' ({axes})' if axes else '')


def restore_params(
  config: Config, folder: epath.PathLike, step: int | None, *, samples: bool
) -> tuple[Mesh, int, Params]:
  """The job's mesh, and on it the parameters of a checkpoint, with its step.

  Says what runs where.

  Args:
    config: of the run, with this command's changes.
    folder: of the run.
    step: as in `checkpoint.restore_params`.
    samples: whether attention will be that to a cache.
  """
  distributed.barrier('restore')
  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  workdir.keep_compiled(folder, mesh.devices.flat[0].platform)
  abstract = parameters.abstract(config, mesh)
  step, params = checkpoint.restore_params(
    folder, abstract, step, config.checkpoint.max_host_gb
  )
  model = config.model
  if samples:
    kernels = [sharded_attention.cache_name(model)]
  else:
    kernels = sharded_attention.names(model, mesh.abstract_mesh)
  if jax.process_index() == 0:
    line = f'{_devices(mesh)}; {", ".join(kernels)} attention, {model.dtype}'
    print(line, file=sys.stderr)
  return mesh, step, params


def watched(config: Config) -> Watchdog:
  """Of a command that only reads: one process alone holds up nobody."""
  seconds = config.train.hang_seconds if jax.process_count() > 1 else 0.0
  return Watchdog(seconds, 'restore', 'restoring the parameters')


def first_state(
  config: Config, mesh: Mesh, documents: pipeline.DocumentSource
) -> TrainState:
  """Step 0: drawn from the seed, or with the parameters of another run."""
  state = train_step.init_state(config, mesh)
  source = config.checkpoint.init_from
  if not source:
    return state
  workdir.check_vocabulary(source, documents)
  abstract = parameters.abstract(config, mesh)
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
