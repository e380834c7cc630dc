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
from typing import Any

import jax
import jax.numpy as jnp
from etils import epath

from perceiver_ar import config as config_lib
from perceiver_ar import journal, metrics, paths
from perceiver_ar import workdir as workdir_lib
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.report import (
  charts,
  comparison,
  history,
  ledger,
  page,
  samples,
  training,
)

# What the evaluation may hold, its name and how many digits of it are shown.
_UNITS = {
  'bits_per_byte': ('bits per byte', 3),
  'bits_per_dim': ('bits per dimension', 3),
  'nats_per_event': ('nats per event', 3),
  'word_perplexity': ('perplexity per word', 1),
}
_PACKAGES = (
  'perceiver-ar',
  'jax',
  'flax',
  'optax',
  'orbax-checkpoint',
  'grain',
  'numpy',
)


@dataclasses.dataclass(frozen=True)
class Run:
  """What is known of a run."""

  workdir: epath.Path
  config: Config
  num_parameters: int
  codec_kind: str
  steps: list[metrics.Row]
  evaluations: list[metrics.Row]  # during training
  evaluation: dict[str, Any] | None
  samples: dict[str, Any] | None
  ledger: ledger.Ledger | None


def read(workdir: epath.PathLike) -> Run:
  """What the workdir holds by now; nothing is changed in it.

  Raises:
    UserError: the workdir is no run's, or a file in it is broken.
  """
  workdir = epath.Path(workdir)
  steps, evaluations = [], []
  if (workdir / 'metrics.jsonl').exists():
    steps, evaluations = metrics.read(workdir)
  config = config_lib.resolve(workdir_lib.read_config(workdir))
  return Run(
    workdir=workdir,
    config=config,
    num_parameters=num_parameters(config.model),
    codec_kind=workdir_lib.read_trained(workdir).codec.kind,
    steps=steps,
    evaluations=evaluations,
    evaluation=_read_json(workdir / 'evaluation.json', 'evaluate'),
    samples=_read_json(workdir / 'samples' / 'samples.json', 'sample'),
    ledger=ledger.make(journal.read(workdir), steps),
  )


def write(
  run: Run, commands: Sequence[str], output: epath.PathLike | None
) -> epath.Path:
  """Writes the report and returns where it is.

  Args:
    run: that has at least begun; it may go on meanwhile.
    commands: what made it, as a person would type it.
    output: another place than WORKDIR/report.html.

  Raises:
    UserError: a file that the workdir names is missing, or matplotlib is not
      installed.
  """
  content = page.document(
    f'Perceiver AR: {paths.absolute(run.workdir).name}',
    _headline(run),
    _comparison(run),
    _buckets(run),
    training.section(run.steps, run.evaluations, run.codec_kind),
    history.section(run.ledger),
    _samples(run),
    _settings(run),
    _origin(commands, run.ledger),
  )
  path = epath.Path(output or run.workdir / 'report.html')
  temporary = path.parent / f'{path.name}.tmp'
  temporary.write_text(content, encoding='utf-8')
  temporary.replace(path)
  return path


def describe(run: Run) -> list[str]:
  """The run in a few lines."""
  done = run.steps[-1]['step'] + 1 if run.steps else 0
  told = f'step {done:,} of {run.config.train.num_steps:,}'
  if run.ledger is None:
    return [told, history.MISSING]
  return [told, *ledger.describe(run.ledger)]


def compare(run: Run) -> comparison.Comparison:
  """The model and simple codes, on the same held-out data.

  Raises:
    UserError: there is no evaluation, or its data cannot be had any more.
  """
  if run.evaluation is None:
    raise UserError(_no_evaluation(run.workdir))
  return comparison.compare(run.config, run.evaluation)


def _read_json(path: epath.Path, command: str) -> dict[str, Any] | None:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError:
    return None
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{path} is not JSON ({error}); run perceiver-ar {command} again'
    ) from error


def _no_evaluation(workdir: epath.Path) -> str:
  return (
    'nothing is evaluated yet; run perceiver-ar evaluate '
    f'--workdir={shlex.quote(str(workdir))}'
  )


def _headline(run: Run) -> str:
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
  if run.ledger:
    share = f'{run.ledger.goodput:.1%}'
    tiles.append((share, 'goodput: time in steps that count'))
  return f'{page.tiles(tiles)}\n{_evaluated(run)}'


def _evaluated(run: Run) -> str:
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


def _comparison(run: Run) -> str:
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
    page.figure(charts.bars(found.values, found.unit, '{:.3f}'.format)),
    page.numbers((found.unit, total), rows),
    page.note(found.note),
  )


def _buckets(run: Run) -> str:
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


def _samples(run: Run) -> str:
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


def _settings(run: Run) -> str:
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


def _origin(commands: Sequence[str], account: ledger.Ledger | None) -> str:
  if account:
    last = account.starts[-1].row
    place = f'{last["place"]["devices"]}, {last["place"]["host"]}'
    versions, commands = last['software'], commands or [last['command']]
  else:  # it is not known: most likely here
    place = f'{platform.platform()}, {os.cpu_count()} cores'
    versions = {'python': platform.python_version()}
    versions |= {name: importlib.metadata.version(name) for name in _PACKAGES}
  rows = [
    ('written', datetime.datetime.now().isoformat(' ', 'minutes')),
    ('on', place),
    ('with', ', '.join(f'{name} {x}' for name, x in versions.items())),
  ]
  return page.section(
    'How it was made',
    page.verbatim('\n'.join(commands)) if commands else '',
    page.facts(rows),
  )
