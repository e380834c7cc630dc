"""Who of a job is there, before JAX connects them.

JAX's own connection ends the process when a host is late, and does not say
which. So host 0 listens on the coordinator's port first, the others tell it
who they are, and when all are there, or time is up, it tells everyone. Then
the port is JAX's.
"""

import contextlib
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from perceiver_ar.errors import HostsError

_BACKLOG = 4096  # hosts that may call at once
_RETRY_SECONDS = 0.2


def call(
  address: str, process_id: int, num_processes: int, seconds: float
) -> list[str]:
  """The hosts' names by process, once all are there.

  Args:
    address: host:port of process 0.
    process_id: of this process.
    num_processes: of the job.
    seconds: to wait for the others.

  Raises:
    HostsError: not all came in time; it names those that did not.
  """
  host, port = address.rsplit(':', 1)
  end = time.monotonic() + seconds
  if process_id:
    verdict = _answer(host, int(port), process_id, end)
  else:
    bound = host if is_loopback(host) else ''
    verdict = _gather(bound, int(port), num_processes, end)
  if verdict is None:
    raise HostsError(
      f'start: process 0 at {address} did not answer process {process_id} '
      f'within {seconds:g} s; see why it did not start'
    )
  if missing := [p for p in range(num_processes) if str(p) not in verdict]:
    raise HostsError(missing_sentence('start', missing, verdict, seconds))
  return [verdict[str(p)] for p in range(num_processes)]


def missing_sentence(
  name: str, missing: Sequence[int], names: Mapping[str, str], seconds: float
) -> str:
  """What a barrier says; `names` may lack those of hosts never seen."""
  who = ', '.join(
    f'{p} ({names[str(p)]})' if str(p) in names else str(p) for p in missing
  )
  noun = 'process' if len(missing) == 1 else 'processes'
  return (
    f'{name}: {noun} {who} did not come within {seconds:g} s; see the last '
    'lines of what is missing'
  )


def is_loopback(host: str) -> bool:
  return host in ('localhost', '::1') or host.startswith('127.')


def _gather(
  host: str, port: int, num_processes: int, end: float
) -> dict[str, str]:
  """Process 0: waits for the others, and tells them who is there."""
  names = {'0': socket.gethostname()}
  callers: dict[str, socket.socket] = {}
  with socket.create_server((host, port), backlog=_BACKLOG) as server:
    while len(names) < num_processes and (left := end - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        caller, _ = server.accept()
        caller.settimeout(max(end - time.monotonic(), 0.01))
        told = _read(caller)
      except (OSError, ValueError):
        continue  # who does not speak is not there
      process = str(told['process'])
      names[process], callers[process] = told['host'], caller
  for caller in callers.values():
    with caller:
      _write(caller, names)
  return names


def _answer(
  host: str, port: int, process_id: int, end: float
) -> dict[str, str] | None:
  """The others: say who they are until process 0 hears it."""
  me = {'process': process_id, 'host': socket.gethostname()}
  # Its verdict comes at its own end, which may be later than ours.
  while (left := end - time.monotonic()) > 0:
    try:
      with socket.create_connection((host, port), timeout=left) as server:
        _write(server, me)
        server.settimeout(left + 5)
        return _read(server)
    except (OSError, ValueError):
      time.sleep(_RETRY_SECONDS)
  return None


def _write(to: socket.socket, value: Mapping[str, Any]) -> None:
  with contextlib.suppress(OSError):  # if it is gone, the next barrier says so
    to.sendall(json.dumps(value).encode() + b'\n')


def _read(source: socket.socket) -> Any:
  with source.makefile('rb') as lines:
    return json.loads(lines.readline())
