"""What a config must satisfy: choices, ranges, and keys that go together."""

from __future__ import annotations

import dataclasses
from typing import TYPE_CHECKING

from perceiver_ar.errors import UserError

if TYPE_CHECKING:  # which checks itself by these
  from perceiver_ar.config import Config, ModelConfig


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise UserError(message)


def check(config: Config) -> None:
  """Raises UserError on the first key that is wrong, which it names."""
  _check_choices(config)
  _check_ranges(config)
  _check_model(config.model)
  _check_training(config)
  for key, num_latents, context_length in (
    ('evaluate', config.evaluate.num_latents, config.evaluate.context_length),
    ('sample', config.sample.num_latents, config.model.context_length),
  ):
    _require(
      num_latents <= context_length,
      f'{key}.num_latents {num_latents} exceeds the context length '
      f'{context_length}; lower it',
    )
  model, longest = config.model, config.evaluate.context_length
  _require(
    model.position_encoding != 'learned'
    or model.position_source == 'data'
    or model.position_sizes[0] >= longest,
    f'evaluate.context_length {longest} exceeds the '
    f'{model.position_sizes[0]} learned positions of the model; lower it',
  )
  _require(
    config.evaluate.stride <= config.evaluate.num_latents,
    f'evaluate.stride {config.evaluate.stride} exceeds evaluate.num_latents '
    f'{config.evaluate.num_latents}: a block cannot score more tokens than it '
    'has latents; lower the stride',
  )
  _require(
    config.sample.refill_latents <= config.sample.num_latents,
    f'sample.refill_latents {config.sample.refill_latents} exceeds '
    f'sample.num_latents {config.sample.num_latents}; lower it',
  )


_CHOICES = {
  'model.position_encoding': ('rotary', 'sinusoidal', 'learned'),
  'model.position_source': ('data', 'from_end', 'from_end_negated'),
  'model.dtype': ('float32', 'bfloat16'),
  'model.param_dtype': ('float32', 'bfloat16'),
  'model.remat': ('none', 'dots', 'attention', 'full', 'offload'),
  'model.attention': ('auto', 'chunked', 'flash', 'cudnn', 'reference'),
  'model.token_table': ('auto', 'always', 'never'),
  'model.activation': (
    'sq_relu',
    'relu',
    'gelu',
    'silu',
    'tanh',
    'elu',
    'leaky_relu',
    'selu',
    'softplus',
    'mish',
  ),
  'data.kind': ('prepared', 'copy'),
  'data.visits': ('once', 'by_length'),
  'data.damaged': ('stop', 'skip'),
  'optimizer.name': ('adam', 'adamw', 'adafactor', 'sgd', 'lamb'),
  'optimizer.schedule': ('constant', 'cosine', 'steps', 'rsqrt'),
  'optimizer.gradient': ('sum', 'mean'),
  'optimizer.momentum_dtype': ('float32', 'bfloat16'),
  'optimizer.variance_dtype': ('float32', 'bfloat16'),
  'mesh.rules': (
    'replicated',
    'fsdp',
    'tensor',
    'fsdp_tensor',
    'fsdp_tensor_vocab',
    'context',
  ),
}
_POSITIVE = {
  'model': (
    'vocab_size context_length num_latents num_layers width embed_width '
    'num_cross_heads num_self_heads cross_mlp_width mlp_width scan_unroll '
    'attention_block rotary_max_wavelength'
  ),
  'data': 'min_crop num_read_threads prefetch',
  'train': 'num_steps batch_size num_microbatches log_every max_skipped_steps',
  'optimizer': 'learning_rate eps',
  'checkpoint': 'save_every keep_latest',
  'evaluate': 'batch_size stride num_latents context_length',
  'sample': 'num_samples length num_latents refill_latents',
}
_RATES = {
  'model': (
    'rotary_fraction rotary_head_fraction dropout_rate input_dropout_rate'
  ),
  'optimizer': 'final_fraction',
  'sample': 'top_p',
}
# Their complements are divided by, or have a logarithm.
_BELOW_ONE = {
  'model': 'dropout_rate',
  'train': 'label_smoothing',
  'optimizer': 'b1 b2',
}


def _check_choices(config: Config) -> None:
  for key, choices in _CHOICES.items():
    section, name = key.split('.')
    value = getattr(getattr(config, section), name)
    _require(
      value in choices,
      f'config key {key} is {value!r}; it must be one of {", ".join(choices)}',
    )


def _check_ranges(config: Config) -> None:
  """Counts are at least one, rates lie in [0, 1], nothing else is negative."""
  for section, values in dataclasses.asdict(config).items():
    positive = _POSITIVE.get(section, '').split()
    rates = _RATES.get(section, '').split()
    below_one = _BELOW_ONE.get(section, '').split()
    for name, value in values.items():
      key = f'{section}.{name}'
      if section == 'mesh' or not isinstance(value, int | float):
        continue
      _require(value >= 0, f'config key {key} is {value}; it must be >= 0')
      _require(
        value < 2**63, f'config key {key} is {value}; it must be < 2**63'
      )
      if name == 'seed':
        _require(
          value < 2**32, f'config key {key} is {value}; it must be < 2**32'
        )
      if name in positive:
        _require(value > 0, f'config key {key} is {value}; it must be > 0')
      if name in rates:
        _require(value <= 1, f'config key {key} is {value}; it must be <= 1')
      if name in below_one:
        _require(value < 1, f'config key {key} is {value}; it must be < 1')


def _check_model(model: ModelConfig) -> None:
  _require(
    model.num_latents <= model.context_length,
    f'model.num_latents {model.num_latents} exceeds model.context_length '
    f'{model.context_length}; the latents are the last inputs: lower the one '
    'or raise the other',
  )
  for width, heads in (
    ('embed_width', 'num_cross_heads'),
    ('width', 'num_self_heads'),
  ):
    w, h = getattr(model, width), getattr(model, heads)
    _require(
      w % h == 0,
      f'model.{width} {w} is not divisible by model.{heads} {h}; choose a '
      f'width that is, such as {-(-w // h) * h}',
    )
  _require(
    model.token_table != 'always' or model.position_encoding == 'rotary',
    f'model.token_table always needs rotary positions, and '
    f'model.position_encoding is {model.position_encoding}, which is part of '
    'the embeddings; use auto',
  )
  _require(
    not (model.input_dropout_rate and model.num_kept_inputs),
    f'model.input_dropout_rate {model.input_dropout_rate} and '
    f'model.num_kept_inputs {model.num_kept_inputs} both drop inputs; set one '
    'of them to 0',
  )
  _require(
    model.num_kept_inputs <= model.context_length,
    f'model.num_kept_inputs {model.num_kept_inputs} exceeds '
    f'model.context_length {model.context_length}; lower it, or 0 keeps all',
  )
  _check_positions(model)


def _check_positions(model: ModelConfig) -> None:
  num_axes = len(model.position_sizes)
  _require(
    num_axes >= 1,
    'model.position_sizes is empty; give one size per position axis',
  )
  if model.position_encoding == 'rotary':
    _require(
      num_axes == 1,
      f'model.position_sizes {model.position_sizes} has {num_axes} axes, and '
      'rotary positions have one; use learned or sinusoidal positions',
    )
    _require(
      model.rotary_max_wavelength >= model.context_length,
      f'model.rotary_max_wavelength {model.rotary_max_wavelength} is below '
      f'model.context_length {model.context_length}; raise it',
    )
  else:
    _require(
      model.position_source != 'from_end_negated',
      'model.position_source from_end_negated is for rotary positions; use '
      'from_end',
    )
    _require(
      model.position_source == 'data' or num_axes == 1,
      f'model.position_sizes {model.position_sizes} has {num_axes} axes, and '
      'positions counted from the end have one; set model.position_source to '
      'data',
    )
  if model.position_encoding == 'learned':
    _require(
      min(model.position_sizes) > 0,
      f'model.position_sizes {model.position_sizes}: learned positions need '
      'the number of rows of every table',
    )
    _require(
      model.position_source == 'data'
      or model.position_sizes[0] >= model.context_length,
      f'model.position_sizes {model.position_sizes} is below '
      f'model.context_length {model.context_length}, and positions counted '
      'from the end reach it; raise it',
    )
  if model.position_encoding == 'sinusoidal':
    _require(
      model.embed_width % 2 == 0 and model.embed_width >= 4,
      f'model.embed_width {model.embed_width} must be even and at least 4 '
      'for sinusoidal positions',
    )


def _check_training(config: Config) -> None:
  optimizer, train = config.optimizer, config.train
  _require(
    train.batch_size % train.num_microbatches == 0,
    f'train.batch_size {train.batch_size} is not divisible by '
    f'train.num_microbatches {train.num_microbatches}',
  )
  _require(
    not optimizer.weight_decay or optimizer.name not in ('adam', 'sgd'),
    f'optimizer.weight_decay {optimizer.weight_decay} means nothing to '
    f'{optimizer.name}; use adamw, lamb or adafactor, or set it to 0',
  )
  _require(
    optimizer.momentum_dtype == 'float32' or optimizer.name != 'adafactor',
    f'optimizer.momentum_dtype {optimizer.momentum_dtype} means nothing to '
    'adafactor, which has no momentum; set it to float32',
  )
  if optimizer.variance_dtype != 'float32':
    _require(
      optimizer.name in ('adam', 'adamw', 'lamb'),
      f'optimizer.variance_dtype {optimizer.variance_dtype} means nothing to '
      f'{optimizer.name}; set it to float32',
    )
    # Half of what its last bit is worth is up to 0.4 % of a number: with 0.95
    # they rest where they are up to 8 % off, which is 4 % of an update.
    _require(
      optimizer.b2 <= 0.95,
      f'optimizer.b2 {optimizer.b2} has second moments change by less than '
      f'{optimizer.variance_dtype} can tell: they would stand still far from '
      'their mean; lower it to 0.95, or set the type to float32',
    )
  if optimizer.schedule == 'cosine':
    _require(
      optimizer.warmup_steps <= optimizer.decay_start < optimizer.decay_end,
      f'optimizer.decay_start {optimizer.decay_start} must lie between '
      f'optimizer.warmup_steps {optimizer.warmup_steps} and '
      f'optimizer.decay_end {optimizer.decay_end}; lower '
      'optimizer.warmup_steps, or raise train.num_steps',
    )
  _require(
    optimizer.schedule != 'steps' or optimizer.decay_end > 0,
    'optimizer.decay_end is 0, where schedule steps ends; raise it',
  )
  keep = config.checkpoint
  _require(
    keep.keep_every % keep.save_every == 0,
    f'checkpoint.keep_every {keep.keep_every} is no multiple of '
    f'checkpoint.save_every {keep.save_every}: not all of these steps are '
    'saved; change one of them',
  )
  _require(
    config.data.min_crop <= config.model.context_length,
    f'data.min_crop {config.data.min_crop} exceeds model.context_length '
    f'{config.model.context_length}; lower it',
  )
  if config.data.kind == 'copy':
    _require(
      config.data.copy_length >= 4 and config.data.copy_length % 2 == 0,
      f'data.copy_length {config.data.copy_length} must be even and at least '
      '4: SOS, half, its mirror image, EOS',
    )
