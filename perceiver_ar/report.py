"""One page about a run: WORKDIR/report.html, to read, mail or print.

It is a single file without scripts, and needs nothing from elsewhere. What the
workdir does not hold yet is left out, with a line that says so.
"""

import bz2
import dataclasses
import datetime
import functools
import gzip
import html
import importlib.metadata
import json
import lzma
import math
import os
import platform
import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar import charts, evaluate, metrics
from perceiver_ar import config as config_lib
from perceiver_ar import workdir as workdir_lib
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.data import pipeline
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.page import CSS
from perceiver_ar.progress import Progress

_MODEL = 'this model'
_MAX_POINTS = 1_000  # of a curve; beyond, a point is the mean of some steps
_PACKAGES = (
  'perceiver-ar jax flax optax orbax-checkpoint grain numpy matplotlib'
).split()


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
  body = '\n'.join(
    [
      _headline(run),
      _comparison(run),
      _training(run),
      _samples(run),
      _settings(run),
      _origin(commands),
    ]
  )
  title = f'Perceiver AR: {workdir.resolve().name}'
  page = (
    '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
    '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
    f'<title>{_escape(title)}</title>\n<style>{CSS}</style>\n</head>\n'
    f'<body>\n<h1>{_escape(title)}</h1>\n{body}\n</body>\n</html>\n'
  )
  path = workdir / 'report.html'
  temporary = workdir / 'report.html.tmp'
  temporary.write_text(page, encoding='utf-8')
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
  is_bytes: bool  # a token is a byte
  steps: list[metrics.Row]
  evaluations: list[metrics.Row]  # during training
  evaluation: dict[str, Any] | None
  samples: dict[str, Any] | None


def _read(workdir: Path) -> _Run:
  steps, evaluations = [], []
  if (workdir / 'metrics.jsonl').exists():
    steps, evaluations = metrics.read(workdir)
  return _Run(
    workdir=workdir,
    config=config_lib.resolve(workdir_lib.read_config(workdir)),
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
    f'nothing is evaluated yet; run perceiver-ar evaluate --workdir={workdir}'
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
  tiles.append((f'{num_parameters(run.config.model):,}', 'parameters'))
  if run.steps:
    seconds = sum(row['seconds'] for row in run.steps)
    tiles.append((f'{run.steps[-1]["step"] + 1:,}', 'training steps'))
    tiles.append((_duration(seconds), 'of training'))
  cells = [
    f'<div><b>{value}</b><span>{name}</span></div>' for value, name in tiles
  ]
  return f'<div class="tiles">{"".join(cells)}</div>\n{_evaluated(run)}'


def _evaluated(run: _Run) -> str:
  report = run.evaluation
  if report is None:
    return _paragraph(_no_evaluation(run.workdir), 'missing')
  counts = [f'{report["num_documents"]:,} documents']
  for unit in ('bytes', 'words', 'tokens'):
    if number := report[f'num_{unit}']:
      counts.append(f'{number:,} {unit}')
  return _paragraph(
    f'Held out: every token of the split {report["split"]} scored once '
    f'({", ".join(counts)}) at step {report["step"]:,}, by blocks of '
    f'{report["stride"]:,} with {report["context_length"]:,} inputs and '
    f'{report["num_latents"]:,} latents, in {_duration(report["seconds"])}. '
    'After ± stands one standard error, over documents.',
    'note',
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
    return _section(
      'Against compressors',
      _paragraph(f'The comparison is left out: {error}.', 'missing'),
    )
  rows = [
    (_escape(name), f'{bits:.3f}', f'{bits / 8 * report["num_bytes"]:,.0f}')
    for name, bits in values.items()
  ]
  return _section(
    'Against compressors',
    f'<figure>{charts.bars(values, "bits per byte")}</figure>',
    _table(rows, ('', 'bits per byte', 'bytes in all')),
    _paragraph(
      'All on the same held-out bytes, in a row; fewer is better. Order 0 is '
      'the entropy of their own histogram: no code that looks at one byte at a '
      'time does better. The model has read the training split before, the '
      'compressors start from nothing.',
      'note',
    ),
  )


def _compare(run: _Run, report: Mapping[str, Any]) -> dict[str, float]:
  if 'bits_per_byte' not in report:
    raise UserError(
      'the evaluated tokens stand for no bytes; prepare text to compare'
    )
  data = _evaluated_bytes(run, report)
  return {_MODEL: report['bits_per_byte']} | baselines(data)


def baselines(data: bytes) -> dict[str, float]:
  """Bits per byte of simple codes for `data`."""
  shares = np.bincount(np.frombuffer(data, np.uint8)) / len(data)
  shares = shares[shares > 0]
  values = {'order 0': float(-(shares * np.log2(shares)).sum())}
  compressors = {
    'gzip -9': functools.partial(gzip.compress, compresslevel=9, mtime=0),
    'bz2 -9': functools.partial(bz2.compress, compresslevel=9),
    'xz -9': functools.partial(lzma.compress, preset=9),
  }
  with Progress('compare', len(compressors), 'compressors') as progress:
    for name, compress in compressors.items():
      values[name] = 8 * len(compress(data)) / len(data)
      progress.advance(1)
  return values


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
    return _section(
      'Training', _paragraph('No training step is logged yet.', 'missing')
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
  return _section(
    'Training',
    f'<figure>{charts.loss_curve(raw, smooth, evaluations, unit)}</figure>',
    f'<div class="small">{"".join(f"<figure>{c}</figure>" for c in small)}'
    '</div>',
    _paragraph(
      f'{num_targets:,} targets in {len(run.steps):,} steps. The thick line is '
      f'the mean of {window:,} steps; a steep beginning may run out of the '
      'frame. The gradient norm is that before clipping.',
      'note',
    ),
  )


def _loss_points(
  rows: Sequence[metrics.Row], scale: float
) -> tuple[charts.Points, int, charts.Points]:
  """The loss as it is, the steps in a mean, and the means up to each step."""
  steps, thinned = _thin(rows)
  loss = _column(thinned, 'loss') * scale
  weights = _column(thinned, 'num_targets') * np.isfinite(loss)
  window = max(1, len(loss) // 40)
  total = np.cumsum(np.nan_to_num(loss, posinf=0, neginf=0) * weights)
  count = np.cumsum(weights)
  for sums in (total, count):
    sums[window:] -= sums[:-window].copy()
  smooth = total / np.where(count > 0, count, np.nan)
  num_steps = window * math.ceil(len(rows) / len(thinned))
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
    return _section(
      'Samples',
      _paragraph(
        'There are none yet; run perceiver-ar sample '
        f'--workdir={run.workdir}',
        'missing',
      ),
    )
  how = [f'temperature {about["temperature"]:g}']
  if about['top_p'] < 1:
    how.append(f'top p {about["top_p"]:g}')
  if about['top_k']:
    how.append(f'top k {about["top_k"]}')
  parts = [
    _paragraph(
      f'Drawn at step {about["step"]:,} with {", ".join(how)}, seed '
      f'{about["seed"]}, {about["tokens_per_second"]:,.0f} tokens a second, '
      'not chosen among others.',
      'note',
    )
  ]
  if about['prompt']:
    parts.append(f'<h3>Prompt</h3>{_verbatim(about["prompt"])}')
  parts += [_sample(run.workdir / 'samples', s) for s in about['samples']]
  return _section('Samples', *parts)


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
  return (
    f'<h3>{_escape(about["file"])} <i>{about["num_tokens"]:,} tokens{end}</i>'
    f'</h3>{_verbatim(text)}'
  )


def _settings(run: _Run) -> str:
  model, train = run.config.model, run.config.train
  rows = [
    ('parameters', f'{num_parameters(model):,}'),
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
  return _section(
    'Model and settings',
    _table([(name, _escape(value)) for name, value in rows], ()),
    '<details><summary>Every key of the config</summary>'
    f'{_verbatim(run.config.to_json())}</details>',
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
  return _section(
    'How it was made',
    _verbatim('\n'.join(commands)),
    _table([(name, _escape(value)) for name, value in rows], ()),
  )


def _section(title: str, *parts: str) -> str:
  return f'<section>\n<h2>{_escape(title)}</h2>\n' + '\n'.join(
    [*parts, '</section>']
  )


def _paragraph(text: str, kind: str) -> str:
  return f'<p class="{kind}">{_escape(text)}</p>'


def _verbatim(text: str) -> str:
  # A byte model may draw control characters, which HTML does not allow.
  text = re.sub(r'[^\S\n\t ]|[\x00-\x08\x0e-\x1f\x7f-\x9f]', '\ufffd', text)
  return f'<pre>{_escape(text)}</pre>'


def _table(rows: Sequence[Sequence[str]], head: Sequence[str]) -> str:
  """Cells are HTML already; the first of a row is its name."""

  def lines() -> Iterator[str]:
    yield '<table>'
    if head:
      yield f'<tr>{"".join(f"<th>{_escape(name)}</th>" for name in head)}</tr>'
    for name, *cells in rows:
      values = ''.join(f'<td>{cell}</td>' for cell in cells)
      yield f'<tr><th scope="row">{name}</th>{values}</tr>'
    yield '</table>'

  return '\n'.join(lines())


def _escape(text: str) -> str:
  return html.escape(text)


def _duration(seconds: float) -> str:
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 100:
    return f'{minutes} min'
  return f'{minutes // 60} h {minutes % 60} min'
