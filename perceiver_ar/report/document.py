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
from perceiver_ar import evaluate, metrics
from perceiver_ar import workdir as workdir_lib
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.data import pipeline
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.report import charts, compressors, page

_MODEL = 'this model'
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


def compare(workdir: Path) -> dict[str, float]:
  """Bits per byte of the model and of compressors, on the same bytes.

  Raises:
    UserError: there is no evaluation, or its bytes cannot be had any more.
  """
  run = _read(workdir)
  if run.evaluation is None:
    raise UserError(_no_evaluation(workdir))
  return _compare(run, run.evaluation)


@dataclasses.dataclass(frozen=True)
class _Run:
  workdir: Path
  config: Config
  num_parameters: int
  is_bytes: bool  # a token is a byte
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
    is_bytes=workdir_lib.read_trained(workdir).codec.kind == 'bytes',
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
    if 'bits_per_byte' in report:
      tiles.append((_with_error(report, 'bits_per_byte', 3), 'bits per byte'))
    else:
      tiles.append((f'{report["nats_per_token"]:.3f}', 'nats per token'))
    if 'word_perplexity' in report:
      value = _with_error(report, 'word_perplexity', 1)
      tiles.append((value, 'perplexity per word'))
    tiles.append((f'{report["accuracy"]:.1%}', 'next tokens right'))
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
  for unit in ('bytes', 'words', 'tokens'):
    if number := report[f'num_{unit}']:
      counts.append(f'{number:,} {unit}')
  return page.note(
    f'Held out: every token of the split {report["split"]} scored once '
    f'({", ".join(counts)}) at step {report["step"]:,}, by blocks of '
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
  if report is None:
    return ''
  try:
    values = _compare(run, report)
  except UserError as error:
    return page.section(
      'Against compressors',
      page.missing(f'The comparison is left out: {error}.'),
    )
  rows = [
    (name, f'{bits:.3f}', f'{bits / 8 * report["num_bytes"]:,.0f}')
    for name, bits in values.items()
  ]
  return page.section(
    'Against compressors',
    page.figure(charts.bars(values, 'bits per byte')),
    page.numbers(('bits per byte', 'bytes in all'), rows),
    page.note(
      'All on the same held-out bytes, in a row; fewer is better. Order 0 is '
      'the entropy of their own histogram: no code that looks at one byte at a '
      'time does better. The model has read the training split before, the '
      'compressors start from nothing.'
    ),
  )


def _compare(run: _Run, report: Mapping[str, Any]) -> dict[str, float]:
  if 'bits_per_byte' not in report:
    raise UserError(
      'the evaluated tokens stand for no bytes; prepare text to compare'
    )
  data = _evaluated_bytes(run, report)
  return {_MODEL: report['bits_per_byte']} | compressors.bits_per_byte(data)


def _evaluated_bytes(run: _Run, report: Mapping[str, Any]) -> bytes:
  """What was evaluated, as it was before it became tokens."""
  documents = pipeline.open_documents(
    run.config.data, report['split'], seed=run.config.train.seed
  )
  chosen = evaluate.chosen_documents(len(documents), report['num_documents'])
  num_bytes = sum(documents.info(i).num_bytes for i in chosen)
  if num_bytes != report['num_bytes']:
    raise UserError(
      f'{report["num_bytes"]} bytes were evaluated, and data.path '
      f'{run.config.data.path} now has {num_bytes} in as many documents of '
      f'{report["split"]}; evaluate again'
    )
  texts = (documents.codec.decode(documents[i]) for i in chosen)
  return b''.join(text.encode() for text in texts)


def _training(run: _Run) -> str:
  if not run.steps:
    return page.section(
      'Training', page.missing('No training step is logged yet.')
    )
  unit, scale = 'nats per token', 1.0
  if run.is_bytes:
    unit, scale = 'bits per byte', 1 / math.log(2)
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
  parts = [
    page.note(
      f'Drawn at step {about["step"]:,} with {", ".join(how)}, seed '
      f'{about["seed"]}, {about["tokens_per_second"]:,.0f} tokens a second, '
      'not chosen among others.'
    )
  ]
  if about['prompt']:
    parts += [page.heading('prompt', ''), page.verbatim(about['prompt'])]
  parts += [_sample(run.workdir / 'samples', s) for s in about['samples']]
  return page.section('Samples', *parts)


def _sample(folder: Path, about: Mapping[str, Any]) -> str:
  path = folder / about['file']
  try:
    text = path.read_text(encoding='utf-8', errors='replace')
  except FileNotFoundError as error:
    raise UserError(
      f'{path} is missing, which samples.json names; run perceiver-ar sample '
      'again'
    ) from error
  end = ', ended by itself' if about['ended'] else ''
  title = page.heading(about['file'], f'{about["num_tokens"]:,} tokens{end}')
  return f'{title}\n{page.verbatim(text)}'


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
