"""What a run begins with: its first state, and its compiled step."""

import dataclasses
from typing import Any

import jax
from jax.sharding import Mesh

from perceiver_ar import checkpoint, train_step, workdir
from perceiver_ar.config import Config
from perceiver_ar.data import pipeline
from perceiver_ar.plan import plans
from perceiver_ar.train_step import Batch, TrainState


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
