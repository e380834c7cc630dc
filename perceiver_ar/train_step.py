"""One optimisation step: pure functions of (state, batch).

Losses, counts and gradients are summed over microbatches and devices and
divided once, so that a step does not depend on how its batch was cut.

Letters: B batch, M inputs, P position axes.
"""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import Mesh

from perceiver_ar import flops, gradients, parameters, partitioning
from perceiver_ar.config import Config
from perceiver_ar.gradients import Batch, Sums
from perceiver_ar.optimizer import make_optimizer, make_schedule
from perceiver_ar.parameters import Params, in_float32, with_shardings
from perceiver_ar.skipping import UsualLoss


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
  """All that a run needs to go on; randomness and data follow from `step`.

  Leaves are arrays, or their shapes and shardings in `abstract_state`.

  Attributes:
    step: batches seen, skipped ones too.
    params: of `model.param_dtype`; gradients and moments are float32.
    opt_state: of optax.
    num_skipped: steps that were not finite, or spikes.
    num_skipped_in_a_row: the same, since the last one that was neither.
    usual_loss: of the others.
  """

  step: Any
  params: Params
  opt_state: Any
  num_skipped: Any
  num_skipped_in_a_row: Any
  usual_loss: UsualLoss


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Shapes, types and shardings of the state; nothing is allocated."""
  params = parameters.abstract(config, mesh)
  optimizer = make_optimizer(config.optimizer)
  shardings = partitioning.optimizer_shardings(
    optimizer,
    in_float32(params),
    jax.tree.map(lambda x: x.sharding, params),
    mesh,
  )
  if config.optimizer.offload:
    shardings = jax.tree.map(
      lambda s: s.with_memory_kind('pinned_host'), shardings
    )
  count, number = (
    jax.ShapeDtypeStruct((), dtype, sharding=partitioning.replicated(mesh))
    for dtype in (jnp.int32, jnp.float32)
  )
  return TrainState(
    step=count,
    params=params,
    opt_state=with_shardings(
      jax.eval_shape(lambda x: optimizer.init(in_float32(x)), params),
      shardings,
    ),
    num_skipped=count,
    num_skipped_in_a_row=count,
    usual_loss=UsualLoss(count, number, number),
  )


def init_state(config: Config, mesh: Mesh) -> TrainState:
  """The state before the first step, on the devices where it belongs."""
  optimizer = make_optimizer(config.optimizer)

  def init(key: jax.Array) -> TrainState:
    params = parameters.initial(config.model, key)
    zero = jnp.int32(0)
    opt_state = optimizer.init(in_float32(params))
    return TrainState(zero, params, opt_state, zero, zero, UsualLoss.empty())

  shardings = jax.tree.map(lambda x: x.sharding, abstract_state(config, mesh))
  key = jax.random.key(config.train.seed)
  return jax.jit(init, out_shardings=shardings)(key)


def make_train_step(
  config: Config, mesh: Mesh
) -> Callable[[TrainState, Batch], tuple[TrainState, Sums]]:
  """The compiled step; it takes over the buffers of the state it is given."""
  abstract = abstract_state(config, mesh)
  shardings = jax.tree.map(lambda x: x.sharding, abstract)

  def step(state: TrainState, batch: Batch) -> tuple[TrainState, Sums]:
    with gradients.activations(config, mesh):
      return train_step(state, batch, config)

  return jax.jit(
    step,
    donate_argnums=0,
    in_shardings=(shardings, partitioning.batch_sharding(mesh)),
    out_shardings=(shardings, partitioning.replicated(mesh)),
  )


def saved_flops(config: Config, mesh: Mesh) -> int:
  """Of `flops.train_flops` of a batch, what the token table saves."""
  model, train = config.model, config.train
  num = train.batch_size * (model.num_kept_inputs or model.context_length)
  parts = train.num_microbatches * partitioning.num_input_parts(mesh)
  return 3 * flops.saved_flops(model, num_inputs=num, num_parts=parts)


def train_step(
  state: TrainState, batch: Batch, config: Config
) -> tuple[TrainState, Sums]:
  """One update.

  Args:
    state: of `init_state`.
    batch: `tokens` [B, M + 1], right-aligned, and `positions` [B, M, P].
    config: static.

  Returns:
    The next state, and the step's metrics: `loss`, `z_loss` and `correct`
    summed over `num_targets`, `grad_norm` before clipping, `learning_rate`,
    `skipped`, `is_spike` if it was for that, and `num_skipped_in_a_row`.
  """
  key = jax.random.fold_in(jax.random.key(config.train.seed), state.step)
  grads, sums = gradients.accumulate(state.params, batch, key, config)
  old_params = in_float32(state.params)
  old_opt_state = state.opt_state
  if config.optimizer.offload:
    old_opt_state = jax.device_put(old_opt_state, jax.memory.Space.Device)
  if config.optimizer.gradient == 'mean':
    count = jnp.maximum(sums['num_targets'], 1)
    grads = jax.tree.map(lambda g: g / count, grads)
  norm = optax.tree.norm(grads)
  optimizer = make_optimizer(config.optimizer)
  updates, opt_state = optimizer.update(grads, old_opt_state, old_params)
  params = jax.tree.map(
    lambda new, old: new.astype(old.dtype),
    optax.apply_updates(old_params, updates),
    state.params,
  )

  is_finite = jnp.isfinite(norm) & jnp.isfinite(sums['loss'])
  loss = sums['loss'] / jnp.maximum(sums['num_targets'], 1)
  deviations = config.train.spike_deviations
  is_spike = is_finite & state.usual_loss.is_exceeded(loss, deviations)
  is_good = is_finite & ~is_spike
  params, opt_state, usual_loss = jax.tree.map(
    lambda new, old: jnp.where(is_good, new, old),
    (params, opt_state, state.usual_loss.including(loss)),
    (state.params, old_opt_state, state.usual_loss),
  )
  skipped = 1 - is_good.astype(jnp.int32)
  in_a_row = (state.num_skipped_in_a_row + 1) * skipped
  metrics = sums | {
    'grad_norm': norm,
    # A skipped step does not count: optax has not seen it.
    'learning_rate': make_schedule(config.optimizer)(
      state.step - state.num_skipped
    ),
    'skipped': skipped,
    'is_spike': is_spike.astype(jnp.int32),
    'num_skipped_in_a_row': in_a_row,
  }
  state = TrainState(
    step=state.step + 1,
    params=params,
    opt_state=opt_state,
    num_skipped=state.num_skipped + skipped,
    num_skipped_in_a_row=in_a_row,
    usual_loss=usual_loss,
  )
  return state, metrics
