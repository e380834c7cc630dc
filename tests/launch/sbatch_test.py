"""What slurm.sbatch makes of a run's end, against commands that record."""

import os
import pathlib
import subprocess
import time
from collections.abc import Sequence

import pytest

_SCRIPT = pathlib.Path(__file__).parents[2] / 'launch' / 'slurm.sbatch'

_SRUN = """#!/bin/sh
echo "cpus: ${SRUN_CPUS_PER_TASK-unset}"
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
  for name, content in (('srun', _SRUN), ('scontrol', _SCONTROL)):
    (commands / name).write_text(content)
    (commands / name).chmod(0o755)
  monkeypatch.setenv('PATH', f'{commands}:{os.environ["PATH"]}')
  monkeypatch.chdir(tmp_path)
  return tmp_path


def _start(
  status: int, restart: int, job: int, **env: str
) -> 'subprocess.Popen[str]':
  return subprocess.Popen(
    ['bash', str(_SCRIPT), 'train'],
    env=os.environ
    | {'SLURM_JOB_ID': str(job), 'STATUS': str(status), 'STATE': 'RUNNING'}
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


def _restarts(statuses: Sequence[int]) -> int:
  """How often a job is queued again, whose runs end with these."""
  for restart, status in enumerate(statuses):
    if 'requeued 7' not in _run(status, restart):
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
  while not (folder / 'begun').exists():
    time.sleep(0.05)
  for _ in range(2):
    process.terminate()
    time.sleep(0.2)
    assert process.poll() is None
  (folder / 'saved').touch()
  assert 'status 75; queued again' in process.communicate(timeout=60)[0]
  assert process.returncode == 75


def test_processes_have_the_cpus_that_sbatch_was_asked_for(folder):
  assert 'cpus: 6' in _run(0, SLURM_CPUS_PER_TASK='6')
  assert 'cpus: unset' in _run(0)
