"""Who waits for a process that has left learns it, however late it comes."""

import subprocess
import sys

import pytest
from hosts import ROOT, ends, free_port

_PROCESS = """
import sys, time
from perceiver_ar import distributed
from perceiver_ar.errors import HostsError, UserError
from perceiver_ar.places import Place
port, process, how = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
distributed.join(Place('flags', f'127.0.0.1:{port}', 3, process), 300.0)
distributed.barrier('one')
if process == 2:
  if how == 'on the way':  # announced, and never waits
    distributed._wait = lambda *args: distributed.leave(75)
    distributed.barrier('two')
  distributed.leave(2 if how == 'a mistake' else 75)
time.sleep((1 - process) * 3)
try:
  distributed.barrier('two')
except (HostsError, UserError) as error:
  print(type(error).__name__, error)
  distributed.leave(2 if isinstance(error, UserError) else 75)
"""


@pytest.mark.parametrize(
  ('how', 'status'), [('before', 75), ('on the way', 75), ('a mistake', 2)]
)
def test_who_left_is_named_to_all_that_come_later(how, status):
  port = str(free_port())
  job = [
    subprocess.Popen(
      [sys.executable, '-c', _PROCESS, port, str(process), how],
      stdout=subprocess.PIPE,
      stderr=subprocess.STDOUT,
      text=True,
      cwd=ROOT,
    )
    for process in range(3)
  ]
  ended = ends(job, 60)
  assert [code for code, _ in ended] == [status] * 3, ended
  kind = 'UserError' if status == 2 else 'HostsError'
  for _, said in ended[:2]:
    assert f'{kind} two: process 2 (' in said
    assert f'ended with status {status}' in said
