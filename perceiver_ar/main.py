"""The command line: flags live here and nowhere else.

A user's mistake ends in one sentence and exit status 2; --debug shows where
it came from.
"""

import argparse
import dataclasses
import json
import logging
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NoReturn

from absl import logging as absl_logging

from perceiver_ar import config as config_lib
from perceiver_ar import config_files
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError

_CONFIG_HELP = """
--config=FILE.py[:ARG] is a file such as configs/books.py:demo; any key of it
is set by --config.SECTION.KEY=VALUE (configs/default.py explains them all)."""


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command and exits with its status."""
  args, rest = _parser().parse_known_args(argv)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  absl_logging.set_verbosity('warning')
  try:
    sys.exit(args.run(args, rest))
  except UserError as error:
    if args.debug:
      raise
    sys.exit(_fail(str(error)))
  except OSError as error:
    # Others than those of a path are not the user's mistakes.
    if args.debug or error.filename is None:
      raise
    sys.exit(_fail(f'{error.filename}: {error.strerror}; use another path'))
  except KeyboardInterrupt:
    sys.exit(130)


def _fail(sentence: str) -> int:
  # A library's words, quoted in it, may have lines of their own.
  print(f'perceiver-ar: {" ".join(sentence.split())}', file=sys.stderr)
  return 2


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as for all other mistakes."""

  def error(self, message: str) -> NoReturn:
    sys.exit(_fail(f'{message}; see {self.prog} --help'))


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog='perceiver-ar',
    description='Trains, evaluates and samples Perceiver AR models.',
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')

  def command(name: str, run: Any, about: str, config: bool = True) -> Any:
    sub = commands.add_parser(
      name,
      help=about,
      description=about,
      epilog=_CONFIG_HELP if config else None,
      allow_abbrev=False,
    )
    sub.set_defaults(run=run, takes_config=config)
    sub.add_argument(
      '--workdir', required=True, metavar='DIR', help='the folder of the run'
    )
    sub.add_argument(
      '--debug', action='store_true', help='show tracebacks of mistakes'
    )
    return sub

  command('train', _train, 'Train; run again, it goes on where it was.')
  evaluate = command(
    'evaluate', _evaluate, 'Score every held-out token once, as JSON.'
  )
  evaluate.add_argument('--split', help='of the data set')
  evaluate.add_argument('--num_latents', type=int, help='N at test time')
  evaluate.add_argument('--context_length', type=int, help='M at test time')
  evaluate.add_argument(
    '--stride', type=int, help='tokens scored per block; 1 is exact and slow'
  )
  evaluate.add_argument(
    '--max_examples',
    type=int,
    help='documents, evenly spread; default: all',
  )
  sample = command(
    'sample', _sample, 'Write samples to WORKDIR/samples, replacing the last.'
  )
  sample.add_argument('--num_samples', type=int, help='drawn together')
  sample.add_argument('--length', type=int, help='new tokens of each')
  sample.add_argument(
    '--prompt',
    metavar='FILE',
    action='append',
    help='text, MIDI or PNG to go on from; may be given several times',
  )
  sample.add_argument(
    '--prompt_split',
    metavar='SPLIT',
    help='go on from documents of this split of the data set instead',
  )
  sample.add_argument(
    '--num_prompts', type=int, help='documents, evenly spread; default: 1'
  )
  sample.add_argument(
    '--prompt_length',
    type=int,
    help='go on from the first so many tokens of each, and keep the original '
    'to compare; default: all of them',
  )
  sample.add_argument('--temperature', type=float, help='0: the likeliest')
  sample.add_argument('--top_p', type=float, help='nucleus')
  sample.add_argument('--top_k', type=int, help='0: all')
  sample.add_argument('--seed', type=int)
  sample.add_argument('--num_latents', type=int, help='N at test time')
  sample.add_argument(
    '--refill_latents',
    type=int,
    help='latents made anew when N are in use; default: half of N',
  )
  for sub in (evaluate, sample):
    sub.add_argument('--step', type=int, help='of the checkpoint; or newest')
    sub.add_argument(
      '--output', type=Path, metavar='FILE', help='write the JSON here, too'
    )
  checkpoint = command(
    'checkpoint', _checkpoint, 'Look at checkpoints.', config=False
  )
  checkpoint.add_argument(
    'action',
    choices=('list', 'verify', 'diff', 'export'),
    help='list: steps and sizes; verify: every checksum; diff: what differs '
    'between two steps; export: parameters as safetensors',
  )
  checkpoint.add_argument('--step', type=int, help='diff, export; or newest')
  checkpoint.add_argument(
    '--other', metavar='DIR', help='diff: the other workdir; or the same'
  )
  checkpoint.add_argument('--other_step', type=int, help='diff; or newest')
  checkpoint.add_argument(
    '--output',
    type=Path,
    metavar='FILE',
    help='export: the safetensors file; else write the JSON here',
  )
  return parser


def _train(args: argparse.Namespace, rest: list[str]) -> int:
  if not any(word.startswith('--config=') for word in rest):
    raise UserError('train needs --config=FILE.py[:ARG]; see configs/')
  config = config_files.resolve(rest, None)
  from perceiver_ar import train

  return train.train_and_evaluate(config, args.workdir)


def _evaluate(args: argparse.Namespace, rest: list[str]) -> int:
  keys = ['split', 'num_latents', 'context_length', 'stride', 'max_examples']
  if args.max_examples is None and not _sets(rest, 'evaluate.max_examples'):
    args.max_examples = 0  # the config's is for training
  from perceiver_ar import evaluate, workdir

  stride_is_set = args.stride or _sets(rest, 'evaluate.stride')
  if args.num_latents and not stride_is_set:
    # A block cannot score more tokens than it has latents.
    stride = workdir.read_config(args.workdir)['evaluate']['stride']
    args.stride = min(stride, args.num_latents)
  config = _run_config(args, rest, 'evaluate', keys)
  from perceiver_ar.data import pipeline

  documents = pipeline.open_documents(
    config.data, config.evaluate.split, seed=config.train.seed
  )
  workdir.check_vocabulary(args.workdir, documents)
  pipeline.check_compatible(config.model, documents)
  mesh, step, params = _restore(args, config)
  evaluator = evaluate.Evaluator(config, documents, mesh)
  report = {'step': step} | evaluator.run(params, visible=True)
  _write_json(report, Path(args.workdir) / 'evaluation.json', args.output)
  print(_json(report), end='')
  return 0


def _sample(args: argparse.Namespace, rest: list[str]) -> int:
  keys = [
    'num_samples',
    'length',
    'temperature',
    'top_p',
    'top_k',
    'seed',
    'num_latents',
    'refill_latents',
  ]
  if args.num_latents and args.refill_latents is None:
    args.refill_latents = max(args.num_latents // 2, 1)
  config = _run_config(args, rest, 'sample', keys)
  from perceiver_ar import artifacts, sample, workdir

  trained = workdir.read_trained(args.workdir)
  prompts = _prompts(args, config, trained)
  mesh, step, params = _restore(args, config)
  sampler = sample.Sampler(
    config,
    params,
    mesh,
    layout=trained.layout,
    forbidden=trained.codec.forbidden,
  )
  folder = Path(args.workdir) / 'samples'
  report: dict[str, Any] = {'step': step}
  report |= artifacts.write_samples(
    sampler, trained.codec, prompts, config.sample, folder
  )
  _write_json(report, folder / 'samples.json', args.output)
  print(
    f'{len(report["samples"])} samples from step {step} in {folder} '
    f'({report["tokens_per_second"]:,.0f} tokens/s)'
  )
  return 0


def _checkpoint(args: argparse.Namespace, rest: list[str]) -> int:
  if rest:
    raise UserError(f'checkpoint does not know {rest[0]}; see --help')
  read = {'diff': ('step', 'other', 'other_step'), 'export': ('step',)}
  for name in ('step', 'other', 'other_step'):
    if getattr(args, name) is not None and name not in read.get(
      args.action, ()
    ):
      raise UserError(
        f'checkpoint {args.action} does not read --{name}; leave it out'
      )
  from perceiver_ar import inspection

  if args.action == 'export':
    if not args.output:
      raise UserError('checkpoint export needs --output=FILE.safetensors')
    done = inspection.export(args.workdir, args.step, args.output)
    print(f'{done["parameters"]:,} parameters of step {done["step"]}')
    return 0
  if args.action == 'diff':
    other = args.other or args.workdir
    report = inspection.diff(args.workdir, args.step, other, args.other_step)
    print(json.dumps(report, indent=2))
    _write_json(report, args.output)
    return 0
  return _list_or_verify(args)


def _list_or_verify(args: argparse.Namespace) -> int:
  from perceiver_ar import inspection

  if args.action == 'list':
    rows = inspection.list_steps(args.workdir)
    for row in rows:
      loss = 'not evaluated' if row['loss'] is None else f'{row["loss"]:.4f}'
      print(
        f'step {row["step"]:>9,}  {row["created"]}  '
        f'{row["bytes"] / 2**20:,.1f} MiB  loss {loss}'
      )
  else:
    rows = inspection.verify(args.workdir)
    for row in rows:
      print(f'step {row["step"]:>9,}  {row["reason"] or "sound"}')
  if not rows:
    raise UserError(
      f'{args.workdir} holds no checkpoint; --workdir must be the folder of a '
      'run'
    )
  _write_json(rows, args.output)
  return 0 if all(row.get('ok', True) for row in rows) else 1


def _sets(rest: list[str], key: str) -> bool:
  return any(word.startswith(f'--config.{key}=') for word in rest)


def _run_config(
  args: argparse.Namespace, rest: list[str], section: str, keys: list[str]
) -> Config:
  """The workdir's config, or --config's for the same model, with flags."""
  from perceiver_ar import workdir

  raw = workdir.read_config(args.workdir)
  config = config_files.resolve(rest, raw)
  model = config_lib.resolve(raw).model
  if config.model != model:
    lines = [
      f'model.{key}: {was!r} -> {now!r}'
      for (key, was), now in zip(
        dataclasses.asdict(model).items(),
        dataclasses.asdict(config.model).values(),
        strict=True,
      )
      if was != now
    ]
    raise UserError(
      f'{args.workdir} holds another model: {"; ".join(lines)}; leave out '
      "--config to use the run's own"
    )
  values = {key: getattr(args, key) for key in keys}
  changed = {key: value for key, value in values.items() if value is not None}
  nested = dataclasses.asdict(config)
  nested[section] |= changed
  return config_lib.resolve(nested)


def _restore(args: argparse.Namespace, config: Config) -> tuple[Any, int, Any]:
  import jax

  from perceiver_ar import checkpoint, partitioning, train_step

  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  abstract = train_step.abstract_params(config, mesh)
  step, params = checkpoint.restore_params(args.workdir, abstract, args.step)
  return mesh, step, params


def _prompts(args: argparse.Namespace, config: Config, trained: Any) -> Any:
  """What --prompt... say; refuses those that have no effect."""
  from perceiver_ar import artifacts, workdir
  from perceiver_ar.data import pipeline

  if args.prompt and args.prompt_split:
    raise UserError(
      f'--prompt={args.prompt[0]} and --prompt_split={args.prompt_split} both '
      'say where to go on from; leave one out'
    )
  for name in ('num_prompts', 'prompt_length'):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise UserError(f'--{name}={value} must be at least 1')
  length = args.prompt_length or 0
  if args.num_prompts and not args.prompt_split:
    raise UserError('--num_prompts needs --prompt_split, which they come from')
  if args.prompt_split:
    documents = pipeline.open_documents(
      config.data, args.prompt_split, seed=config.train.seed
    )
    workdir.check_vocabulary(args.workdir, documents)
    return artifacts.document_prompts(documents, args.num_prompts or 1, length)
  if args.prompt:
    return [
      artifacts.read_prompt(trained.codec, file, length) for file in args.prompt
    ]
  if length:
    raise UserError('--prompt_length needs --prompt or --prompt_split')
  return [artifacts.NOTHING]


def _json(content: Any) -> str:
  try:
    return json.dumps(content, indent=2, allow_nan=False) + '\n'
  except ValueError as error:
    raise UserError(
      f'the result is not finite ({content}); use an earlier --step, or '
      'inputs within what the model was trained on'
    ) from error


def _write_json(content: Any, *paths: Path | None) -> None:
  for path in paths:
    if path:
      path.write_text(_json(content))


if __name__ == '__main__':
  main()
