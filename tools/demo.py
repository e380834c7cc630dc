"""Trains, evaluates and samples a small model on real books, on a CPU.

  python tools/demo.py --workdir=runs/demo

It prints every command before it runs it. Run again, it goes on where it was:
what is there is not made again. At the end WORKDIR/report.html shows it all.
"""

import argparse
import json
import shlex
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import demo_books
import prepare_text

from perceiver_ar.data import records
from perceiver_ar.errors import UserError

_CONFIG = 'configs/books.py'
_HELD_OUT = 0.012  # of the books: 0.6 MB, scored in half a minute
_PROMPT = 1000  # bytes of a held-out book that the samples go on from
_PATIENCE = 60.0  # seconds that a command has to stop after Ctrl-C


class CommandError(Exception):
  """A command ended with a status that is not 0."""

  def __init__(self, status: int):
    super().__init__(status)
    self.status = status


class Commands:
  """What makes the demo, as a person would type it."""

  def __init__(self, workdir: Path):
    path = lambda name: shlex.quote(str(workdir / name))
    folder = shlex.quote(str(workdir))
    self.books = f'python tools/demo_books.py --output={path("books")}'
    self.prepare = (
      f'python tools/prepare_text.py --input={path("books")} '
      f'--output={path("data")} --held_out={_HELD_OUT}'
    )
    self.train = (
      f'perceiver-ar train --config={_CONFIG}:demo '
      f'--config.data.path={path("data")} --workdir={folder}'
    )
    self.evaluate = f'perceiver-ar evaluate --workdir={folder}'
    self.prompt = ''  # known once the data set is there
    self.sample = (
      f'perceiver-ar sample --prompt={path("prompt.txt")} --workdir={folder}'
    )

  def all(self) -> list[str]:
    return [
      self.books,
      self.prepare,
      self.prompt,
      self.train,
      self.evaluate,
      self.sample,
    ]


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--workdir', required=True, help='folder for all that it makes'
  )
  args = parser.parse_args(argv)
  try:
    demo(Path(args.workdir))
  except UserError as error:
    print(f'demo: {error}', file=sys.stderr)
    return 2
  except CommandError as error:
    return error.status
  except KeyboardInterrupt:
    print('demo: stopped; run it again to go on', file=sys.stderr)
    return 130
  return 0


def demo(workdir: Path) -> None:
  if not Path(_CONFIG).is_file():
    raise UserError(
      f'there is no {_CONFIG} in {Path.cwd()}; start the demo in the folder '
      'of the repository'
    )
  start = time.monotonic()
  commands = Commands(workdir)
  _prepare(workdir, commands)
  commands.prompt = _write_prompt(workdir)
  _run(commands.train)
  step = _newest_step(workdir)
  for name, command, path in (
    ('evaluation', commands.evaluate, workdir / 'evaluation.json'),
    ('samples', commands.sample, workdir / 'samples' / 'samples.json'),
  ):
    if _step_of(path) == step:
      print(f'{name}: {path} is of step {step}, the newest')
    else:
      _run(command)
  _report(workdir, commands, time.monotonic() - start)


def _prepare(workdir: Path, commands: Commands) -> None:
  """Books and data set; the books are not needed once that is there."""
  books, data = workdir / 'books', workdir / 'data'
  if _is_prepared(data):
    print(f'books: {data} is prepared')
    return
  _announce(commands.books)
  demo_books.collect(books)
  _announce(commands.prepare)
  documents, _ = prepare_text.folder_documents(books, held_out=_HELD_OUT)
  prepare_text.prepare(documents, data, vocabulary='bytes', vocab_size=0)


def _write_prompt(workdir: Path) -> str:
  """The opening of the longest held-out book; returns the command for it."""
  documents = records.Documents(str(workdir / 'data'), 'validation')
  longest = int(documents.num_tokens.argmax())
  opening = documents.codec.decode(documents[longest]).encode()[:_PROMPT]
  path = workdir / 'prompt.txt'
  book = shlex.quote(str(workdir / 'books' / documents.info(longest).name))
  command = f'head -c {_PROMPT} {book} > {shlex.quote(str(path))}'
  if not path.exists():
    _announce(command)
    path.write_bytes(opening.decode(errors='ignore').encode())
  return command


def _is_prepared(data: Path) -> bool:
  if not data.exists():
    return False
  try:
    for split in ('train', 'validation'):
      records.Documents(str(data), split)
  except UserError as error:
    print(f'books: {error} (it is done now)')
    return False
  return True


def _newest_step(workdir: Path) -> int:
  # Imported late, like the report: it takes seconds.
  from perceiver_ar import checkpoint

  return max(checkpoint.saved_steps(workdir))


def _step_of(path: Path) -> int | None:
  """The step that a result is of; None if there is none, or half of it."""
  try:
    return json.loads(path.read_text())['step']
  except (FileNotFoundError, ValueError, KeyError):
    return None


def _report(workdir: Path, commands: Commands, seconds: float) -> None:
  from perceiver_ar.report import document

  path = document.write(workdir, commands.all())
  bits = document.compare(workdir)
  ours = next(iter(bits.values()))
  print(
    f'\nheld-out text: {ours:.3f} bits per byte (xz -9: {bits["xz -9"]:.3f})\n'
    f'report:        {path}\n'
    f'samples:       {workdir / "samples"}\n'
    f'this took:     {seconds / 60:.1f} minutes'
  )


def _announce(command: str) -> None:
  print(f'\n$ {command}', flush=True)


def _run(command: str) -> None:
  """Runs a `perceiver-ar` command on the terminal that this one has."""
  _announce(command)
  _, *arguments = shlex.split(command)
  process = subprocess.Popen(
    [sys.executable, '-m', 'perceiver_ar.main', *arguments]
  )
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
