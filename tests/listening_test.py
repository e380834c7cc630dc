"""Jobs of one machine are heard on that machine alone."""

import ipaddress
import os
import pathlib
import socket
import subprocess
import sys
import time

import pytest
from hosts import ROOT, ends, free_port, start_job

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
  address = ipaddress.ip_address(b''.join(words))
  # Of IPv4, at a socket of IPv6.
  return getattr(address, 'ipv4_mapped', None) or address


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
  assert address.is_loopback == (host in ('127.0.0.1', '::1'))


# Joins, makes its devices, and waits to be ended.
_JOINED = """
import sys
from perceiver_ar import distributed, places
address, number, process = sys.argv[1:]
place = places.find_place(address, int(number), int(process), seconds=60)
distributed.join(place, 60)
import jax
print(len(jax.devices()), flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize(
  ('host', 'processes'), [('127.0.0.1', 1), ('127.0.0.2', 2), ('[::1]', 2)]
)
def test_what_joins_on_loopback_listens_there_and_nowhere_else(host, processes):
  """The collectives of CPUs included, whatever this machine is called."""
  place = f'{host}:{free_port()}', str(processes)
  job = [
    subprocess.Popen(
      [sys.executable, '-c', _JOINED, *place, str(process)],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      text=True,
      cwd=ROOT,
      env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
    )
    for process in range(processes)
  ]
  try:
    said = [child.stdout.readline().strip() for child in job if child.stdout]
    assert said == [str(processes)] * processes
    seen = [listening(child.pid) for child in job]
  finally:
    for child in job:
      child.kill()
      child.communicate()
  for found in seen:
    # Collectives listen in every process of several, and none in one alone.
    assert bool(found) == (processes > 1)
    assert {str(address) for address, _ in found} <= {host.strip('[]')}


@pytest.mark.slow
def test_a_run_listens_nowhere_else_from_its_start_to_its_end(tmp_path):
  job = start_job(
    *_TRAIN,
    f'--workdir={tmp_path / "run"}',
    '--config.train.num_steps=4',
    processes=2,
  )
  seen = watch(job, seconds=300)
  said = ends(job)
  assert [status for status, _ in said] == [0, 0], said
  found = set().union(*seen.values())
  assert found and all(address.is_loopback for address, _ in found), found
