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

from perceiver_ar import config_checks
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
  param_dtype: str
  remat: str
  scan_unroll: int
  attention: str
  attention_block: int
  logits_block: int
  token_table: str


@dataclasses.dataclass(frozen=True, kw_only=True)
class DataConfig:
  kind: str
  path: str
  visits: str
  min_crop: int
  damaged: str
  copy_length: int
  copy_offset: int
  num_eval_documents: int
  num_read_threads: int
  prefetch: int
  device_prefetch: int


@dataclasses.dataclass(frozen=True, kw_only=True)
class TrainConfig:
  num_steps: int
  batch_size: int
  num_microbatches: int
  reduce_gradients_once: bool
  seed: int
  z_loss: float
  label_smoothing: float
  spike_deviations: float
  max_skipped_steps: int
  hang_seconds: float
  log_every: int
  check_memory: bool
  check_replicas_every: int


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
  momentum_dtype: str
  variance_dtype: str
  offload: bool


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
  save_minutes: float
  keep_latest: int
  keep_best: int
  keep_every: int
  max_host_gb: float


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
  'data.damaged',
  'data.device_prefetch',
  'data.num_read_threads',
  'data.path',  # the data set itself is known by its fingerprint
  'data.prefetch',
  'evaluate',
  'mesh',
  'model.attention',
  'model.attention_block',
  'model.logits_block',
  'model.remat',
  'model.scan_unroll',
  'model.token_table',
  'optimizer.offload',
  'sample',
  'train.check_memory',
  'train.check_replicas_every',
  'train.hang_seconds',
  'train.log_every',
  'train.max_skipped_steps',
  'train.num_microbatches',
  'train.num_steps',
  'train.reduce_gradients_once',
  'train.spike_deviations',  # where it ended a run whose loss moved for good
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
  config_checks.check(config)
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
  if not hasattr(raw, 'keys'):  # a ConfigDict is no Mapping
    raise UserError(
      f'config key {prefix}{known[0]} is missing, as {raw!r} has no keys; '
      'start from configs/default.py, which lists every key'
    )
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
  if kind is float and type(value) is int and abs(value) < 2**63:
    return float(value)
  if kind == tuple[int, ...]:
    if isinstance(value, list | tuple) and all(type(v) is int for v in value):
      return tuple(value)
  elif type(value) is kind:
    return value
  name = 'tuple of int' if kind == tuple[int, ...] else kind.__name__
  raise UserError(f'config key {key} is {value!r}; it must be a {name}')
