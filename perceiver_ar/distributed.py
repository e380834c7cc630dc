"""Many hosts, one run: joining, agreeing, and missing nobody.

Every process of a job runs the same command. `join` connects the processes,
after which `jax.devices()` are those of all. Every barrier has a time limit and
names who did not come. All of it is nothing at all for a process that is alone.
"""

import collections
import contextlib
import dataclasses
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax

# JAX has no public way to its coordination service. And `jax.process_index`
# would look for devices, those of all.
from jax._src import distributed as jax_distributed
from jax._src import xla_bridge
from jaxlib import _jax  # pyright: ignore[reportAttributeAccessIssue]

from perceiver_ar import places, roll_call
from perceiver_ar.errors import MISTAKE, HostsError, UserError
from perceiver_ar.places import Place

_HEARTBEAT_SECONDS = 60  # of silence, after which JAX ends the whole job
_GOODBYE_SECONDS = 5.0  # that process 0 stays for those that fail with it
_MEETING_SECONDS = 60.0  # the same, so that they hear of a mistake
_EXIT_SECONDS = 1.0  # that it stays on, until those have ended
_LAG_SECONDS = 60.0  # of a shared file system
_LOOK_SECONDS = 0.5  # between looks at who has left


@dataclasses.dataclass
class _Job:
  """The job that this process has joined."""

  names: Sequence[str] = ()
  seconds: float = 0.0
  num_barriers: int = 0
  last_barrier: str = ''
  last_collective: str = ''
  waited: float = 0.0  # seconds at barriers that are passed
  waits_since: float | None = None


_job = _Job()


def join(place: Place, seconds: float) -> None:
  """Connects the processes of the job.

  Args:
    place: of this process; nothing happens if it is alone.
    seconds: how long any barrier of this job waits.

  Raises:
    HostsError: not all processes came; it names them.
  """
  _job.seconds, _job.num_barriers = seconds, 0
  if place.num_processes == 1:
    _job.names = [socket.gethostname()]
    return
  # The signals of a preemption are the training loop's.
  jax.config.update('jax_enable_preemption_service', False)
  names = roll_call.call(
    place.address, place.process_id, place.num_processes, seconds
  )
  host, port = roll_call.parts(place.address)
  is_local = roll_call.is_loopback(host)
  bind = place.address if is_local else f'[::]:{port}'
  if is_local:
    _keep_collectives_to(host)
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


def meet_to_part(
  address: str | None,
  num_processes: int | None,
  process_id: int | None,
  seconds: float,
) -> None:
  """After a mistake, so that the others hear of it and do not wait in vain.

  Nothing happens if this process has joined them, or is alone.
  """
  if jax_distributed.global_state.client is not None:
    return
  seconds = min(seconds, _MEETING_SECONDS)
  with contextlib.suppress(Exception):  # the mistake may be the place itself
    place = places.find_place(
      address, num_processes, process_id, seconds=seconds
    )
    if place.num_processes > 1:
      print(f'{places.describe(place)}: tells the others', file=sys.stderr)
      join(place, seconds)


def _keep_collectives_to(host: str) -> None:
  """CPUs of a job on this machine do not listen where others could call.

  JAX has them listen at the machine's own name, and no option for it.
  """

  def make_client() -> Any:
    collectives = None
    if getattr(jax.config, 'jax_cpu_collectives_implementation') == 'gloo':  # noqa: B009
      client = jax_distributed.global_state.client
      collectives = _jax.make_gloo_tcp_collectives(client, hostname=host)
    return xla_bridge.make_cpu_client(collectives)

  xla_bridge.register_backend_factory(
    'cpu', make_client, priority=0, fail_quietly=False
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
    HostsError: not all came within the job's limit, or one has left; it names
      them.
    UserError: one has left because of a mistake of its own.
  """
  _job.last_barrier = name
  client = jax_distributed.global_state.client
  if client is None:
    return
  _job.num_barriers += 1
  at = f'barrier/{_job.num_barriers}'
  process = jax_distributed.global_state.process_id
  with _service(name), _waiting():
    client.key_value_set(f'{at}/{process}', name)
    if not _wait(client, at, name):
      here, left = _entries(client, at), _entries(client, 'left')
      all_p = range(len(_job.names))
      missing = [p for p in all_p if p not in here and p not in left]
      if not missing:
        _say_who_left(name, left)
        raise HostsError(
          f'{name}: not all processes came within {_job.seconds:g} s, though '
          'they have since'
        )
      names = {str(p): host for p, host in enumerate(_job.names)}
      raise HostsError(
        roll_call.missing_sentence(name, missing, names, _job.seconds)
      )
    if process == 0 and _job.num_barriers > 1:  # all have left the one before
      for folder in ('barrier', 'exchange'):
        client.key_value_delete(f'{folder}/{_job.num_barriers - 1}/')


def _wait(client: Any, at: str, name: str) -> bool:
  """False if not all came in time; raises if one has left, and never comes.

  In a thread, so that this one sees who leaves, and signals.
  """
  passed, over = threading.Event(), threading.Event()

  def wait() -> None:
    with contextlib.suppress(jax.errors.JaxRuntimeError):
      client.wait_at_barrier(at, int(_job.seconds * 1000))
      passed.set()
    over.set()

  threading.Thread(target=wait, daemon=True).start()
  while not over.wait(_LOOK_SECONDS):
    # One that came, and has left since, may have let this one pass.
    if (left := _entries(client, 'left')) and not over.wait(_LOOK_SECONDS):
      _say_who_left(name, left)
  return passed.is_set()


def check_present(name: str) -> None:
  """Raises as `barrier` does if a process has left; waits for none."""
  client = jax_distributed.global_state.client
  if client is not None:
    with _service(name):
      left = _entries(client, 'left')
    _say_who_left(name, left)


@contextlib.contextmanager
def _waiting() -> Iterator[None]:
  _job.waits_since = time.monotonic()
  try:
    yield
  finally:
    _job.waited, _job.waits_since = waited(), None


def waited() -> float:
  """The seconds that this process has spent at barriers, until now."""
  since = _job.waits_since
  return _job.waited + (time.monotonic() - since if since else 0.0)


@contextlib.contextmanager
def _service(name: str) -> Iterator[None]:
  """Process 0 has it, and is gone where it does not answer."""
  try:
    yield
  except jax.errors.JaxRuntimeError as error:
    raise HostsError(
      f'{name}: process {name_of(0)} is gone, and all others with it; see its '
      'last lines'
    ) from error


def collective(name: str) -> None:
  """A program of all processes is about to begin here."""
  _job.last_collective = name


def last_met() -> str:
  """Where this process met the others last, or was about to."""
  return (
    f'the last barrier was {_job.last_barrier!r}, the last collective '
    f'{_job.last_collective!r}'
  )


def _entries(client: Any, folder: str) -> dict[int, str]:
  """What processes have put there."""
  found = client.key_value_dir_get(f'{folder}/')
  return {int(key.rsplit('/', 1)[1]): value for key, value in found}


def _say_who_left(name: str, left: Mapping[int, str]) -> None:
  """Raises if there is another; mistakes count most, then who was first."""
  me = jax_distributed.global_state.process_id
  others = [(p, *map(int, said.split())) for p, said in left.items() if p != me]
  if not others:
    return
  process, status, _ = min(others, key=lambda x: (x[1] != MISTAKE, x[2]))
  said = (
    f'{name}: process {name_of(process)} ended with status {status}; see its '
    'last lines'
  )
  # Started again, it would make the same mistake.
  raise UserError(said) if status == MISTAKE else HostsError(said)


def exchange(name: str, value: str) -> list[str]:
  """What all processes give, in their order; a barrier, too.

  Raises:
    HostsError, UserError: as `barrier` does.
  """
  client = jax_distributed.global_state.client
  if client is None:
    return [value]
  folder = f'exchange/{_job.num_barriers + 1}'
  process = jax_distributed.global_state.process_id
  with _service(name):
    client.key_value_set(f'{folder}/{process}', value)
  barrier(name)
  with _service(name):
    given = _entries(client, folder)
  return [given[p] for p in range(len(_job.names))]


def agree(facts: Mapping[str, str]) -> None:
  """Compares these facts with the other processes', before any collective.

  Args:
    facts: by name, such as a key of the config.

  Raises:
    UserError: one process differs; on all processes, naming it and the facts.
  """
  given = exchange('agreement', json.dumps(dict(facts)))
  if sentence := _odd_one([json.loads(said) for said in given]):
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


@contextlib.contextmanager
def first_process_first() -> Iterator[bool]:
  """True on process 0; the others wait until it is done."""
  is_first = jax_distributed.global_state.process_id == 0
  if not is_first:
    barrier('files')
  yield is_first
  if is_first:
    barrier('files')


def wait_for(is_true: Callable[[], bool]) -> bool:
  """Whether it comes true soon: shared file systems may lag behind."""
  end = time.monotonic() + _LAG_SECONDS
  while not is_true():
    if time.monotonic() > end:
      return False
    time.sleep(0.2)
  return True


def leave(status: int) -> None:
  """Ends a process of a job; if it fails, without waiting for the others.

  JAX would wait for them for minutes, and then end in a stack trace.
  """
  client = jax_distributed.global_state.client
  if client is None:
    return
  sys.stdout.flush()
  sys.stderr.flush()
  process = jax_distributed.global_state.process_id
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    if status == 0 and not _entries(client, 'left'):
      jax.distributed.shutdown()
      return
    if status != 0:
      place = len(_entries(client, 'left'))
      client.key_value_set(f'left/{process}', f'{status} {place}')
  with contextlib.suppress(jax.errors.JaxRuntimeError):
    # With process 0 the service goes, and with that all who are still there:
    # those that make the same mistake should say so themselves.
    stays = _MEETING_SECONDS if status == MISTAKE else _GOODBYE_SECONDS
    end = time.monotonic() + stays
    while process == 0 and time.monotonic() < end:
      if _all_have_left(client):
        break
      time.sleep(0.05)
    time.sleep(_EXIT_SECONDS if process == 0 else 0)
  os._exit(status)


def _all_have_left(client: Any) -> bool:
  return len(_entries(client, 'left')) == len(_job.names)
