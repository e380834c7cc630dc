"""The configuration: frozen dataclasses, checked once, with no defaults.

A config file (`configs/*.py`) holds every key; `resolve` turns its ConfigDict
into the `Config` that the rest of the package sees. Keys are documented where
their values stand, in `configs/default.py`.
"""

import dataclasses
import difflib
import json
from collections.abc import Mapping
from typing import Any

from perceiver_ar.errors import UserError

MESH_AXES = ('slice', 'data', 'context', 'model')


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelConfig:
  vocab_size: int
  context_length: int
  num_latents: int
  num_layers: int
  width: int
  embed_width: int
  num_cross_heads: int
  num_self_heads: int
  cross_mlp_width: int
  mlp_width: int
  activation: str
  position_encoding: str
  position_source: str
  position_sizes: tuple[int, ...]
  rotary_fraction: float
  rotary_head_fraction: float
  rotary_max_wavelength: int
  dropout_rate: float
  input_dropout_rate: float
  num_kept_inputs: int
  dtype: str
  remat: str
  scan_unroll: int
  attention: str
  attention_block: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  kind: str
  path: str
  visits: str
  min_crop: int
  copy_length: int
  copy_offset: int
  num_eval_documents: int
  num_read_threads: int
  prefetch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  num_steps: int
  batch_size: int
  num_microbatches: int
  seed: int
  z_loss: float
  label_smoothing: float
  max_nonfinite_steps: int
  log_every: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class OptimizerConfig:
  name: str
  learning_rate: float
  schedule: str
  warmup_steps: int
  decay_start: int
  decay_end: int
  final_fraction: float
  gradient: str
  clip_norm: float
  b1: float
  b2: float
  eps: float
  weight_decay: float


@dataclasses.dataclass(frozen=True, kw_only=True)
class MeshConfig:
  slice: int
  data: int
  context: int
  model: int
  rules: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class CheckpointConfig:
  init_from: str
  save_every: int
  keep_latest: int
  keep_best: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
  every: int
  split: str
  batch_size: int
  stride: int
  num_latents: int
  context_length: int
  max_examples: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class SampleConfig:
  num_samples: int
  length: int
  temperature: float
  top_p: float
  top_k: int
  seed: int
  num_latents: int
  refill_latents: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class Config:
  """Everything that a run is made of, apart from its data."""

  model: ModelConfig
  data: DataConfig
  train: TrainConfig
  optimizer: OptimizerConfig
  mesh: MeshConfig
  checkpoint: CheckpointConfig
  evaluate: EvaluateConfig
  sample: SampleConfig

  def to_json(self) -> str:
    return json.dumps(dataclasses.asdict(self), indent=2) + '\n'


# Keys that a run may change when it resumes: what it computes stays the same.
# A longer run keeps its schedule: `optimizer.decay_end` is compared.
MAY_DIFFER = (
  'checkpoint',
  'data.num_read_threads',
  'data.path',  # the data set itself is known by its fingerprint
  'data.prefetch',
  'evaluate',
  'mesh',
  'sample',
  'train.log_every',
  'train.max_nonfinite_steps',
  'train.num_steps',
)


def resolve(raw: Mapping[str, Any]) -> Config:
  """Checks a complete nested mapping (a ConfigDict, or JSON) as a `Config`.

  Raises:
    UserError: a key is unknown, missing, of another type or at odds with
      another; the sentence names it.
  """
  sections = {f.name: f.type for f in dataclasses.fields(Config)}
  _check_names(raw, list(sections), '')
  config = Config(
    **{name: _section(cls, raw[name], name) for name, cls in sections.items()}
  )
  if config.optimizer.schedule in ('constant', 'rsqrt'):
    # They never end, so a longer run of them is the same run.
    endless = dataclasses.replace(config.optimizer, decay_start=0, decay_end=0)
    config = dataclasses.replace(config, optimizer=endless)
  _check(config)
  return config


def differences(old: Config, new: Config) -> list[str]:
  """The keys, outside `MAY_DIFFER`, on which two configs disagree."""
  lines = []
  for section, values in dataclasses.asdict(old).items():
    for name, was in values.items():
      key, now = f'{section}.{name}', getattr(getattr(new, section), name)
      if was != now and not {section, key} & set(MAY_DIFFER):
        lines.append(f'{key}: {was!r} -> {now!r}')
  return lines


def _section(cls: Any, raw: Mapping[str, Any], section: str) -> Any:
  fields = {f.name: f.type for f in dataclasses.fields(cls)}
  _check_names(raw, list(fields), f'{section}.')
  return cls(
    **{
      name: _typed(raw[name], kind, f'{section}.{name}')
      for name, kind in fields.items()
    }
  )


def _check_names(raw: Mapping[str, Any], known: list[str], prefix: str) -> None:
  for name in raw:
    if name not in known:
      near = difflib.get_close_matches(name, known, n=1, cutoff=0.0)
      raise UserError(
        f'config key {prefix}{name} does not exist; the nearest is '
        f'{prefix}{near[0]}'
      )
  for name in known:
    if name not in raw:
      raise UserError(
        f'config key {prefix}{name} is missing; start from '
        'configs/default.py, which lists every key'
      )


def _typed(value: Any, kind: Any, key: str) -> Any:
  if kind is float and type(value) is int:
    return float(value)
  if kind == tuple[int, ...]:
    if isinstance(value, list | tuple) and all(type(v) is int for v in value):
      return tuple(value)
  elif type(value) is kind:
    return value
  name = 'tuple of int' if kind == tuple[int, ...] else kind.__name__
  raise UserError(f'config key {key} is {value!r}; it must be a {name}')


def _require(ok: bool, message: str) -> None:
  if not ok:
    raise UserError(message)


def _check(config: Config) -> None:
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
  'model.remat': ('none', 'dots', 'full'),
  'model.attention': ('chunked', 'reference'),
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
  'optimizer.name': ('adam', 'adamw', 'adafactor', 'sgd', 'lamb'),
  'optimizer.schedule': ('constant', 'cosine', 'steps', 'rsqrt'),
  'optimizer.gradient': ('sum', 'mean'),
  'mesh.rules': ('replicated', 'fsdp', 'tensor', 'fsdp_tensor'),
}
_POSITIVE = {
  'model': (
    'vocab_size context_length num_latents num_layers width embed_width '
    'num_cross_heads num_self_heads cross_mlp_width mlp_width scan_unroll '
    'attention_block rotary_max_wavelength'
  ),
  'data': 'min_crop num_read_threads prefetch',
  'train': 'num_steps batch_size num_microbatches log_every '
  'max_nonfinite_steps',
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
_BELOW_ONE = {'train': 'label_smoothing', 'optimizer': 'b1 b2'}


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
