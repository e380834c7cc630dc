"""Jobs of one machine are heard on that machine alone."""

import ipaddress
import pathlib
import socket
import sys
import time

import pytest
from hosts import ends, free_port, start_job, start_process

pytestmark = pytest.mark.skipif(
  not pathlib.Path('/proc/net/tcp').exists(), reason='sockets are seen in /proc'
)

_LISTENING = '0A'
_TRAIN = ('train', '--config=configs/copy_task.py:tiny')


def listening(pid):
  """Where a process listens, as (address, port)."""
  folder = pathlib.Path(f'/proc/{pid}')
  own = set()
  for file in (folder / 'fd').iterdir():
    try:
      own.add(str(file.readlink()))
    except FileNotFoundError:  # it is closed by now
      continue
  found = set()
  for kind in ('tcp', 'tcp6'):
    for line in (folder / 'net' / kind).read_text().splitlines()[1:]:
      words = line.split()
      if words[3] == _LISTENING and f'socket:[{words[9]}]' in own:
        address, port = words[1].split(':')
        found.add((to_address(address), int(port, 16)))
  return found


def to_address(digits):
  """/proc has words of 32 bits, as this machine orders their bytes."""
  raw = bytes.fromhex(digits)
  words = [raw[i : i + 4] for i in range(0, len(raw), 4)]
  if sys.byteorder == 'little':
    words = [word[::-1] for word in words]
  return ipaddress.ip_address(b''.join(words))


def is_loopback(address):
  # Of IPv4, seen by a socket of IPv6.
  mapped = getattr(address, 'ipv4_mapped', None)
  return (mapped or address).is_loopback


def watch(job, seconds=120):
  """All places where these processes are seen to listen, until they end."""
  seen = {process.pid: set() for process in job}
  end = time.monotonic() + seconds
  while any(p.poll() is None for p in job) and time.monotonic() < end:
    for pid in seen:
      try:
        seen[pid] |= listening(pid)
      except (FileNotFoundError, ProcessLookupError):
        continue
    time.sleep(0.02)
  return seen


@pytest.mark.parametrize('host', ['0.0.0.0', '127.0.0.1', '::1', '::'])
def test_who_listens_is_seen(host):
  family = socket.AF_INET6 if ':' in host else socket.AF_INET
  with socket.create_server((host, 0), family=family) as server:
    found = listening('self')
    port = server.getsockname()[1]
  (address,) = (address for address, other in found if other == port)
  assert str(address) == host
  assert is_loopback(address) == (host in ('127.0.0.1', '::1'))


def test_a_process_alone_listens_nowhere(tmp_path):
  """Nor does one that is told it is the only one."""
  place = [f'--coordinator=127.0.0.1:{free_port()}']
  place += ['--num_processes=1', '--process_id=0']
  words = [
    *_TRAIN,
    f'--workdir={tmp_path / "run"}',
    '--config.train.num_steps=4',
  ]
  job = [start_process([*words, *place])]
  seen = watch(job)
  ((status, said),) = ends(job)
  assert status == 0, said
  assert not any(seen.values()), seen


@pytest.mark.slow
@pytest.mark.parametrize('host', ['127.0.0.2', '[::1]'])
def test_a_job_on_loopback_listens_there_and_nowhere_else(
  tmp_path, monkeypatch, host
):
  """The collectives of CPUs included, whatever this machine is called."""
  monkeypatch.setattr('hosts.HOST', host)
  job = start_job(
    *_TRAIN,
    f'--workdir={tmp_path / "run"}',
    '--config.train.num_steps=4',
    processes=2,
  )
  seen = watch(job, seconds=300)
  said = ends(job)
  assert [status for status, _ in said] == [0, 0], said
  for found in seen.values():
    assert found, 'collectives listen'
    assert {str(address) for address, _ in found} <= {
      host.strip('[]'),
      f'::ffff:{host}',
    }, found
