"""One page about a run: WORKDIR/report.html, to read, mail or print.

It is a single file without scripts, and needs nothing from elsewhere. What the
workdir does not hold yet is left out, with a line that says so.
"""

import dataclasses
import datetime
import functools
import importlib.metadata
import json
import math
import os
import platform
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar import config as config_lib
from perceiver_ar import metrics
from perceiver_ar import workdir as workdir_lib
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.report import charts, comparison, page, samples

# What the evaluation may hold, its name and how many digits of it are shown.
_UNITS = {
  'bits_per_byte': ('bits per byte', 3),
  'bits_per_dim': ('bits per dimension', 3),
  'nats_per_event': ('nats per event', 3),
  'word_perplexity': ('perplexity per word', 1),
}
# Where a token is one of these, a training loss is given in bits.
_BITS = {'bytes': 'bits per byte', 'pixels': 'bits per dimension'}
_MAX_POINTS = 1_000  # of a curve; beyond, a point is the mean of some steps
_PACKAGES = (
  'perceiver-ar',
  'jax',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
)


def write(workdir: Path, commands: Sequence[str]) -> Path:
  """Writes the report and returns where it is.

  Args:
    workdir: of a run that has at least begun.
    commands: what made it, as a person would type it.

  Raises:
    UserError: the workdir is no run's, a file in it is broken, or matplotlib
      is not installed.
  """
  run = _read(workdir)
  content = page.document(
    f'Perceiver AR: {workdir.resolve().name}',
    _headline(run),
    _comparison(run),
    _buckets(run),
    _training(run),
    _samples(run),
    _settings(run),
    _origin(commands),
  )
  path = workdir / 'report.html'
  temporary = workdir / 'report.html.tmp'
  temporary.write_text(content, encoding='utf-8')
  temporary.replace(path)
  return path


def compare(workdir: Path) -> comparison.Comparison:
  """The model and simple codes, on the same held-out data.

  Raises:
    UserError: there is no evaluation, or its data cannot be had any more.
  """
  run = _read(workdir)
  if run.evaluation is None:
    raise UserError(_no_evaluation(workdir))
  return comparison.compare(run.config, run.evaluation)


@dataclasses.dataclass(frozen=True)
class _Run:
  workdir: Path
  config: Config
  num_parameters: int
  codec_kind: str
  steps: list[metrics.Row]
  evaluations: list[metrics.Row]  # during training
  evaluation: dict[str, Any] | None
  samples: dict[str, Any] | None


def _read(workdir: Path) -> _Run:
  steps, evaluations = [], []
  if (workdir / 'metrics.jsonl').exists():
    steps, evaluations = metrics.read(workdir)
  config = config_lib.resolve(workdir_lib.read_config(workdir))
  return _Run(
    workdir=workdir,
    config=config,
    num_parameters=num_parameters(config.model),
    codec_kind=workdir_lib.read_trained(workdir).codec.kind,
    steps=steps,
    evaluations=evaluations,
    evaluation=_read_json(workdir / 'evaluation.json', 'evaluate'),
    samples=_read_json(workdir / 'samples' / 'samples.json', 'sample'),
  )


def _read_json(path: Path, command: str) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except ValueError as error:
    raise UserError(
      f'{path} is not JSON ({error}); run perceiver-ar {command} again'
    ) from error


def _no_evaluation(workdir: Path) -> str:
  return (
    'nothing is evaluated yet; run perceiver-ar evaluate '
    f'--workdir={shlex.quote(str(workdir))}'
  )


def _headline(run: _Run) -> str:
  """The few numbers that most people look for."""
  tiles = []
  if report := run.evaluation:
    tiles += [
      (_with_error(report, key, digits), name)
      for key, (name, digits) in _UNITS.items()
      if key in report
    ]
    if not tiles:
      tiles.append((f'{report["nats_per_token"]:.3f}', 'nats per token'))
    tiles.append((f'{report["accuracy"]:.1%}', 'next tokens right'))
    if half := report.get('second_half'):
      tiles.append((f'{half["accuracy"]:.3%}', 'right in the second half'))
  tiles.append((f'{run.num_parameters:,}', 'parameters'))
  if run.steps:
    seconds = sum(row['seconds'] for row in run.steps)
    tiles.append((f'{run.steps[-1]["step"] + 1:,}', 'training steps'))
    tiles.append((page.duration(seconds), 'of training'))
  return f'{page.tiles(tiles)}\n{_evaluated(run)}'


def _evaluated(run: _Run) -> str:
  report = run.evaluation
  if report is None:
    return page.missing(_no_evaluation(run.workdir))
  counts = [f'{report["num_documents"]:,} documents']
  for unit in ('bytes', 'words', 'events', 'dims', 'tokens'):
    if number := report.get(f'num_{unit}'):
      counts.append(f'{number:,} {unit}')
  variant = f' of {report["variant"]}' if report['variant'] else ''
  return page.note(
    f'Held out: every token of the split {report["split"]}{variant} scored '
    f'once ({", ".join(counts)}) at step {report["step"]:,}, by blocks of '
    f'{report["stride"]:,} with {report["context_length"]:,} inputs and '
    f'{report["num_latents"]:,} latents, in '
    f'{page.duration(report["seconds"])}. After ± stands one standard error, '
    'over documents.'
  )


def _with_error(report: Mapping[str, Any], key: str, digits: int) -> str:
  """The value, and its standard error, which one document does not give."""
  error = report.get(f'{key}_standard_error')
  text = f'{report[key]:,.{digits}f}'
  return text if error is None else f'{text} <i>± {error:,.{digits}f}</i>'


def _comparison(run: _Run) -> str:
  report = run.evaluation
  if report is None or report['kind'] == 'copy':
    return ''
  try:
    found = comparison.compare(run.config, report)
  except UserError as error:
    return page.section(
      'Against other codes',
      page.missing(f'The comparison is left out: {error}.'),
    )
  is_bits = found.unit.startswith('bits')
  rows = [
    (name, f'{x:.3f}', f'{x * found.total / (8 if is_bits else 1):,.0f}')
    for name, x in found.values.items()
  ]
  total = 'bytes in all' if is_bits else 'nats in all'
  return page.section(
    found.title,
    page.figure(charts.bars(found.values, found.unit)),
    page.numbers((found.unit, total), rows),
    page.note(found.note),
  )


def _buckets(run: _Run) -> str:
  """How the loss falls with context, and with the depth of latents."""
  report = run.evaluation
  if report is None:
    return ''
  drawn = [
    charts.bucket_curve(title, report[key], is_log)
    for title, key, is_log in (
      ('nats per token by position in its document', 'by_position', True),
      ('nats per token by latent, from the first', 'by_latent', False),
    )
  ]
  return page.section(
    'Where the loss is',
    f'<div class="small">{"".join(map(page.figure, drawn))}</div>',
  )


def _training(run: _Run) -> str:
  if not run.steps:
    return page.section(
      'Training', page.missing('No training step is logged yet.')
    )
  unit, scale = 'nats per token', 1.0
  if run.codec_kind in _BITS:
    unit, scale = _BITS[run.codec_kind], 1 / math.log(2)
  raw, window, smooth = _loss_points(run.steps, scale)
  evaluations = (
    np.array([row['step'] for row in run.evaluations]),
    np.array([row['nats_per_token'] * scale for row in run.evaluations]),
  )
  steps, thinned = _thin(run.steps)
  small = [
    charts.small_curve(title, (steps, _column(thinned, key)), is_log)
    for title, key, is_log in (
      ('learning rate', 'learning_rate', False),
      ('gradient norm', 'grad_norm', True),
    )
  ]
  num_targets = sum(row['num_targets'] for row in run.steps)
  return page.section(
    'Training',
    page.figure(charts.loss_curve(raw, smooth, evaluations, unit)),
    f'<div class="small">{"".join(map(page.figure, small))}</div>',
    page.note(
      f'{num_targets:,} targets in {len(run.steps):,} steps. The thick line is '
      f'the mean of {window:,} steps; a steep beginning may run out of the '
      'frame. The gradient norm is that before clipping.'
    ),
  )


def _loss_points(
  rows: Sequence[metrics.Row], scale: float
) -> tuple[charts.Points, int, charts.Points]:
  """The loss as it is, how many steps are in a mean, and those means."""
  steps, thinned = _thin(rows)
  loss = _column(thinned, 'loss') * scale
  weights = _column(thinned, 'num_targets') * np.isfinite(loss)
  total = np.cumsum(np.append(0, np.nan_to_num(loss) * weights))
  count = np.cumsum(np.append(0, weights))
  half = len(loss) // 80
  at = np.arange(len(loss))
  first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(loss))
  counts = count[last] - count[first]
  smooth = (total[last] - total[first]) / np.where(counts > 0, counts, np.nan)
  num_steps = (2 * half + 1) * math.ceil(len(rows) / len(thinned))
  return (steps, loss), num_steps, (steps, smooth)


def _thin(
  rows: Sequence[metrics.Row],
) -> tuple[np.ndarray, list[dict[str, float]]]:
  """At most so many rows as a curve can show, each the mean of a few steps."""
  size = math.ceil(len(rows) / _MAX_POINTS)
  groups = [rows[i : i + size] for i in range(0, len(rows), size)]
  steps = np.array([group[-1]['step'] for group in groups])
  return steps, [metrics.summarise(group) | _targets(group) for group in groups]


def _targets(rows: Sequence[metrics.Row]) -> dict[str, float]:
  return {'num_targets': sum(row['num_targets'] for row in rows)}


def _column(rows: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
  values = np.array([row[key] for row in rows], np.float64)
  return np.where(np.isfinite(values), values, np.nan)


def _samples(run: _Run) -> str:
  about = run.samples
  if about is None:
    return page.section(
      'Samples',
      page.missing(
        f'There are none yet; run perceiver-ar sample --workdir={run.workdir}'
      ),
    )
  how = [f'temperature {about["temperature"]:g}']
  if about['top_p'] < 1:
    how.append(f'top p {about["top_p"]:g}')
  if about['top_k']:
    how.append(f'top k {about["top_k"]}')
  return samples.section(run.workdir / 'samples', about)


def _settings(run: _Run) -> str:
  model, train = run.config.model, run.config.train
  rows = [
    ('parameters', f'{run.num_parameters:,}'),
    ('context length M', f'{model.context_length:,}'),
    ('latents N', f'{model.num_latents:,}'),
    ('self-attention layers L', f'{model.num_layers}'),
    ('width D, of the inputs E', f'{model.width:,}, {model.embed_width:,}'),
    (
      'heads, cross and self',
      f'{model.num_cross_heads}, {model.num_self_heads}',
    ),
    ('positions', model.position_encoding),
    ('vocabulary', f'{model.vocab_size:,}'),
    ('computes in', f'{model.dtype}, {model.attention} attention'),
    ('steps and batch', f'{train.num_steps:,} x {train.batch_size:,}'),
    (
      'optimizer',
      f'{run.config.optimizer.name}, {run.config.optimizer.schedule} from '
      f'{run.config.optimizer.learning_rate:g}',
    ),
  ]
  return page.section(
    'Model and settings',
    page.facts(rows),
    '<details><summary>Every key of the config</summary>'
    f'{page.verbatim(run.config.to_json())}</details>',
  )


def num_parameters(config: ModelConfig) -> int:
  """Counted from the shapes; nothing is allocated."""
  M, P = config.context_length, len(config.position_sizes)
  init = functools.partial(
    PerceiverAR(config).init, num_latents=config.num_latents
  )
  shapes = jax.eval_shape(
    init,
    jax.eval_shape(lambda: jax.random.key(0)),
    jax.ShapeDtypeStruct((1, M), jnp.int32),
    jax.ShapeDtypeStruct((1, M, P), jnp.int32),
  )
  return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(shapes))


def _origin(commands: Sequence[str]) -> str:
  versions = [('Python', platform.python_version())]
  versions += [(name, importlib.metadata.version(name)) for name in _PACKAGES]
  rows = [
    ('written', datetime.datetime.now().isoformat(' ', 'minutes')),
    ('on', f'{platform.platform()}, {os.cpu_count()} cores'),
    ('with', ', '.join(f'{name} {number}' for name, number in versions)),
  ]
  return page.section(
    'How it was made',
    page.verbatim('\n'.join(commands)),
    page.facts(rows),
  )
