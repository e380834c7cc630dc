"""Starts the trainer on TPU slices of a GKE cluster, as one JobSet.

  python launch/gke.py --topology=v5p:4x4x8 --num_slices=2 \\
    --image=REGISTRY/perceiver-ar:1 --bucket=gs://BUCKET \\
    -- train --config=configs/books.py:long

The same command on every host; a host that is lost restarts all of them, a
mistake (exit status 2) none. `evaluate` and `sample` run the same way.
--dry_run shows the manifest, and XPK's command for the same, and needs no
cluster.
"""

import argparse
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import NoReturn

import yaml
from jobset import DATA, Job, jobset, max_name_length, xpk_command
from tpus import GENERATIONS, UserError, find_slice

_USAGE = (
  'gke.py --topology=CHIP:GRID --image=IMAGE --bucket=gs://BUCKET [FLAG ...] '
  '-- train|evaluate|sample [--config=FILE.py[:ARG]] '
  '[--config.SECTION.KEY=VALUE ...]'
)
_COMMANDS = ('train', 'evaluate', 'sample')


def main(argv: Sequence[str] | None = None) -> int:
  """Prints the JobSet, or creates it. Returns the exit status."""
  words = list(sys.argv[1:] if argv is None else argv)
  split = words.index('--') if '--' in words else len(words)
  args = _parser().parse_args(words[:split])
  try:
    job = make_job(args, words[split + 1 :])
    manifest = yaml.safe_dump(jobset(job), sort_keys=False)
    if args.dry_run:
      _print(job, manifest)
      return 0
    return _create(job, manifest)
  except UserError as error:
    return _fail(str(error))


def _print(job: Job, manifest: str) -> None:
  # The command is a comment, so that all of this is YAML.
  print(f'{manifest}# With XPK, but for what docs/launch.md names:')
  if job.data:
    print(f'# (XPK copies no data: first have it mount them as {DATA})')
  print(f'#   {xpk_command(job)}')


def _create(job: Job, manifest: str) -> int:
  if not shutil.which('kubectl'):
    raise UserError(
      'kubectl is not on PATH; install it, or look at the manifest with '
      '--dry_run'
    )
  place = f' --namespace={job.namespace}' if job.namespace else ''
  # Waits for the pods, which save: JobSet knows its jobs by its name alone, and
  # would take those of the last run for its own.
  delete = f'kubectl delete jobset {job.name}{place} --cascade=foreground'
  # `apply` would leave a JobSet that has ended as it is, and call that success.
  command = ['kubectl', 'create', '-f', '-']
  result = subprocess.run(
    command, input=manifest, text=True, stderr=subprocess.PIPE
  )
  if '(AlreadyExists)' in result.stderr:
    raise UserError(
      f'there is a JobSet {job.name}, running or ended; to go on from its last '
      f'checkpoint first delete it: {delete}'
    )
  print(result.stderr, end='', file=sys.stderr)
  if result.returncode:
    _fail(
      f'kubectl create failed with exit status {result.returncode}; the '
      'cluster must have JobSet 0.6 or later'
    )
    return result.returncode
  _tell(job.name, place, delete)
  return 0


def _tell(name: str, place: str, delete: str) -> None:
  first = (
    f'jobset.sigs.k8s.io/jobset-name={name},'
    'jobset.sigs.k8s.io/job-index=0,batch.kubernetes.io/job-completion-index=0'
  )
  print(f'see it:    kubectl get jobset {name}{place}')
  print(f'follow it: kubectl logs --follow --selector={first}{place}')
  print(f'stop it:   {delete}')


def _fail(sentence: str) -> int:
  """Says what is wrong, and gives the exit status of a mistake."""
  print(f'gke.py: {sentence}', file=sys.stderr)
  return 2


class _Parser(argparse.ArgumentParser):
  """Says what is wrong in one line, as for all other mistakes."""

  def error(self, message: str) -> NoReturn:
    sys.exit(_fail(f'{message}; see gke.py --help'))


def _parser() -> argparse.ArgumentParser:
  parser = _Parser(
    prog='gke.py',
    usage=_USAGE,
    description=(__doc__ or '').split('\n\n')[0],
    epilog='What follows -- is run on every host. Started again with the same '
    'name, once its JobSet is deleted, it goes on from the last checkpoint. '
    'docs/launch.md has more.',
    allow_abbrev=False,
  )
  _add_job(parser)
  parser.add_argument(
    '--queue', help='LocalQueue of Kueue that admits it; default: none'
  )
  parser.add_argument(
    '--priority', metavar='CLASS', help='PriorityClass of its pods'
  )
  parser.add_argument(
    '--max_restarts',
    type=int,
    default=100,
    help='of all hosts together, preemptions among them; default: 100',
  )
  parser.add_argument(
    '--ramdisk',
    type=int,
    default=0,
    metavar='GiB',
    help="of a host's memory, as /ramdisk; emptied by a restart",
  )
  parser.add_argument(
    '--disk',
    type=int,
    default=0,
    metavar='GiB',
    help="of a host's disk, as /scratch; emptied by a restart. With --queue "
    'its ClusterQueue must have a quota of ephemeral-storage',
  )
  parser.add_argument(
    '--dry_run',
    action='store_true',
    help="print the manifest and XPK's command, and start nothing",
  )
  return parser


def _add_job(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--topology',
    required=True,
    metavar='CHIP:GRID',
    help=f'of a slice, such as v5p:4x4x8; chips: {", ".join(GENERATIONS)}',
  )
  parser.add_argument(
    '--num_slices', type=int, default=1, help='joined by DCN; default: 1'
  )
  parser.add_argument(
    '--image', required=True, help='that has perceiver-ar (Dockerfile)'
  )
  parser.add_argument(
    '--bucket',
    required=True,
    metavar='gs://BUCKET',
    help='the workdir is --bucket/--name, unless the command has a --workdir',
  )
  parser.add_argument(
    '--data',
    metavar='gs://FOLDER',
    help='a prepared data set, copied to every host before it starts; default: '
    'none, as the image has it, or the config needs none',
  )
  parser.add_argument(
    '--name',
    help='of the run; default: that of its config, such as books-long, or of '
    'its --workdir. For evaluate and sample the JobSet has that behind it, as '
    'in books-long-sample',
  )
  parser.add_argument(
    '--namespace', help="of the cluster; default: kubectl's current one"
  )


def make_job(args: argparse.Namespace, command: Sequence[str]) -> Job:
  """Checks the flags against each other, and fills in what follows."""
  tpu = find_slice(args.topology)
  if args.num_slices < 1:
    raise UserError(f'--num_slices={args.num_slices} must be at least 1')
  if args.num_slices > 1 and tpu.num_hosts == 1:
    raise UserError(
      f'--num_slices={args.num_slices} with --topology={args.topology}: GKE '
      'joins slices of two hosts or more; use a larger topology'
    )
  for flag in ('max_restarts', 'ramdisk', 'disk'):
    if getattr(args, flag) < 0:
      raise UserError(f'--{flag}={getattr(args, flag)} must be at least 0')
  if not re.fullmatch(r'gs://[^/\s]+(/\S*)?', args.bucket):
    raise UserError(
      f'--bucket={args.bucket} must be a gs:// path, such as gs://runs'
    )
  if args.data and not args.data.startswith('gs://'):
    raise UserError(
      f'--data={args.data} must be a gs:// path; upload the prepared folder '
      'with gcloud storage cp --recursive'
    )
  if not command or command[0] not in _COMMANDS:
    raise UserError(
      'the trainer is told to train, evaluate or sample behind --, as in: '
      '-- train --config=configs/books.py:long'
    )
  name = args.name or _name_of(command)
  # Beside the JobSet that trained it, which stays where it is.
  ending = '' if command[0] == 'train' else f'-{command[0]}'
  _check_name(name, max_name_length(tpu, args.num_slices) - len(ending))
  return Job(
    name=name + ending,
    namespace=args.namespace,
    image=args.image,
    command=_complete(
      command, f'{args.bucket.rstrip("/")}/{name}', bool(args.data)
    ),
    data=args.data,
    slice=tpu,
    num_slices=args.num_slices,
    queue=args.queue,
    priority=args.priority,
    max_restarts=args.max_restarts,
    ramdisk=args.ramdisk,
    disk=args.disk,
  )


def _name_of(command: Sequence[str]) -> str:
  """Such as 'books-long', of --config=configs/books.py:long.

  Of the --workdir, for commands that take the config from there.
  """
  configs = [word[9:] for word in command if word.startswith('--config=')]
  file, _, arg = configs[-1].partition(':') if configs else ('', '', '')
  name = f'{Path(file).stem} {arg}'
  if command[0] != 'train' and not configs:
    workdir = _value(command, '--workdir')
    if workdir is None:
      raise UserError(
        f'{command[0]} needs a run that was trained: its --name in front of '
        '--, or its --workdir behind it'
      )
    name = Path(workdir).name
  words = re.findall(r'[a-z0-9]+', name.lower())
  return '-'.join(words) or 'perceiver-ar'


def _check_name(name: str, room: int) -> None:
  if len(name) > room or not re.fullmatch(r'[a-z]([a-z0-9-]*[a-z0-9])?', name):
    raise UserError(
      f'--name={name} must begin with a letter, have only a-z, 0-9 and - in '
      f'it, and at most {room} characters'
    )


def _complete(
  command: Sequence[str], workdir: str, has_data: bool
) -> tuple[str, ...]:
  """The whole command line of a host, with its folders."""
  words = ['perceiver-ar', *command]
  given = _value(command, '--workdir')
  if given is None:
    words.append(f'--workdir={workdir}')
  elif not given.startswith('gs://'):
    raise UserError(
      f'--workdir={given} would be another folder on every host; use a gs:// '
      'path, or leave it to --bucket and --name'
    )
  path = _value(command, '--config.data.path')
  if has_data:
    if path is not None:
      raise UserError(
        f'--config.data.path={path} is set by --data; give one of them'
      )
    words.append(f'--config.data.path={DATA}')
  elif path is not None and path.startswith('gs://'):
    raise UserError(
      f'--config.data.path={path} is no folder of a host; give it as '
      f'--data={path} in front of --, which copies it there'
    )
  return tuple(words)


def _value(command: Sequence[str], flag: str) -> str | None:
  """Of --flag=VALUE or --flag VALUE, if it is there."""
  for word, following in zip(command, [*command[1:], ''], strict=True):
    if word == flag:
      return following
    if word.startswith(f'{flag}='):
      return word.split('=', 1)[1]
  return None


if __name__ == '__main__':
  sys.exit(main())
