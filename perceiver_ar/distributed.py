"""Many hosts, one run: finding one's place, agreeing, and missing nobody.

Every process of a job runs the same command. `find_place` recognises where it
was started; `join` connects the processes, after which `jax.devices()` are
those of all. Every barrier has a time limit and names who did not come. All of
it is nothing at all for a process that is alone.
"""

import collections
import contextlib
import dataclasses
import hashlib
import os
import pathlib
import platform
import socket
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax

# JAX has no public way to its coordination service, nor to what it knows of
# clusters. And `jax.process_index` would look for devices, those of all.
from jax._src import distributed as jax_distributed
from jax._src import hardware_utils
from jax._src.clusters.cluster import ClusterEnv

from perceiver_ar import roll_call
from perceiver_ar.errors import HostsError, UserError

_HEARTBEAT_SECONDS = 60  # of silence, after which JAX ends the whole job
_GOODBYE_SECONDS = 5.0  # that process 0 stays for those that fail with it
_PACKAGES = (
  'flax',
  'grain',
  'jax',
  'jaxlib',
  'numpy',
  'optax',
  'orbax-checkpoint',
  'perceiver-ar',
  'tensorstore',
)


@dataclasses.dataclass(frozen=True)
class Place:
  """One process of a job.

  Attributes:
    kind: where it was started, for people: 'alone', 'flags', 'SLURM', ...
    address: host:port of process 0.
    num_processes: of the job.
    process_id: of this one.
    local_device_ids: which of the machine's devices are its own; None: all.
  """

  kind: str = 'alone'
  address: str = ''
  num_processes: int = 1
  process_id: int = 0
  local_device_ids: Sequence[int] | None = None


@dataclasses.dataclass
class _Job:
  """The job that this process has joined."""

  place: Place | None = None
  names: Sequence[str] = ()
  seconds: float = 0.0
  num_barriers: int = 0


_job = _Job()


def find_place(
  address: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  seconds: float,
) -> Place:
  """Where this process is: by flags, by its surroundings, or alone.

  Args:
    address: host:port of process 0; all three flags or none.
    num_processes: of the job.
    process_id: of this one, from 0.
    seconds: to wait for the name of process 0 to be known.
  """
  flags = (address, num_processes, process_id)
  if any(flag is not None for flag in flags):
    return _place_of_flags(address, num_processes, process_id)
  num_chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
  found = _surroundings(os.environ, num_chips)
  if found is None:
    return Place()
  kind, method = found
  try:
    place = ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, method, int(seconds)
    )
  except Exception as error:  # whatever a metadata server does
    raise HostsError(
      f'this is {kind}, and its place in the job cannot be told ({error}); '
      'give it by --coordinator, --num_processes and --process_id'
    ) from error
  address, num_processes, process_id, devices = place
  assert address and num_processes is not None and process_id is not None
  if num_processes == 1:
    return Place(kind, local_device_ids=devices)
  return Place(kind, address, num_processes, process_id, devices)


def _place_of_flags(
  address: str | None, num_processes: int | None, process_id: int | None
) -> Place:
  if address is None or num_processes is None or process_id is None:
    raise UserError(
      'a place in a job takes all of --coordinator=HOST:PORT, '
      '--num_processes and --process_id; give all three, or none'
    )
  host, _, port = address.rpartition(':')
  if not host or not port.isdecimal():
    raise UserError(
      f'--coordinator={address} must be HOST:PORT, such as 10.0.0.1:8476'
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id={process_id} must be from 0 to {num_processes - 1}, for '
      f'--num_processes={num_processes}'
    )
  return Place('flags', address, num_processes, process_id)


def _surroundings(
  environ: Mapping[str, str], num_chips: int
) -> tuple[str, str] | None:
  """What started this process, for people, and JAX's name for it."""
  if 'SLURM_STEP_NODELIST' in environ and 'SLURM_PROCID' in environ:
    return 'SLURM', 'slurm'
  # An address of a slice means TPU chips; those of a machine alone do not.
  if not num_chips or environ.get('JAX_PLATFORMS', 'tpu') == 'cpu':
    return None
  slices = int(environ.get('MEGASCALE_NUM_SLICES', '1'))
  several = f', {slices} slices' if slices > 1 else ''
  if 'TPU_WORKER_HOSTNAMES' in environ or 'TPU_PROCESS_ADDRESSES' in environ:
    return f'GKE{several}', 'gketpu'
  if 'TPU_SKIP_MDS_QUERY' in environ:
    return None
  return f'TPU VM{several}', 'gcetpu'


def join(place: Place, seconds: float) -> None:
  """Connects the processes of the job.

  Args:
    place: of this process; nothing happens if it is alone.
    seconds: how long any barrier of this job waits.

  Raises:
    HostsError: not all processes came; it names them.
  """
  _job.place, _job.seconds, _job.num_barriers = place, seconds, 0
  if place.num_processes == 1:
    _job.names = [socket.gethostname()]
    return
  # The signals of a preemption are the training loop's.
  jax.config.update('jax_enable_preemption_service', False)
  names = roll_call.call(
    place.address, place.process_id, place.num_processes, seconds
  )
  host, port = place.address.rsplit(':', 1)
  bind = place.address if roll_call.is_loopback(host) else f'[::]:{port}'
  jax.distributed.initialize(
    place.address,
    place.num_processes,
    place.process_id,
    place.local_device_ids,
    cluster_detection_method='deactivate',
    initialization_timeout=int(max(seconds, 1)),
    heartbeat_timeout_seconds=_HEARTBEAT_SECONDS,
    shutdown_timeout_seconds=int(max(seconds, 1)),
    coordinator_bind_address=bind,
  )
  _job.names = names


def describe() -> str:
  """The job, for the log; '' for a process that did not ask for its place."""
  place = _job.place
  if place is None:
    return ''
  if place.num_processes == 1:
    return f'{place.kind}: 1 process'
  return (
    f'{place.kind}: {place.num_processes} processes, process 0 at '
    f'{place.address}'
  )


def me() -> str:
  """This process, such as '1 (node7)'."""
  return name_of(jax_distributed.global_state.process_id)


def name_of(process: int) -> str:
  """Such as '1 (node7)'."""
  if not _job.names:
    return str(process)
  return f'{process} ({_job.names[process]})'


def barrier(name: str) -> None:
  """Waits until all processes are here.

  Raises:
    HostsError: not all came within the job's limit; it names them.
  """
  client = jax_distributed.global_state.client
  if client is None:
    return
  _job.num_barriers += 1
  at = f'barrier/{_job.num_barriers}'
  process = jax_distributed.global_state.process_id
  client.key_value_set(f'{at}/{process}', name)
  try:
    client.wait_at_barrier(at, int(_job.seconds * 1000))
  except jax.errors.JaxRuntimeError as error:
    here = {key.rsplit('/', 1)[1] for key, _ in client.key_value_dir_get(at)}
    missing = [p for p in range(len(_job.names)) if str(p) not in here]
    if not missing:
      raise HostsError(f'{name}: {error}') from error
    names = {str(p): name for p, name in enumerate(_job.names)}
    raise HostsError(
      roll_call.missing_sentence(name, missing, names, _job.seconds)
    ) from error
  if process == 0 and _job.num_barriers > 1:  # all have left the one before
    client.key_value_delete(f'barrier/{_job.num_barriers - 1}/')


def agree(facts: Mapping[str, str]) -> None:
  """Compares these facts with the other processes', before any collective.

  Args:
    facts: by name, such as a key of the config.

  Raises:
    UserError: one process differs; on all processes, naming it and the facts.
  """
  client = jax_distributed.global_state.client
  if client is None:
    return
  process = jax_distributed.global_state.process_id
  for name, value in facts.items():
    client.key_value_set(f'facts/{process}/{name}', value)
  barrier('agreement')
  seen: list[dict[str, str]] = [{} for _ in _job.names]
  for key, value in client.key_value_dir_get('facts/'):
    _, number, name = key.split('/', 2)
    seen[int(number)][name] = value
  barrier('agreement')
  if process == 0:
    client.key_value_delete('facts/')
  if sentence := _odd_one(seen):
    raise UserError(sentence)


def _odd_one(seen: Sequence[Mapping[str, str]]) -> str:
  """Says which process is not like most, and in what; '' if all are alike."""
  whole = [tuple(sorted(facts.items())) for facts in seen]
  usual = dict(collections.Counter(whole).most_common(1)[0][0])
  for process, facts in enumerate(seen):
    names = sorted({*usual, *facts})
    if differ := [n for n in names if facts.get(n) != usual.get(n)]:
      shown = '; '.join(
        f'{n} is {facts.get(n, "absent")} there and '
        f'{usual.get(n, "absent")} elsewhere'
        for n in differ[:3]
      )
      more = f'; and {len(differ) - 3} more' if differ[3:] else ''
      return (
        f'process {name_of(process)} is not like the others: {shown}{more}; '
        'start all with the same command, code, packages and data'
      )
  return ''


def software() -> dict[str, str]:
  """What `agree` should know of this installation: versions, and our code."""
  versions = {'python': platform.python_version()}
  for name in _PACKAGES:
    with contextlib.suppress(metadata.PackageNotFoundError):
      versions[name] = metadata.version(name)
  folder = pathlib.Path(__file__).parent
  code = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    code.update(path.relative_to(folder).as_posix().encode())
    code.update(path.read_bytes())
  return versions | {'code': code.hexdigest()[:16]}


@contextlib.contextmanager
def first_process_first() -> Iterator[bool]:
  """True on process 0; the others wait until it is done."""
  is_first = jax_distributed.global_state.process_id == 0
  if not is_first:
    barrier('files')
  yield is_first
  if is_first:
    barrier('files')


def leave(status: int) -> None:
  """Ends a process of a job; if it fails, without waiting for the others.

  JAX would wait for them for minutes, and then end in a stack trace.
  """
  client = jax_distributed.global_state.client
  if client is None:
    return
  if status == 0:
    jax.distributed.shutdown()
    return
  sys.stdout.flush()
  sys.stderr.flush()
  process = jax_distributed.global_state.process_id
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    client.key_value_set(f'left/{process}', str(status))
    # With process 0 the service goes, and with that all who are still there:
    # those that make the same mistake should say so themselves.
    end = time.monotonic() + (_GOODBYE_SECONDS if process == 0 else 0.0)
    while time.monotonic() < end and not _all_have_left(client):
      time.sleep(0.05)
  os._exit(status)


def _all_have_left(client: Any) -> bool:
  return len(client.key_value_dir_get('left/')) == len(_job.names)
