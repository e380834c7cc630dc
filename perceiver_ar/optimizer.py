"""Optimizers and learning rates: optax, put together as published."""

import jax
import jax.numpy as jnp
import optax

from perceiver_ar.config import OptimizerConfig


def make_schedule(config: OptimizerConfig) -> optax.Schedule:
  """The learning rate of step 0, 1, ...: linear warm-up from 0, then a shape.

  'cosine' is at the full rate until `decay_start` and at `final_fraction` of
  it in the last step, `decay_end` - 1. 'steps' multiplies by 0.1 at 50, 80 and
  95 % of `decay_end`. 'rsqrt' is sqrt(warmup / (warmup + t)), t steps after
  the warm-up.
  """
  warmup = config.warmup_steps

  def shape(step: jax.Array) -> jax.Array:
    if config.schedule == 'constant':
      return jnp.ones_like(step)
    if config.schedule == 'cosine':
      span = max(config.decay_end - 1 - config.decay_start, 1)
      done = jnp.clip((step - config.decay_start) / span, 0.0, 1.0)
      cosine = 0.5 * (1 + jnp.cos(jnp.pi * done))
      return config.final_fraction + (1 - config.final_fraction) * cosine
    if config.schedule == 'steps':
      drops = [step >= at * config.decay_end for at in (0.5, 0.8, 0.95)]
      return 0.1 ** jnp.stack(drops).sum(0, dtype=jnp.float32)
    assert config.schedule == 'rsqrt', config.schedule
    since = jnp.maximum(step - warmup, 0.0)
    return jnp.sqrt(max(warmup, 1) / (max(warmup, 1) + since))

  def schedule(count: jax.typing.ArrayLike) -> jax.Array:
    step = jnp.asarray(count, jnp.float32)
    ramp = jnp.minimum(step / max(warmup, 1), 1.0) if warmup else 1.0
    return config.learning_rate * ramp * shape(step)

  return schedule


def make_optimizer(config: OptimizerConfig) -> optax.GradientTransformation:
  """Clipping by global norm, the update rule, the learning rate."""
  steps = [
    _update_rule(config),
    optax.scale_by_learning_rate(make_schedule(config)),
  ]
  if config.clip_norm:
    steps.insert(0, optax.clip_by_global_norm(config.clip_norm))
  return optax.chain(*steps)


def _update_rule(config: OptimizerConfig) -> optax.GradientTransformation:
  adam = _scale_by_adam(config)
  decay = optax.add_decayed_weights(config.weight_decay, mask=_is_matrix)
  if config.name == 'adam':
    return adam
  if config.name == 'adamw':
    return optax.chain(adam, decay)
  if config.name == 'lamb':
    return optax.chain(adam, decay, optax.scale_by_trust_ratio())
  if config.name == 'adafactor':
    # The learning rate is ours, so that every optimizer has the same schedule.
    return optax.chain(
      optax.scale_by_factored_rms(),
      optax.clip_by_block_rms(1.0),
      optax.scale_by_param_block_rms(),
      decay,
    )
  assert config.name == 'sgd', config.name
  return optax.trace(
    decay=config.b1, nesterov=True, accumulator_dtype=config.momentum_dtype
  )


def _scale_by_adam(config: OptimizerConfig) -> optax.GradientTransformation:
  """Optax's; second moments rest in a type of their own, which it lacks."""
  adam = optax.scale_by_adam(
    b1=config.b1,
    b2=config.b2,
    eps=config.eps,
    mu_dtype=config.momentum_dtype,
  )

  def cast(state: optax.OptState, dtype: str) -> optax.ScaleByAdamState:
    assert isinstance(state, optax.ScaleByAdamState)
    return state._replace(nu=optax.tree.cast(state.nu, dtype))

  def init(params: optax.Params) -> optax.OptState:
    return cast(adam.init(params), config.variance_dtype)

  def update(
    updates: optax.Updates,
    state: optax.OptState,
    params: optax.Params | None = None,
  ) -> tuple[optax.Updates, optax.OptState]:
    updates, state = adam.update(updates, cast(state, 'float32'), params)
    return updates, cast(state, config.variance_dtype)

  return optax.GradientTransformation(init, update)


def _is_matrix(params: optax.Params) -> optax.Params:
  """Weight decay leaves biases, scales and offsets alone."""

  def is_matrix(path: tuple, _: jax.Array) -> bool:
    return path[-1].key not in ('bias', 'scale')

  return jax.tree_util.tree_map_with_path(is_matrix, params)
