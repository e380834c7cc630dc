"""Who of a job is there, before JAX connects them.

JAX's own connection ends the process when a host is late, and does not say
which. So host 0 listens on the coordinator's port first, the others tell it
who they are, and when all are there, or time is up, it tells everyone. Then
the port is JAX's.
"""

import contextlib
import ipaddress
import json
import socket
import time
from collections.abc import Mapping, Sequence
from typing import Any

from perceiver_ar.errors import HostsError

_BACKLOG = 4096  # hosts that may call at once
_RETRY_SECONDS = 0.2
_MOST_BYTES = 2**22  # of a line: names of all hosts
_WORD_SECONDS = 5.0  # that a caller has to say who it is


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
  host, port = parts(address)
  end = time.monotonic() + seconds
  if process_id:
    verdict = _answer(host, port, process_id, num_processes, end)
  else:
    bound = host if is_loopback(host) else ''
    verdict = _gather(bound, port, num_processes, end)
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


def parts(address: str) -> tuple[str, int]:
  """Host and port; an IPv6 address without its brackets."""
  host, _, port = address.rpartition(':')
  return host.removeprefix('[').removesuffix(']'), int(port)


def is_loopback(host: str) -> bool:
  """Whether only this machine hears what is said there."""
  try:
    return ipaddress.ip_address(host).is_loopback
  except ValueError:
    return host == 'localhost'


def _gather(
  host: str, port: int, num_processes: int, end: float
) -> dict[str, str]:
  """Process 0: waits for the others, and tells them who is there."""
  names = {'0': socket.gethostname()}
  callers: dict[str, socket.socket] = {}
  try:
    server = _listen(host, port)
  except OSError as error:
    raise HostsError(
      f'start: process 0 cannot listen on port {port} ({error.strerror}); '
      'free the port, or choose another'
    ) from error
  with server, contextlib.ExitStack() as heard:
    while len(names) < num_processes and (left := end - time.monotonic()) > 0:
      server.settimeout(left)
      try:
        caller = heard.enter_context(server.accept()[0])
        told = _read(caller, _WORD_SECONDS)
        process, name = _introduced(told, num_processes)
      except (OSError, ValueError, KeyError, TypeError, RecursionError):
        continue  # who does not speak, or of something else, is not there
      caller.settimeout(_WORD_SECONDS)
      names[process], callers[process] = name, caller
    for caller in callers.values():
      _write(caller, names)
  return names


def _listen(host: str, port: int) -> socket.socket:
  """Where the host is; '': everywhere, for IPv4 and IPv6 if there are both."""
  both = not host and socket.has_dualstack_ipv6()
  family = socket.AF_INET6 if both or ':' in host else socket.AF_INET
  return socket.create_server(
    (host, port), family=family, backlog=_BACKLOG, dualstack_ipv6=both
  )


def _introduced(told: Any, num_processes: int) -> tuple[str, str]:
  """A caller's process and host.

  Raises:
    ValueError, KeyError, TypeError: it is no process of this job.
  """
  process = told['process']
  if told['of'] != num_processes or type(process) is not int:
    raise ValueError
  if not 0 < process < num_processes:
    raise ValueError
  return str(told['process']), str(told['host'])


def _answer(
  host: str, port: int, process_id: int, num_processes: int, end: float
) -> dict[str, str] | None:
  """The others: say who they are until process 0 hears it."""
  me = {
    'process': process_id,
    'of': num_processes,
    'host': socket.gethostname(),
  }
  while (left := end - time.monotonic()) > 0:
    with (
      contextlib.suppress(OSError, ValueError),
      socket.create_connection((host, port), timeout=left) as server,
    ):
      _write(server, me)
      # Its verdict comes at its own end: it may have begun later.
      return _read(server, left + _WORD_SECONDS)
    time.sleep(_RETRY_SECONDS)
  return None


def _write(to: socket.socket, value: Mapping[str, Any]) -> None:
  with contextlib.suppress(OSError):  # if it is gone, the next barrier says so
    to.sendall(json.dumps(value).encode() + b'\n')


def _read(source: socket.socket, seconds: float) -> Any:
  """One line, as JSON; OSError or ValueError if none comes in that time."""
  line, end = b'', time.monotonic() + seconds
  while not line.endswith(b'\n') and len(line) < _MOST_BYTES:
    source.settimeout(max(end - time.monotonic(), 0.001))
    if not (part := source.recv(2**16)):
      break
    line += part
  return json.loads(line)
