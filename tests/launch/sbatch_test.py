"""What slurm.sbatch makes of a run's end, against commands that record."""

import os
import pathlib
import signal
import subprocess
import time
from collections.abc import Sequence

import pytest

_SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'slurm.sbatch'

# Runs its tasks, with no signal ignored, and has the highest status.
_SRUN = """#!/bin/bash
echo "cpus: ${SRUN_CPUS_PER_TASK-unset}"
while [[ $1 == --* ]]; do shift; done
highest=0
for status in $STATUSES; do
  STATUS=$status env --default-signal=INT "$@"
  ended=$?
  (( ended <= highest )) || highest=$ended
done
exit "$highest"
"""

_TRAINER = """#!/bin/bash
echo "$@" >> trained
(( STATUS <= 128 )) || kill -$(( STATUS - 128 )) $$
exit "$STATUS"
"""

_SCONTROL = """#!/bin/sh
case $1 in
  show) echo "   JobState=$STATE Reason=${REASON-None}" ;;
  requeue) echo "requeued $2" ;;
esac
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
  """Where jobs are submitted, with SLURM's commands on the PATH."""
  commands = tmp_path / 'bin'
  commands.mkdir()
  for name, content in (
    ('srun', _SRUN),
    ('scontrol', _SCONTROL),
    ('perceiver-ar', _TRAINER),
  ):
    (commands / name).write_text(content)
    (commands / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{commands}:{os.environ["PATH"]}')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _start(
  status: int, restart: int, job: int, **env: str
) -> 'subprocess.Popen[str]':
  return subprocess.Popen(
    ['bash', str(_SCRIPT), 'train', '--config=c.py:a b'],
    env=os.environ
    | {'SLURM_JOB_ID': str(job), 'STATUSES': str(status), 'STATE': 'RUNNING'}
    | ({'SLURM_RESTART_COUNT': str(restart)} if restart else {})
    | env,
    stdout=subprocess.PIPE,
    text=True,
  )


def _run(status: int, restart: int = 0, job: int = 7, **env: str) -> str:
  """One start of a job, whose run ends with `status`."""
  process = _start(status, restart, job, **env)
  try:
    said = process.communicate(timeout=60)[0]
  finally:
    process.kill()
  assert process.returncode == status
  return said


def _restarts(statuses: Sequence[int], hosts: str = '') -> int:
  """How often a job is queued again, whose runs end with these."""
  for restart, status in enumerate(statuses):
    if 'requeued 7' not in _run(status, restart, STATUSES=hosts or str(status)):
      return restart
  return len(statuses)


@pytest.mark.parametrize(
  ('statuses', 'restarts'),
  [
    ([75] * 15, 15),
    ([1] * 15, 10),
    ([75] * 12 + [1, 75] * 10 + [137], 32),
    ([75, 0], 1),
    ([1, 2], 1),
    ([130], 0),
  ],
)
def test_crashes_alone_are_limited(folder, statuses, restarts):
  assert _restarts(statuses) == restarts
  ended = restarts < len(statuses)
  assert bool(list(folder.glob('*.crashes'))) == (1 in statuses and not ended)


@pytest.mark.parametrize(
  ('hosts', 'status', 'restarts'),
  [
    ('0 0', 0, 0),
    ('75 75', 75, 15),
    ('75 0', 75, 15),
    ('1 75', 1, 10),
    ('75 3 0', 1, 10),
    ('137 75', 137, 10),
    ('75 1 134', 134, 10),
    ('2 75', 2, 0),
    ('75 2 1', 2, 0),
    ('134 2', 2, 0),
    ('75 130 75', 130, 0),
  ],
)
def test_a_mistake_or_a_crash_of_one_host_counts(
  folder, hosts, status, restarts
):
  """More than the 75 of those who miss it, and the mistake most."""
  assert _restarts([status] * 15, hosts) == restarts
  runs, tasks = min(restarts + 1, 15), len(hosts.split())
  words = (folder / 'trained').read_text().splitlines()
  assert words == ['train --config=c.py:a b'] * runs * tasks


@pytest.mark.parametrize('mode', [None, 0o644])
def test_no_such_command_is_a_mistake(folder, monkeypatch, mode):
  monkeypatch.setenv('PATH', f'{folder}/bin:/usr/bin:/bin')
  program = folder / 'bin' / 'perceiver-ar'
  if mode is None:
    program.unlink()
  else:
    program.chmod(mode)
  assert 'requeued' not in _run(2, STATUSES='75 75')


def test_crashes_are_those_of_one_job(folder):
  for restart in range(10):
    _run(1, restart)
  assert 'requeued 8' in _run(1, job=8)
  # Another of the same number, years later.
  assert 'requeued 7' in _run(1)
  assert (folder / 'perceiver-ar-7.crashes').read_text() == '1\n'


@pytest.mark.parametrize('status', [75, 143])
def test_what_slurm_ends_is_neither_queued_again_nor_a_crash(folder, status):
  _run(1)
  assert 'requeued' not in _run(status, 1, STATE='COMPLETING')
  assert (folder / 'perceiver-ar-7.crashes').read_text() == '1\n'


def test_a_run_that_saves_after_the_time_limit_goes_on(folder):
  assert 'requeued' in _run(75, STATE='COMPLETING', REASON='TimeLimit')


def test_crashes_that_cannot_be_counted_end_the_job(folder):
  (folder / 'perceiver-ar-7.crashes').mkdir()
  assert 'requeued' not in _run(1, 1)


def test_a_signal_does_not_hide_how_the_run_ends(folder):
  waits = 'touch begun; while [ ! -e saved ]; do sleep 0.05; done; exit 75'
  (folder / 'bin' / 'srun').write_text(f'#!/bin/sh\n{waits}\n')
  process = _start(75, 0, 7)
  _wait_for(folder / 'begun', process)
  for _ in range(2):
    process.terminate()
    time.sleep(0.2)
    assert process.poll() is None
  (folder / 'saved').touch()
  assert 'status 75; queued again' in process.communicate(timeout=60)[0]
  assert process.returncode == 75


# Says who runs it, and ends some time after a signal.
_SAVES = """#!/bin/bash
trap 'heard=75' TERM
trap 'heard=130' INT
echo "$PPID" > begins
mv begins begun
while [[ ! ${heard-} ]] && (( SECONDS < 20 )); do sleep 0.05; done
touch heard
while [[ ! -e saved ]] && (( SECONDS < 20 )); do sleep 0.05; done
exit "$heard"
"""


@pytest.mark.parametrize(
  ('number', 'status'), [(signal.SIGTERM, 75), (signal.SIGINT, 130)]
)
def test_what_signals_the_shell_of_a_host_has_the_trainer_save(
  folder, number, status
):
  """As SLURM does where cgroups track its processes."""
  (folder / 'bin' / 'perceiver-ar').write_text(_SAVES)
  process = _start(status, 0, 7)
  _wait_for(folder / 'begun', process)
  shell = int((folder / 'begun').read_text())
  os.kill(shell, number)
  _wait_for(folder / 'heard', process)
  os.kill(shell, number)
  time.sleep(0.2)
  assert process.poll() is None
  (folder / 'saved').touch()
  said = process.communicate(timeout=60)[0]
  assert process.returncode == status
  assert ('status 75; queued again' in said) == (status == 75)


def _wait_for(path: pathlib.Path, process: 'subprocess.Popen[str]') -> None:
  end = time.monotonic() + 10
  while not path.exists():
    assert process.poll() is None
    assert time.monotonic() < end
    time.sleep(0.05)


def test_processes_have_the_cpus_that_sbatch_was_asked_for(folder):
  assert 'cpus: 6' in _run(0, SLURM_CPUS_PER_TASK='6')
  assert 'cpus: unset' in _run(0)
