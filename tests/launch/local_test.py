"""launch/local.py: labels, the first failure, Ctrl-C, and a good end."""

import re
import signal
import subprocess
import sys

import pytest
from hosts import ROOT
from runs import TINY, wait_until

from perceiver_ar import checkpoint

# libtpu, where a test before has loaded it, ignores SIGHUP for all processes to
# come; so do nohup, and shells SIGINT in the background.
_HEEDING_SIGNALS = """
import os, signal, sys
for number in (signal.SIGHUP, signal.SIGINT):
  signal.signal(number, signal.SIG_DFL)
os.execv(sys.executable, [sys.executable, *sys.argv[1:]])
"""


def local(*words, cwd=ROOT):
  start = [sys.executable, '-c', _HEEDING_SIGNALS, f'{ROOT}/launch/local.py']
  return subprocess.Popen(
    [*start, *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=cwd,
  )


@pytest.mark.slow
def test_two_local_processes_with_four_devices_each_end_well(tmp_path):
  job = local(
    '--processes=2',
    '--devices_per_process=4',
    '--',
    'train',
    TINY,
    f'--workdir={tmp_path}',
  )
  said, _ = job.communicate(timeout=200)
  assert job.returncode == 0, said
  assert '[0] 8 x cpu (data 8); ' in said
  assert '[0] trained to step 12; ' in said
  assert 'first to fail' not in said
  assert checkpoint.saved_steps(tmp_path)[-1] == 12


# As `perceiver_ar.main`: the second process fails, the first will not end.
_DEAF = """
import signal, sys, time
if '--process_id=1' in sys.argv:
  print('words of its own')
  sys.exit(3)
signal.signal(signal.SIGTERM, signal.SIG_IGN)
time.sleep(600)
"""


@pytest.mark.slow
def test_the_first_local_failure_ends_those_that_do_not_heed_it(tmp_path):
  (tmp_path / 'perceiver_ar').mkdir()
  (tmp_path / 'perceiver_ar/__init__.py').touch()
  (tmp_path / 'perceiver_ar/main.py').write_text(_DEAF)
  job = local('--processes=2', '--', 'train', cwd=tmp_path)
  said, _ = job.communicate(timeout=100)
  assert job.returncode == 3, said
  *_, failed, last = said.splitlines()
  assert failed == 'process 1 was the first to fail, with status 3:'
  assert last == 'words of its own'


def test_local_processes_have_labels_and_the_first_failure_is_shown(tmp_path):
  job = local(
    '--processes=3',
    '--',
    'train',
    TINY,
    f'--workdir={tmp_path}',
    '--config.train.batch_size=8',
  )
  said, _ = job.communicate(timeout=200)
  assert job.returncode == 2, said
  lines = said.splitlines()
  assert any(line.startswith('[2] flags: process 2 of 3') for line in lines)
  at = next(i for i, x in enumerate(lines) if 'was the first to fail' in x)
  assert all(line[:3] in ('[0]', '[1]', '[2]') for line in lines[:at])
  assert 'with status 2' in lines[at]
  assert any('train.batch_size' in line for line in lines[at:])


@pytest.mark.slow
@pytest.mark.parametrize(
  ('number', 'status'), [(signal.SIGINT, 130), (signal.SIGHUP, 75)]
)
def test_what_stops_all_local_processes_has_them_save(tmp_path, number, status):
  """Ctrl-C, or a terminal that is closed."""
  job = local(
    '--processes=2',
    '--',
    'train',
    TINY,
    f'--workdir={tmp_path}',
    '--config.train.num_steps=5000',
    '--config.checkpoint.save_every=20',
  )
  path = tmp_path / 'metrics.jsonl'
  wait_until(lambda: path.exists() and path.stat().st_size, job)
  job.send_signal(number)
  said, _ = job.communicate(timeout=200)
  assert job.returncode == status, said
  assert re.search('(SIGINT|SIGTERM): step', said)
  assert 'first to fail' not in said
  assert checkpoint.saved_steps(tmp_path)


# As `perceiver_ar.main`: the second process fails to save.
_FAILS_TO_SAVE = """
import pathlib, signal, sys, time
second = '--process_id=1' in sys.argv
def end(number, frame):
  time.sleep(second)
  sys.exit(3 if second else 75)
signal.signal(signal.SIGTERM, end)
pathlib.Path(f'began_{second:d}').touch()
time.sleep(60)
"""


def test_a_local_failure_is_shown_where_another_has_ended_as_asked(tmp_path):
  (tmp_path / 'perceiver_ar').mkdir()
  (tmp_path / 'perceiver_ar/__init__.py').touch()
  (tmp_path / 'perceiver_ar/main.py').write_text(_FAILS_TO_SAVE)
  job = local('--processes=2', '--', 'train', cwd=tmp_path)
  wait_until(lambda: len([*tmp_path.glob('began_*')]) == 2, job)
  job.send_signal(signal.SIGTERM)
  said, _ = job.communicate(timeout=100)
  assert job.returncode == 3, said
  assert said == 'process 1 was the first to fail, with status 3:\n'
