"""One optimisation step: pure functions of (state, batch).

Losses, counts and gradients are summed over microbatches and devices and
divided once, so that a step does not depend on how its batch was cut.

Letters: B batch, M inputs, N latents, P position axes, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import optax
from flax import linen as nn
from jax.sharding import Mesh, PartitionSpec

from perceiver_ar import flops, losses, partitioning
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.optimizer import make_optimizer, make_schedule
from perceiver_ar.skipping import UsualLoss

Params: TypeAlias = Any
Batch: TypeAlias = dict[str, jax.Array]
Sums: TypeAlias = dict[str, jax.Array]


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


def _initial_params(config: ModelConfig, key: jax.Array) -> Params:
  """Parameters boxed with their logical axes."""
  M, N, P = config.context_length, config.num_latents, config.position_sizes
  params = PerceiverAR(config).init(
    key,
    jnp.ones((1, M), jnp.int32),
    jnp.ones((1, M, len(P)), jnp.int32),
    num_latents=N,
  )['params']
  return jax.tree.map(lambda x: x.astype(config.param_dtype), params)


@functools.cache
def _initial_shapes(config: ModelConfig) -> Params:
  """Of `_initial_params`; tracing a model takes longer than a step of it."""
  return jax.eval_shape(
    functools.partial(_initial_params, config), jax.random.key(0)
  )


def abstract_params(config: Config, mesh: Mesh) -> Params:
  """Shapes, types and shardings of the parameters; nothing is allocated."""
  boxed = _initial_shapes(config.model)
  shardings = partitioning.parameter_shardings(
    boxed, mesh, partitioning.parameter_rules(config.mesh.rules)
  )
  return _with_shardings(nn.unbox(boxed), shardings)


def abstract_state(config: Config, mesh: Mesh) -> TrainState:
  """Shapes, types and shardings of the state; nothing is allocated."""
  params = abstract_params(config, mesh)
  optimizer = make_optimizer(config.optimizer)
  shardings = partitioning.optimizer_shardings(
    optimizer,
    _in_float32(params),
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
    opt_state=_with_shardings(
      jax.eval_shape(lambda x: optimizer.init(_in_float32(x)), params),
      shardings,
    ),
    num_skipped=count,
    num_skipped_in_a_row=count,
    usual_loss=UsualLoss(count, number, number),
  )


def _in_float32(tree: Any) -> Any:
  """What the optimizer sees, of arrays or of their shapes."""

  def one(x: Any) -> Any:
    if isinstance(x, jax.ShapeDtypeStruct):
      return x.update(dtype=jnp.float32)
    return x.astype(jnp.float32)

  return jax.tree.map(one, tree)


def _with_shardings(tree: Any, shardings: Any) -> Any:
  return jax.tree.map(
    lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s),
    tree,
    shardings,
  )


def init_state(config: Config, mesh: Mesh) -> TrainState:
  """The state before the first step, on the devices where it belongs."""
  optimizer = make_optimizer(config.optimizer)

  def init(key: jax.Array) -> TrainState:
    params = nn.unbox(_initial_params(config.model, key))
    zero = jnp.int32(0)
    opt_state = optimizer.init(_in_float32(params))
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
    with partitioning.activations(
      mesh,
      config.mesh.rules,
      num_rows=config.train.batch_size // config.train.num_microbatches,
      num_latents=config.model.num_latents,
    ):
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
  grads, sums = accumulate(state.params, batch, key, config)
  old_params = _in_float32(state.params)
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


def accumulate(
  params: Params, batch: Batch, key: jax.Array, config: Config
) -> tuple[Params, Sums]:
  """Gradients, in float32, and sums over all microbatches.

  A microbatch's are of the type of compute until they are whole.

  Over mesh axes on which parameters are whole, gradients are added up when all
  microbatches are done: once a step they cross, for one, the slow network
  between slices. Over an axis that splits parameters every microbatch's are,
  as no device has room for whole ones.
  """
  row_B = jnp.arange(len(batch['tokens']))
  parts = batch | {'row': row_B}
  num = config.train.num_microbatches
  run = functools.partial(_over_microbatches, config=config)
  axes = partitioning.whole_axes(config.mesh.rules)
  if num == 1 or not axes:
    return run(params, parts, key)

  def local(params: Params, parts: Batch, key: jax.Array) -> Any:
    with partitioning.by_hand(axes):
      sums = run(params, parts, key)
    with jax.named_scope('gradient'):
      return jax.lax.psum(sums, axes)

  rows, whole = PartitionSpec(axes), PartitionSpec()
  return jax.shard_map(
    local,
    in_specs=(whole, rows, whole),
    out_specs=whole,
    axis_names=set(axes),
    check_vma=False,
  )(params, parts, key)


def _over_microbatches(
  params: Params, batch: Batch, key: jax.Array, config: Config
) -> tuple[Params, Sums]:
  num = config.train.num_microbatches

  def grad(batch: Batch) -> tuple[Params, Sums]:
    loss = functools.partial(_loss_sum, config=config)
    grads, sums = jax.grad(loss, has_aux=True)(params, batch, key)
    return _in_float32(grads), sums

  if num == 1:
    return grad(batch)

  def split(x: jax.Array) -> jax.Array:
    # Strided, so that every microbatch has rows of every device.
    return x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1)

  def one(total: Any, micro: Batch) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, grad(micro)), None

  parts = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], parts)
  zeros = jax.tree.map(
    lambda x: jnp.zeros(x.shape, x.dtype), jax.eval_shape(grad, first)
  )
  return jax.lax.scan(one, zeros, parts)[0]


def _loss_sum(
  params: Params, batch: Batch, key: jax.Array, config: Config
) -> tuple[jax.Array, Sums]:
  """The summed loss of a microbatch, and what is reported of it."""
  model, N = config.model, config.model.num_latents
  drops = model.dropout_rate or model.input_dropout_rate
  with jax.named_scope('ids'):
    inputs_BM, targets_BN, weights_BN = shift(batch['tokens'], N)
  z_BND = PerceiverAR(model).apply(
    {'params': params},
    inputs_BM,
    batch['positions'],
    num_latents=N,
    row_B=batch['row'],
    rngs={'dropout': key} if drops or model.num_kept_inputs else {},
    method=PerceiverAR.encode,
  )
  assert isinstance(z_BND, jax.Array)
  scores = score_latents(
    params,
    z_BND,
    targets_BN,
    model,
    z_loss=config.train.z_loss,
    label_smoothing=config.train.label_smoothing,
  )
  sums = {name: (x_BN * weights_BN).sum() for name, x_BN in scores.items()}
  sums['num_targets'] = weights_BN.sum()
  return sums['loss'] + sums['z_loss'], sums


def score_latents(
  params: Params,
  z_BND: jax.Array,
  targets_BN: jax.Array,
  config: ModelConfig,
  *,
  z_loss: float,
  label_smoothing: float,
) -> Sums:
  """`loss`, `z_loss` and `correct` of every latent, [B, N] float32 each.

  With `model.logits_block` the logits of so many latents of a row exist at a
  time, and are computed again for the backward pass.
  """

  def score(inputs: tuple[jax.Array, jax.Array]) -> Sums:
    z_BnD, targets_Bn = inputs
    logits_BnV = PerceiverAR(config).apply(
      {'params': params}, z_BnD, method=PerceiverAR.predict
    )
    assert isinstance(logits_BnV, jax.Array)
    loss_Bn, z_loss_Bn = losses.softmax_cross_entropy(
      logits_BnV, targets_Bn, z_loss=z_loss, label_smoothing=label_smoothing
    )
    correct_Bn = (logits_BnV.argmax(-1) == targets_Bn).astype(jnp.float32)
    return {'loss': loss_Bn, 'z_loss': z_loss_Bn, 'correct': correct_Bn}

  B, N = targets_BN.shape
  block = config.logits_block or N
  if block >= N:
    return score((z_BND, targets_BN))
  # Strided, so that every block has latents of every device.
  num = -(-N // block)
  parts = z_BND, targets_BN
  parts = jax.tree.map(lambda x: _strided(x, num), parts)
  scores = jax.lax.map(jax.checkpoint(score), parts)
  return jax.tree.map(
    lambda x_nBb: jnp.moveaxis(x_nBb, 0, 2).reshape(B, -1)[:, :N], scores
  )


def _strided(x_BN: jax.Array, num: int) -> jax.Array:
  """Rows [B, N, ...] as `num` blocks of every num-th latent, zero-padded."""
  B, N = x_BN.shape[:2]
  padding = [(0, 0), (0, -N % num)] + [(0, 0)] * (x_BN.ndim - 2)
  x_BN = jnp.pad(x_BN, padding).reshape(B, -1, num, *x_BN.shape[2:])
  return jnp.moveaxis(x_BN, 2, 0)


def shift(
  tokens_BT: jax.Array, num_latents: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Inputs [B, M], and targets and their weights (0 on padding) [B, N]."""
  inputs_BM = tokens_BT[:, :-1]
  targets_BN = tokens_BT[:, -num_latents:]
  is_input_BN = inputs_BM[:, -num_latents:] != 0
  return inputs_BM, targets_BN, is_input_BN.astype(jnp.float32)
