"""Trains, evaluates and samples a small model on real data, on a CPU.

  python tools/demo.py --what=books --workdir=runs/demo

--what is books, music (piano performances), images (tiles of photographs) or
copy (generated noise and its mirror image). It prints every command before it
runs it. Run again, it goes on where it was: what is there is not made again. At
the end WORKDIR/report.html shows it all.
"""

import argparse
import dataclasses
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from perceiver_ar.data import records
from perceiver_ar.errors import UserError

_PATIENCE = 60.0  # seconds that a command has to stop after Ctrl-C


class CommandError(Exception):
  """A command ended with a status that is not 0."""

  def __init__(self, status: int):
    super().__init__(status)
    self.status = status


@dataclasses.dataclass(frozen=True)
class Plan:
  """What makes a demo, as a person would type it."""

  data: Sequence[str]  # these end in a prepared data set, WORKDIR/data
  before: Sequence[str]  # runs that the last one begins with
  train: str
  evaluate: str
  sample: str

  def all(self) -> list[str]:
    return [*self.data, *self.before, self.train, self.evaluate, self.sample]


def books(workdir: Path) -> Plan:
  """0.6 MB of whole books are held out, and scored in half a minute."""
  return _with_data(
    workdir,
    'books',
    prepare='text --held_out=0.012',
    config='books.py',
    evaluate='',
    sample='--prompt_split=validation --prompt_length=1000',
  )


def music(workdir: Path) -> Plan:
  """Of ten performances, the pieces 1, 3 and 9 are held out."""
  return _with_data(
    workdir,
    'music',
    prepare='music --augment',
    config='music.py',
    evaluate='',
    sample='--prompt_split=validation --prompt_length=500',
  )


def images(workdir: Path) -> Plan:
  """Tiles of photographs; the held-out ones are of other photographs.

  24 of the 638 are scored, evenly spread: all of them would take minutes.
  """
  return _with_data(
    workdir,
    'images',
    prepare='image --tiles=32',
    config='images.py',
    evaluate='--max_examples=24',
    sample='--prompt_split=validation --num_prompts=2 --prompt_length=6144 '
    '--num_samples=3',
  )


def copy(workdir: Path) -> Plan:
  """Copies that grow; each run begins with the parameters of the last."""
  config = 'perceiver-ar train --config=configs/copy_task.py:demo'
  lengths = (64, 128, 256, 512)
  before, init = [], ''
  for length in lengths:
    folder = _quoted(workdir / f'length_{length}')
    before.append(f'{config}_{length}{init} --workdir={folder}')
    init = f' --config.checkpoint.init_from={folder}'
  return Plan(
    data=[],
    before=before,
    train=f'{config}{init} --workdir={_quoted(workdir)}',
    evaluate=f'perceiver-ar evaluate --workdir={_quoted(workdir)}',
    sample='perceiver-ar sample --prompt_split=validation --prompt_length=511 '
    f'--config.sample.temperature=0 --workdir={_quoted(workdir)}',
  )


def _with_data(
  workdir: Path,
  name: str,
  *,
  prepare: str,
  config: str,
  evaluate: str,
  sample: str,
) -> Plan:
  path = lambda folder: _quoted(workdir / folder)
  folder = _quoted(workdir)
  tool, *flags = prepare.split()
  return Plan(
    data=[
      f'python tools/demo_{name}.py --output={path(name)}',
      f'python tools/prepare_{tool}.py --input={path(name)} '
      f'--output={path("data")} {" ".join(flags)}',
    ],
    before=[],
    train=f'perceiver-ar train --config=configs/{config}:demo '
    f'--config.data.path={path("data")} --workdir={folder}',
    evaluate=' '.join(
      ['perceiver-ar evaluate', *evaluate.split(), f'--workdir={folder}']
    ),
    sample=f'perceiver-ar sample {sample} --workdir={folder}',
  )


_PLANS = {'books': books, 'music': music, 'images': images, 'copy': copy}


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--what', choices=_PLANS, default='books')
  parser.add_argument(
    '--workdir', required=True, type=Path, help='folder for all that it makes'
  )
  args = parser.parse_args(argv)
  try:
    demo(_PLANS[args.what](args.workdir), args.workdir)
  except UserError as error:
    print(f'demo: {error}', file=sys.stderr)
    return 2
  except CommandError as error:
    return error.status
  except KeyboardInterrupt:
    print('demo: stopped; run it again to go on', file=sys.stderr)
    return 130
  return 0


def demo(plan: Plan, workdir: Path) -> None:
  if not Path('configs/default.py').is_file():
    raise UserError(
      f'there is no configs/default.py in {Path.cwd()}; start the demo in the '
      'folder of the repository'
    )
  start = time.monotonic()
  if plan.data and not _is_prepared(workdir / 'data'):
    for command in plan.data:
      _run(command)
  if not _steps(workdir):
    for command in plan.before:
      _run(command)
  _run(plan.train)
  step = max(_steps(workdir))
  for name, command, path in (
    ('evaluation', plan.evaluate, workdir / 'evaluation.json'),
    ('samples', plan.sample, workdir / 'samples' / 'samples.json'),
  ):
    if _step_of(path) == step:
      print(f'{name}: {path} is of step {step}, the newest')
    else:
      _run(command)
  _report(workdir, plan, time.monotonic() - start)


def _is_prepared(data: Path) -> bool:
  if not data.exists():
    return False
  try:
    for split in ('train', 'validation'):
      records.Documents(str(data), split)
  except UserError as error:
    print(f'data: {error} (it is done now)')
    return False
  print(f'data: {data} is prepared')
  return True


def _steps(workdir: Path) -> Sequence[int]:
  # Imported late, like the report: it takes seconds.
  from perceiver_ar import checkpoint

  return checkpoint.saved_steps(workdir)


def _step_of(path: Path) -> int | None:
  """The step that a result is of; None if there is none, or half of it."""
  try:
    return json.loads(path.read_text())['step']
  except (FileNotFoundError, ValueError, KeyError):
    return None


def _report(workdir: Path, plan: Plan, seconds: float) -> None:
  from perceiver_ar.report import document

  run = document.read(workdir)
  path = document.write(run, plan.all(), None)
  report = json.loads((workdir / 'evaluation.json').read_text())
  print()
  if half := report.get('second_half'):
    print(f'second half:   {half["accuracy"]:.4%} right')
  else:
    found = document.compare(run)
    values = [f'{name} {value:.3f}' for name, value in found.values.items()]
    print(f'held out:      {found.unit}: {", ".join(values)}')
  print(
    f'report:        {path}\n'
    f'samples:       {workdir / "samples"}\n'
    f'this took:     {seconds / 60:.1f} minutes'
  )


def _quoted(path: Path) -> str:
  return shlex.quote(str(path))


def _run(command: str) -> None:
  """Runs a command on the terminal that this one has."""
  print(f'\n$ {command}', flush=True)
  program, *arguments = shlex.split(command)
  module = ['-m', 'perceiver_ar.main'] if program == 'perceiver-ar' else []
  process = subprocess.Popen([sys.executable, *module, *arguments])
  try:
    status = process.wait()
  except KeyboardInterrupt:
    _await_end(process)
    raise
  if status:
    # A signal's number is negative here, and 128 more for a shell.
    raise CommandError(status if status > 0 else 128 - status)


def _await_end(process: subprocess.Popen[bytes]) -> None:
  """Ctrl-C reached the command, too: lets it save what it has."""
  try:
    process.wait(_PATIENCE)
  except (subprocess.TimeoutExpired, KeyboardInterrupt):
    process.kill()
    process.wait()


if __name__ == '__main__':
  sys.exit(main())
