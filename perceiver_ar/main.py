"""The command line: what each command does.

A user's mistake ends in one sentence and exit status 2; --debug shows where
it came from.
"""

import argparse
import dataclasses
import json
import logging
import sys
import traceback
from collections.abc import Sequence
from typing import Any

from absl import logging as absl_logging
from etils import epath

from perceiver_ar import config as config_lib
from perceiver_ar import config_files, errors, flags, journal, paths, stopping
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError
from perceiver_ar.outputs import as_json, write_json


def main(argv: Sequence[str] | None = None) -> None:
  """Runs a command and exits with its status."""
  runs = {
    'train': _train,
    'evaluate': _evaluate,
    'sample': _sample,
    'plan': _plan,
    'replay': _replay,
    'checkpoint': _checkpoint,
    'drill': _drill,
    'report': _report,
  }
  args, rest = flags.make_parser(runs).parse_known_args(argv)
  logging.basicConfig(level=logging.WARNING, format='%(message)s')
  absl_logging.set_verbosity('warning')
  with stopping.restarted_on_sigterm():
    status = _run(args, rest)
    if 'num_processes' in args:  # it may have joined others
      from perceiver_ar import distributed

      if status == errors.MISTAKE:
        distributed.meet_to_part(*_place(args), args.barrier_seconds)
      distributed.leave(status)
  sys.exit(status)


def _run(args: argparse.Namespace, rest: list[str]) -> int:
  """Runs a command; what goes wrong becomes a sentence and a status."""
  try:
    for name in ('workdir', 'output'):
      paths.check(getattr(args, name, None) or '')
    return args.run(args, rest)
  except KeyboardInterrupt:
    return 130
  except Exception as error:
    sentence, status = errors.explain(error)
    if args.debug or not sentence:
      traceback.print_exc()
    if sentence:
      flags.fail(sentence)
    return status


def _refuse(rest: list[str], command: str) -> None:
  if rest:
    raise UserError(f'{command} does not know {rest[0]}; see --help')


def _join(args: argparse.Namespace) -> None:
  """Connects this process with the others of its job, if there are any."""
  from perceiver_ar import distributed, places

  place = places.find_place(*_place(args), seconds=args.barrier_seconds)
  print(places.describe(place), file=sys.stderr, flush=True)
  distributed.join(place, args.barrier_seconds)


def _place(args: argparse.Namespace) -> tuple[str | None, Any, Any]:
  return args.coordinator, args.num_processes, args.process_id


def _train(args: argparse.Namespace, rest: list[str]) -> int:
  journal.start_clock()
  if not any(word.startswith('--config=') for word in rest):
    raise UserError('train needs --config=FILE.py[:ARG]; see configs/')
  config = config_files.resolve(rest, None)
  _join(args)
  from perceiver_ar import train

  return train.train_and_evaluate(config, args.workdir)


def _evaluate(args: argparse.Namespace, rest: list[str]) -> int:
  keys = ['split', 'num_latents', 'context_length', 'stride', 'max_examples']
  if args.max_examples is None and not _sets(rest, 'evaluate.max_examples'):
    args.max_examples = 0  # the config's is for training
  from perceiver_ar import evaluate, starting, workdir

  stride_is_set = args.stride or _sets(rest, 'evaluate.stride')
  if args.num_latents and not stride_is_set:
    # A block cannot score more tokens than it has latents.
    stride = workdir.read_config(args.workdir)['evaluate']['stride']
    args.stride = min(stride, args.num_latents)
  config = _run_config(args, rest, 'evaluate', keys)
  _join(args)
  import jax

  from perceiver_ar import distributed
  from perceiver_ar.data import pipeline

  documents = pipeline.open_documents(
    config.data, config.evaluate.split, seed=config.train.seed
  )
  workdir.check_vocabulary(args.workdir, documents)
  pipeline.check_compatible(config.model, documents)
  workdir.agree(config, documents, step=str(args.step))
  is_first = jax.process_index() == 0
  with starting.watched(config) as watchdog:
    mesh, step, params = starting.restore_params(
      config, args.workdir, args.step, samples=False
    )
    evaluator = evaluate.Evaluator(config, documents, mesh)
    distributed.barrier('evaluation')
    doing = 'evaluation', 'the evaluation'
    with stopping.ended_together(jax.process_count()) as stop:
      asked = lambda: watchdog.watch(*doing) or stop.signal or 0
      report = evaluator.run(params, visible=is_first, asked=asked)
  report = {'step': step} | report
  if is_first:
    folder = epath.Path(args.workdir)
    write_json(report, folder / 'evaluation.json', args.output)
    print(as_json(report), end='')
  distributed.barrier('exit')
  return 0


def _sample(args: argparse.Namespace, rest: list[str]) -> int:
  keys = ['num_samples', 'length', 'temperature', 'top_p', 'top_k', 'seed']
  keys += ['num_latents', 'refill_latents']
  if args.num_latents and args.refill_latents is None:
    args.refill_latents = max(args.num_latents // 2, 1)
  config = _run_config(args, rest, 'sample', keys)
  _join(args)
  import jax

  from perceiver_ar import (
    artifacts,
    checkpoint,
    distributed,
    drawn,
    sample,
    saved_step,
    starting,
    workdir,
  )

  trained = workdir.read_trained(args.workdir)
  prompts = _prompts(args, config, trained)
  said = [(x.name, x.tokens_T.tolist()) for x in prompts]
  workdir.agree(
    config, trained, step=str(args.step), prompts=saved_step.digest(said)
  )
  folder = epath.Path(args.workdir) / 'samples'
  with starting.watched(config) as watchdog:
    mesh, step, params = starting.restore_params(
      config, args.workdir, args.step, samples=True
    )
    codec = trained.codec
    sampler = sample.Sampler(
      config, params, mesh, layout=trained.layout, forbidden=codec.forbidden
    )
    at = checkpoint.step_folder(args.workdir, step)
    arrays = saved_step.read_manifest(at)['arrays']
    request = saved_step.digest([config.to_json(), arrays, said])
    known = drawn.open_drawn(folder, request)
    distributed.barrier('sample')
    own = sampler, prompts, config.sample
    if jax.process_index():
      artifacts.draw_along(*own, known, watchdog.watch)
    else:
      report: dict[str, Any] = {'step': step}
      report |= artifacts.write_samples(
        *own, codec, folder, known, watchdog.watch
      )
      write_json(report, folder / 'samples.json', args.output)
      print(
        f'{len(report["samples"])} samples from step {step} in {folder} '
        f'({report["tokens_per_second"]:,.0f} tokens/s)'
      )
  distributed.barrier('exit')
  return 0


def _plan(args: argparse.Namespace, rest: list[str]) -> int:
  if not any(word.startswith('--config=') for word in rest):
    raise UserError('plan needs --config=FILE.py[:ARG]; see configs/')
  output = paths.absolute(args.output or '')
  if not paths.is_bucket(output) and not output.parent.is_dir():
    raise UserError(f'--output={args.output} lies in no folder; make it first')
  config = config_files.resolve(rest, None)
  from perceiver_ar.plan import advice, page, plans
  from perceiver_ar.plan.machine import open_machine

  machine = open_machine(args.topology, args.num_slices)
  hbm_bytes = machine.chip.usable_bytes
  if args.sweep:
    rows = advice.sweep(config, machine, args.command, hbm_bytes)
    print(page.render_sweep(rows), end='')
    write_json(page.sweep_to_dicts(rows), args.output)
    return 0
  plan = plans.make_plan(config, machine, args.command, hbm_bytes)
  report = plan.to_dict()
  print(page.render(plan), end='')
  if not plan.fits:
    found = advice.smallest_change(config, machine, plan)
    print('\n' + page.render_change(plan, found), end='')
    report['change'] = found.change and {
      'keys': dict(found.change[0]),
      'plan': found.change[1].to_dict(),
    }
  write_json(report, args.output)
  return 0


def _drill(args: argparse.Namespace, rest: list[str]) -> int:
  _refuse(rest, 'drill')
  if args.processes < 1:
    raise UserError(f'--processes={args.processes} must be at least 1')
  _leave_accelerators()  # its jobs run without, too
  from perceiver_ar.drill import drills

  if args.list:
    print('\n'.join(f'{x.name:<14}{x.about}' for x in drills.FAULTS))
    return 0
  if args.all == bool(args.name):
    raise UserError('drill needs NAMEs of faults, or --all; see drill --list')
  faults = drills.FAULTS if args.all else drills.chosen(args.name)
  verdicts = drills.run(faults, args.processes)
  write_json([dataclasses.asdict(v) for v in verdicts], args.output)
  return 0 if all(v.verdict != 'failed' for v in verdicts) else 1


def _replay(args: argparse.Namespace, rest: list[str]) -> int:
  from perceiver_ar import replay, workdir

  config = config_files.resolve(rest, workdir.read_config(args.workdir))
  report = replay.replay(config, args.workdir, args.step)
  print(replay.render(report), end='')
  write_json(report.to_dict(), args.output)
  return 0 if report.agrees else 1


def _checkpoint(args: argparse.Namespace, rest: list[str]) -> int:
  _refuse(rest, 'checkpoint')
  _check_folders(args)
  read = {'diff': ('step', 'other_step'), 'export': ('step',)}
  for name in ('step', 'other_step'):
    if getattr(args, name) is not None and name not in read.get(
      args.action, ()
    ):
      raise UserError(
        f'checkpoint {args.action} does not read --{name}; leave it out'
      )
  _leave_accelerators()
  from perceiver_ar import inspection

  if args.action == 'export':
    if not args.output:
      raise UserError('checkpoint export needs --output=FILE.safetensors')
    done = inspection.export(args.workdir, args.step, args.output)
    print(f'{done["parameters"]:,} parameters of step {done["step"]}')
    return 0
  if args.action == 'diff':
    first, other = (args.compared * 2)[:2]
    report = inspection.diff(first, args.step, other, args.other_step)
    print(json.dumps(report, indent=2))
    write_json(report, args.output)
    return 0
  return _list_or_verify(args)


def _check_folders(args: argparse.Namespace) -> None:
  """A run is --workdir, and two are compared as they stand."""
  num, is_diff = len(args.compared), args.action == 'diff'
  if is_diff and (args.workdir or num not in (1, 2)):
    raise UserError(
      'checkpoint diff needs two workdirs, as in: checkpoint diff A B; or one, '
      'as in: checkpoint diff A --step=100 --other_step=200'
    )
  if not is_diff and (num or not args.workdir):
    given = f', not {args.compared[0]}' if num else ''
    raise UserError(f'checkpoint {args.action} needs --workdir=DIR{given}')


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
  write_json(rows, args.output)
  return 0 if all(row.get('ok', True) for row in rows) else 1


def _report(args: argparse.Namespace, rest: list[str]) -> int:
  _refuse(rest, 'report')
  _leave_accelerators()
  from perceiver_ar.report import document

  run = document.read(args.workdir)
  print('\n'.join(document.describe(run)))
  print(document.write(run, [], args.output))
  return 0


def _leave_accelerators() -> None:
  """To a run that may hold them."""
  import jax

  jax.config.update('jax_platforms', 'cpu')


def _sets(rest: list[str], key: str) -> bool:
  return any(word.startswith(f'--config.{key}=') for word in rest)


def _run_config(
  args: argparse.Namespace, rest: list[str], section: str, keys: list[str]
) -> Config:
  """The workdir's config, or --config's for the same model, with flags."""
  from perceiver_ar import workdir

  raw = workdir.read_config(args.workdir)
  config = config_files.resolve(rest, raw)
  changes = config_lib.differences(config_lib.resolve(raw), config)
  if lines := [line for line in changes if line.startswith('model.')]:
    raise UserError(
      f'{args.workdir} holds another model: {"; ".join(lines)}; leave out '
      "--config to use the run's own"
    )
  values = {key: getattr(args, key) for key in keys}
  changed = {key: value for key, value in values.items() if value is not None}
  nested = dataclasses.asdict(config)
  nested[section] |= changed
  return config_lib.resolve(nested)


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


if __name__ == '__main__':
  main()
