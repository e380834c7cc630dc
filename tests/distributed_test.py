"""Finding one's place, the roll call, and who differs."""

import concurrent.futures
import contextlib
import socket
import threading
import time

import pytest
from hosts import free_port
from jax._src import hardware_utils
from jax._src.clusters import cloud_tpu_cluster

from perceiver_ar import distributed, places, roll_call
from perceiver_ar.errors import HostsError, UserError
from perceiver_ar.places import Place


def find(address=None, num_processes=None, process_id=None):
  return places.find_place(address, num_processes, process_id, seconds=1)


def clear(monkeypatch, **environ):
  for name in (
    'SLURM_STEP_NODELIST',
    'SLURM_PROCID',
    'TPU_WORKER_HOSTNAMES',
    'TPU_PROCESS_ADDRESSES',
    'TPU_SKIP_MDS_QUERY',
    'MEGASCALE_NUM_SLICES',
  ):
    monkeypatch.delenv(name, raising=False)
  for name, value in environ.items():
    monkeypatch.setenv(name, value)


def test_a_process_is_alone_where_nothing_says_otherwise(monkeypatch):
  clear(monkeypatch)
  assert find() == Place()


def test_flags_say_where_a_process_is():
  place = find('10.0.0.1:8476', 4, 3)
  assert place == Place('flags', '10.0.0.1:8476', 4, 3)


_TASK = {
  'SLURM_JOB_ID': '4096',
  'SLURM_STEP_NODELIST': 'node[007-009],other',
  'SLURM_NTASKS': '4',
  'SLURM_PROCID': '2',
  'SLURM_LOCALID': '0',
}


def test_slurm_says_where_a_process_is(monkeypatch):
  clear(monkeypatch, SLURM_STEP_NUM_NODES='4', **_TASK)
  place = find()
  assert (place.kind, place.num_processes, place.process_id) == ('SLURM', 4, 2)
  assert place.address == 'node007:61440'
  assert place.local_device_ids is None  # all of the node's
  clear(monkeypatch, SLURM_STEP_NUM_NODES='2', **_TASK)
  assert find().local_device_ids == [0]


@pytest.mark.parametrize(
  ('environ', 'num_chips', 'kind'),
  [
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 4, ('GKE', 'gketpu')),
    (
      {'TPU_WORKER_HOSTNAMES': 'a,b', 'MEGASCALE_NUM_SLICES': '2'},
      4,
      ('GKE, 2 slices', 'gketpu'),
    ),
    ({}, 4, ('TPU VM', 'gcetpu')),
    ({'TPU_WORKER_HOSTNAMES': 'a,b'}, 0, None),
    ({'JAX_PLATFORMS': 'cpu'}, 4, None),
    ({'TPU_SKIP_MDS_QUERY': '1'}, 4, None),
  ],
)
def test_chips_and_variables_tell_tpu_hosts_apart(environ, num_chips, kind):
  assert places._surroundings(environ, num_chips) == kind


@pytest.fixture
def tpu_vm(monkeypatch):
  """What its metadata server knows."""
  known = {}
  clear(monkeypatch)
  monkeypatch.delenv('JAX_PLATFORMS')
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  monkeypatch.setattr(
    cloud_tpu_cluster,
    'get_metadata',
    lambda key: (known.get(key, ''), 200 if key in known else 404),
  )
  chips = 'num_available_tpu_chips_and_device_id'
  monkeypatch.setattr(hardware_utils, chips, lambda: (4, None))
  return known


def test_a_tpu_vm_asks_its_metadata_server(tpu_vm):
  tpu_vm['worker-network-endpoints'] = 'localhost,other'
  tpu_vm['agent-worker-number'] = '1'
  assert find() == Place('TPU VM', 'localhost:8482', 2, 1)


def test_a_tpu_vm_of_which_nothing_is_known_is_not_taken_to_be_alone(tpu_vm):
  with pytest.raises(HostsError, match=r'TPU VM, .* cannot be told'):
    find()


@pytest.mark.parametrize(
  ('flags', 'named'),
  [
    (('10.0.0.1:1', 2, None), 'all of --coordinator'),
    (('10.0.0.1', 2, 0), '--coordinator=10.0.0.1 must be HOST:PORT'),
    (('a:1', 2, 2), '--process_id=2 must be from 0 to 1'),
    (('a:70000', 2, 0), '--coordinator=a:70000 must be HOST:PORT'),
    (('a:٣', 2, 0), 'must be HOST:PORT'),
  ],
)
def test_half_a_place_is_refused(flags, named):
  with pytest.raises(UserError, match=named):
    find(*flags)


def roll(present, num_processes, seconds):
  """What each of the present processes gets from the roll call."""
  address = f'127.0.0.1:{free_port()}'

  def one(process):
    try:
      return roll_call.call(address, process, num_processes, seconds)
    except HostsError as error:
      return str(error)

  with concurrent.futures.ThreadPoolExecutor() as pool:
    return list(pool.map(one, present))


def test_all_processes_learn_the_names_of_all():
  names = [socket.gethostname()] * 4
  assert roll([2, 0, 3, 1], 4, seconds=30) == [names] * 4


@pytest.mark.skipif(not socket.has_dualstack_ipv6(), reason='needs IPv6')
def test_hosts_may_call_over_either_kind_of_address():
  port, end = free_port(), time.monotonic() + 30
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(roll_call._gather, '', port, 3, end)
    others = [
      pool.submit(roll_call._answer, host, port, process, 3, end)
      for process, host in ((1, '127.0.0.1'), (2, '::1'))
    ]
    assert set(first.result()) == {'0', '1', '2'}
    assert all(set(x.result() or ()) == {'0', '1', '2'} for x in others)


def test_who_does_not_come_is_named_to_all():
  for said in roll([0, 1, 3], 5, seconds=1):
    assert 'start: processes 2, 4 did not come within 1 s' in said


def test_a_first_process_that_does_not_come_is_named():
  (said,) = roll([1], 2, seconds=0.5)
  assert 'process 0 at 127.0.0.1:' in said
  assert 'did not answer process 1 within 0.5 s' in said


def test_the_roll_call_hears_no_strangers():
  """Nor waits for one who does not speak."""
  port = free_port()
  address = f'127.0.0.1:{port}'
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(roll_call.call, address, 0, 2, 30)
    for word in (
      *(b'', b'[]\n', b'[' * 5000 + b'\n', b'x' * 100_000),
      b'{"process": 7, "of": 2, "host": "x"}\n',
      b'{"process": 0.5, "of": 2, "host": "x"}\n',
      b'{"process": true, "of": 2, "host": "x"}\n',
    ):
      hang_up_after(port, word)
    second = pool.submit(roll_call.call, address, 1, 2, 30)
    assert first.result() == second.result() == [socket.gethostname()] * 2


def test_a_stranger_who_never_ends_is_not_waited_for(monkeypatch):
  monkeypatch.setattr(roll_call, '_WORD_SECONDS', 0.5)
  port = free_port()
  with concurrent.futures.ThreadPoolExecutor() as pool:
    first = pool.submit(roll_call.call, f'127.0.0.1:{port}', 0, 2, 30)
    heard = threading.Event()
    stranger = pool.submit(drip, port, heard)
    assert heard.wait(20)  # else all could be there before it comes
    second = pool.submit(roll_call.call, f'127.0.0.1:{port}', 1, 2, 30)
    assert len(first.result()) == len(second.result()) == 2
    assert stranger.result() < 5


def drip(port, heard):
  """Says a little, time and again; for how long somebody listens."""
  begin = time.monotonic()
  with contextlib.suppress(OSError):
    hang_up_after(port, b'x', seconds=8, heard=heard)
  return time.monotonic() - begin


@pytest.mark.parametrize(
  ('address', 'expected', 'is_local'),
  [
    ('127.0.0.1:80', ('127.0.0.1', 80), True),
    ('127.8.0.2:80', ('127.8.0.2', 80), True),
    ('[::1]:80', ('::1', 80), True),
    ('localhost:1', ('localhost', 1), True),
    ('127.evil.example:80', ('127.evil.example', 80), False),
    ('0.0.0.0:80', ('0.0.0.0', 80), False),
    ('[fe80::1]:80', ('fe80::1', 80), False),
  ],
)
def test_what_is_loopback_is_told_by_the_address(address, expected, is_local):
  assert roll_call.parts(address) == expected
  assert roll_call.is_loopback(expected[0]) == is_local


def hang_up_after(port, word, seconds=0.0, heard=None):
  give_up = time.monotonic() + 20
  while time.monotonic() < give_up:
    with (
      contextlib.suppress(ConnectionRefusedError),
      socket.create_connection(('127.0.0.1', port)) as stranger,
    ):
      stranger.sendall(word)
      if heard:
        heard.set()
      end = time.monotonic() + seconds
      while time.monotonic() < end:
        time.sleep(0.1)
        stranger.sendall(word)
      return
    time.sleep(0.05)
  raise TimeoutError(f'nobody listens on port {port}')


def test_a_port_in_use_is_named():
  with socket.create_server(('127.0.0.1', 0)) as taken:
    port = taken.getsockname()[1]
    with pytest.raises(HostsError, match=f'cannot listen on port {port}'):
      roll_call.call(f'127.0.0.1:{port}', 0, 2, 1)


def test_the_odd_process_is_named_with_what_differs(monkeypatch):
  monkeypatch.setattr(distributed._job, 'names', ['a', 'b', 'c'])
  usual = {'jax': '0.10.2', 'train.seed': '1'}
  odd = {'jax': '0.10.1', 'train.seed': '1', 'extra': 'x'}
  assert distributed._odd_one([usual, usual, usual]) == ''
  said = distributed._odd_one([odd, usual, usual])
  assert 'process 0 (a) is not like the others' in said
  assert 'jax is 0.10.1 there and 0.10.2 elsewhere' in said
  assert 'extra is x there and absent elsewhere' in said
  assert 'process 1 (b)' in distributed._odd_one([usual, odd])


def test_alone_nothing_is_waited_for():
  distributed.barrier('anything')
  distributed.agree({'a': 'b'})
  with distributed.first_process_first() as is_first:
    assert is_first
  distributed.leave(2)
