"""The flags of every command."""

import argparse
import sys
from collections.abc import Callable, Mapping
from typing import Any, NoReturn

from etils import epath

from perceiver_ar.errors import MISTAKE

_CONFIG_HELP = """
--config=FILE.py[:ARG] is a file such as configs/books.py:demo; any key of it
is set by --config.SECTION.KEY=VALUE (configs/default.py explains them all)."""

Run = Callable[[argparse.Namespace, list[str]], int]


def fail(sentence: str) -> int:
  """Says what is wrong, and gives the exit status of a mistake."""
  # A library's words, quoted in it, may have lines of their own.
  print(f'perceiver-ar: {" ".join(sentence.split())}', file=sys.stderr)
  return MISTAKE


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as for all other mistakes."""

  def error(self, message: str) -> NoReturn:
    sys.exit(fail(f'{message}; see {self.prog} --help'))


def make_parser(runs: Mapping[str, Run]) -> argparse.ArgumentParser:
  """The parser of the whole command line; `run` is what a command does."""
  parser = _Parser(
    prog='perceiver-ar',
    description='Trains, evaluates and samples Perceiver AR models.',
  )
  commands = parser.add_subparsers(required=True, metavar='COMMAND')
  for name, (about, add) in _COMMANDS.items():
    sub = commands.add_parser(
      name,
      help=about,
      description=about,
      epilog=None
      if name in ('checkpoint', 'drill', 'report')
      else _CONFIG_HELP,
      allow_abbrev=False,
    )
    sub.set_defaults(run=runs[name])
    if name not in ('plan', 'drill', 'report'):
      sub.add_argument(
        '--workdir',
        required=name != 'checkpoint',
        metavar='DIR',
        help='the folder of the run',
      )
    sub.add_argument(
      '--debug', action='store_true', help='show tracebacks of mistakes'
    )
    add(sub)
    if name in ('train', 'evaluate', 'sample'):
      _add_place(sub)
  return parser


def _train(sub: Any) -> None:
  del sub  # all of it is in the config


def _evaluate(sub: Any) -> None:
  sub.add_argument('--split', help='of the data set')
  sub.add_argument('--num_latents', type=int, help='N at test time')
  sub.add_argument('--context_length', type=int, help='M at test time')
  sub.add_argument(
    '--stride', type=int, help='tokens scored per block; 1 is exact and slow'
  )
  sub.add_argument(
    '--max_examples',
    type=int,
    help='documents, evenly spread; default: all',
  )
  _add_step_and_output(sub)


def _sample(sub: Any) -> None:
  sub.add_argument('--num_samples', type=int, help='drawn together')
  sub.add_argument('--length', type=int, help='new tokens of each')
  sub.add_argument(
    '--prompt',
    metavar='FILE',
    action='append',
    help='text, MIDI or PNG to go on from; may be given several times',
  )
  sub.add_argument(
    '--prompt_split',
    metavar='SPLIT',
    help='go on from documents of this split of the data set instead',
  )
  sub.add_argument(
    '--num_prompts', type=int, help='documents, evenly spread; default: 1'
  )
  sub.add_argument(
    '--prompt_length',
    type=int,
    help='go on from the first so many tokens of each, and keep the original '
    'to compare; default: all of them',
  )
  sub.add_argument('--temperature', type=float, help='0: the likeliest')
  sub.add_argument('--top_p', type=float, help='nucleus')
  sub.add_argument('--top_k', type=int, help='0: all')
  sub.add_argument('--seed', type=int)
  sub.add_argument('--num_latents', type=int, help='N at test time')
  sub.add_argument(
    '--refill_latents',
    type=int,
    help='latents made anew when N are in use; default: half of N',
  )
  _add_step_and_output(sub)


def _add_step_and_output(sub: Any) -> None:
  sub.add_argument('--step', type=int, help='of the checkpoint; or newest')
  _add_output(sub, 'write the JSON here, too')


def _add_output(sub: Any, about: str) -> None:
  sub.add_argument('--output', type=epath.Path, metavar='FILE', help=about)


def _add_place(sub: Any) -> None:
  place = sub.add_argument_group(
    'many hosts',
    'The same command on every host. On TPU VMs, GKE and SLURM they find each '
    'other; elsewhere each is told its place (docs/launch.md).',
  )
  place.add_argument(
    '--coordinator', metavar='HOST:PORT', help='of process 0, a free port'
  )
  place.add_argument('--num_processes', type=int, help='of the job')
  place.add_argument('--process_id', type=int, help='of this one, from 0')
  place.add_argument(
    '--barrier_seconds',
    type=_positive,
    default=900.0,
    help='how long processes wait for each other before they end with status '
    '75 and the name of the one that is missing; default: 900',
  )


def _positive(word: str) -> float:
  value = float(word)
  if not 0 < value < float('inf'):
    raise ValueError
  return value


def _plan(sub: Any) -> None:
  sub.add_argument(
    '--topology',
    required=True,
    metavar='CHIP:GRID',
    help='such as v5p:4x4x8, v5e:16x16 or cpu:8; nothing of it need be there',
  )
  sub.add_argument(
    '--num_slices',
    type=int,
    default=1,
    help='of that topology, joined by the network; default: 1',
  )
  sub.add_argument(
    '--command',
    choices=('train', 'evaluate', 'sample'),
    default='train',
    help='whose compiled function; default: train',
  )
  sub.add_argument(
    '--sweep', action='store_true', help='compare layouts in a table'
  )
  _add_output(sub, 'write the plan here as JSON')


def _checkpoint(sub: Any) -> None:
  sub.add_argument(
    'action',
    choices=('list', 'verify', 'diff', 'export'),
    help='list: steps and sizes; verify: every checksum; diff: what differs '
    'between two steps; export: parameters as safetensors',
  )
  sub.add_argument(
    'compared',
    metavar='DIR',
    nargs='*',
    help='right behind diff: two workdirs, or one with two steps',
  )
  sub.add_argument('--step', type=int, help='diff, export; or newest')
  sub.add_argument(
    '--other_step', type=int, help='diff: of the second; or newest'
  )
  _add_output(sub, 'export: the safetensors file; else write the JSON here')


def _drill(sub: Any) -> None:
  sub.add_argument('name', nargs='*', metavar='NAME', help='of faults')
  sub.add_argument('--list', action='store_true', help='the names of faults')
  sub.add_argument('--all', action='store_true', help='every fault')
  sub.add_argument(
    '--processes', type=int, default=2, help='of the job; default: 2'
  )
  _add_output(sub, 'write the verdicts here as JSON')


def _report(sub: Any) -> None:
  sub.add_argument('workdir', metavar='WORKDIR', help='the folder of the run')
  _add_output(sub, 'write the page here instead of to WORKDIR/report.html')


def _replay(sub: Any) -> None:
  sub.add_argument(
    '--step',
    type=int,
    required=True,
    help='as metrics.jsonl counts: the update from state STEP to the next',
  )
  _add_output(sub, 'write the comparison here as JSON')


_COMMANDS: dict[str, tuple[str, Callable[[Any], None]]] = {
  'train': ('Train; run again, it goes on where it was.', _train),
  'evaluate': ('Score every held-out token once, as JSON.', _evaluate),
  'sample': (
    'Write samples to WORKDIR/samples, replacing the last.',
    _sample,
  ),
  'plan': ('Say what a run would take on machines that are not here.', _plan),
  'replay': (
    'Compute a step of a run again, in this process, and compare.',
    _replay,
  ),
  'checkpoint': ('Look at checkpoints.', _checkpoint),
  'drill': (
    'Put faults into small jobs of this machine, and demand that each ends as '
    'if nothing had been.',
    _drill,
  ),
  'report': (
    'Make one HTML page of a run, while it goes on or afterwards.',
    _report,
  ),
}
