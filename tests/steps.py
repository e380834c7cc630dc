"""The tiny model on a mesh, for tests of what changes no result."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from tiny import make_batch, make_config, make_params

from perceiver_ar import chips, partitioning, train_step
from perceiver_ar import gradients as gradients_lib
from perceiver_ar.config import Config
from perceiver_ar.plan import collectives, programs
from perceiver_ar.plan.hlo import Module
from perceiver_ar.skipping import UsualLoss

SINUSOIDAL = {'model.position_encoding': 'sinusoidal'}
# Documents that fill the context, short ones, one of one token, and none.
LENGTHS = [24, 11, 24, 5, 1, 24, 0, 17]


def num_devices(config: Config) -> int:
  sizes = dataclasses.asdict(config.mesh)
  return int(np.prod([sizes[k] for k in ('slice', 'data', 'context', 'model')]))


def place(config: Config) -> Any:
  """The mesh, and a state of parameters of which none is zero."""
  mesh = partitioning.make_mesh(
    config.mesh, jax.devices()[: num_devices(config)]
  )
  abstract = train_step.abstract_state(config, mesh)
  optimizer = train_step.make_optimizer(config.optimizer)
  params = make_params(config.model)
  state = train_step.TrainState(
    *(jnp.int32(0), params, jax.jit(optimizer.init)(params)),
    *(jnp.int32(0), jnp.int32(0), UsualLoss.empty()),
  )
  # Copies: a step takes over the buffers of its state.
  put = lambda x, a: jax.device_put(np.array(x, a.dtype), a.sharding)
  return mesh, jax.tree.map(put, state, abstract)


def config_on(mesh: dict[str, Any], **changes: Any) -> Config:
  keys = {'slice': 1, 'data': 1, 'context': 1, 'model': 1} | mesh
  return make_config({f'mesh.{k}': v for k, v in keys.items()} | changes)


def global_batch(config: Config, mesh: Any) -> Any:
  rows = make_batch(config.model, LENGTHS, 0)
  return partitioning.global_batch(rows, mesh, config.train.batch_size)


@functools.cache
def gradients(config: Config) -> Any:
  """Sums, gradients on the host, and the lowered program."""
  mesh, state = place(config)

  def run(params: Any, batch: Any) -> Any:
    with gradients_lib.activations(config, mesh):
      key = jax.random.key(0)
      return gradients_lib.accumulate(params, batch, key, config)

  shardings = jax.tree.map(lambda x: x.sharding, state.params)
  lowered = jax.jit(run, out_shardings=(shardings, None)).lower(
    state.params, global_batch(config, mesh)
  )
  grads, sums = lowered.compile()(state.params, global_batch(config, mesh))
  return jax.device_get(sums), jax.device_get(grads), lowered.as_text()


def sent(config: Config) -> list[collectives.Collective]:
  """The collectives of a compiled training step."""
  mesh = partitioning.make_mesh(
    config.mesh, jax.devices()[: num_devices(config)]
  )
  program = programs.make_program('train', config, mesh)
  module = Module(program.function.lower(*program.args).compile().as_text())
  num_layers = config.model.num_layers
  return collectives.collect(module, mesh, chips.cpu(2**30), num_layers)


def assert_close(got: Any, want: Any) -> None:
  def leaf(path: Any, a: Any, b: Any) -> None:
    name = jax.tree_util.keystr(path)
    # Without rotation the biases of keys have no gradient, only what rounding
    # leaves of terms as large as those of their kernels, which are 3.
    least = 0.3 if name.endswith("['key']['bias']") else 0.1
    scale = max(np.abs(b).max(), least)
    np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5 * scale, err_msg=name)

  jax.tree_util.tree_map_with_path(leaf, got, want)
