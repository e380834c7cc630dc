"""launch/slurm.sbatch under a SLURM of this machine."""

import os
import pathlib
import shutil
import subprocess
import sys
import time

import pytest
from hosts import ROOT, free_port
from runs import TINY, rows, wait_until

from perceiver_ar import checkpoint

_DAEMONS = ('munged', 'slurmctld', 'slurmd', 'sbatch', 'scontrol')
_PATIENCE = 300  # seconds: two starts, and a requeued job's wait
_WORDS = (
  'train',
  TINY,
  '--config.train.num_steps=60',
  '--config.evaluate.every=60',
  '--config.checkpoint.save_every=20',
)


def _configure(folder: pathlib.Path) -> None:
  """One node, which is this machine, with nothing that needs cgroups."""
  (folder / 'slurm.conf').write_text(f"""
ClusterName=test
SlurmctldHost=localhost(127.0.0.1)
SlurmctldPort={free_port()}
SlurmdPort={free_port()}
SlurmUser=root
AuthType=auth/munge
# Requeued jobs wait until the credentials of their last run are void.
AuthInfo=socket={folder}/munge.socket,cred_expire=5
StateSaveLocation={folder}/state
SlurmdSpoolDir={folder}/spool
SlurmctldPidFile={folder}/slurmctld.pid
SlurmdPidFile={folder}/slurmd.pid
SlurmctldLogFile={folder}/slurmctld.log
SlurmdLogFile={folder}/slurmd.log
ProctrackType=proctrack/linuxproc
TaskPlugin=task/none
SelectType=select/linear
ReturnToService=2
KillWait=10
MpiDefault=none
NodeName=localhost NodeAddr=127.0.0.1 CPUs={os.cpu_count()} State=UNKNOWN
PartitionName=all Nodes=localhost Default=YES MaxTime=INFINITE State=UP
""")
  for name in ('state', 'spool'):
    (folder / name).mkdir()


@pytest.fixture
def slurm(tmp_path):
  """SLURM's commands, for a cluster of one node."""
  missing = [name for name in _DAEMONS if not shutil.which(name)]
  if missing or os.geteuid():
    pytest.skip(
      'needs root and munge, slurmctld, slurmd, slurm-client of Debian '
      f'(not here: {", ".join(missing) or "root"})'
    )
  folder = tmp_path / 'slurm'
  folder.mkdir(mode=0o755)
  _configure(folder)
  (folder / 'munge.key').write_bytes(os.urandom(128))
  (folder / 'munge.key').chmod(0o600)
  environ = os.environ | {
    'SLURM_CONF': str(folder / 'slurm.conf'),
    'PERCEIVER_AR_BIN': str(pathlib.Path(sys.executable).parent),
    'JAX_PLATFORMS': 'cpu',
  }
  files = {
    'socket': 'socket',
    'key-file': 'key',
    'pid-file': 'pid',
    'log-file': 'log',
    'seed-file': 'seed',
  }
  flags = [f'--{flag}={folder}/munge.{end}' for flag, end in files.items()]
  daemons = [
    ['munged', '--foreground', '--force', *flags],
    ['slurmctld', '-D', '-c'],
    ['slurmd', '-D', '-N', 'localhost'],
  ]
  running = []

  def command(*words: str) -> str:
    done = subprocess.run(
      words, env=environ, cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout

  try:
    for words in daemons:
      with (folder / f'{words[0]}.out').open('wb') as out:
        running.append(
          subprocess.Popen(words, env=environ, stdout=out, stderr=out)
        )
      time.sleep(1)
    yield command
  finally:
    for daemon in reversed(running):
      daemon.terminate()
      daemon.wait(30)


@pytest.mark.slow
@pytest.mark.parametrize('trap', ['', "trap 'exit 75' TERM\n"])
def test_a_cancelled_job_is_not_queued_again(slurm, tmp_path, trap):
  program, log = tmp_path / 'bin' / 'perceiver-ar', tmp_path / 'job.log'
  program.parent.mkdir()
  program.write_text(f'#!/bin/sh\n{trap}echo trains\nsleep 600\n')
  program.chmod(0o755)
  job = slurm(
    'sbatch',
    '--parsable',
    f'--output={log}',
    f'--export=ALL,PERCEIVER_AR_BIN={program.parent}',
    'launch/slurm.sbatch',
    'train',
  ).strip()
  wait_for(lambda: log.exists() and 'trains' in log.read_text())
  slurm('scancel', job)
  wait_for(lambda: not slurm('squeue', '--noheader', '--job', job))
  state = slurm('scontrol', 'show', 'job', job)
  assert 'JobState=CANCELLED' in state and 'Restarts=0' in state
  assert 'queued again' not in log.read_text()


@pytest.mark.slow
@pytest.mark.parametrize(
  ('statuses', 'says'), [('1 75', 'status 1; queued again'), ('2 75', None)]
)
def test_what_one_task_ends_with_is_not_hidden_by_the_others(
  slurm, tmp_path, statuses, says
):
  program, log = tmp_path / 'bin' / 'perceiver-ar', tmp_path / 'job.log'
  program.parent.mkdir()
  program.write_text(
    f'#!/bin/sh\nset -- {statuses}\nshift "$SLURM_PROCID"\nexit "$1"\n'
  )
  program.chmod(0o755)
  job = slurm(
    'sbatch',
    '--parsable',
    '--ntasks-per-node=2',
    f'--chdir={tmp_path}',
    f'--output={log}',
    f'--export=ALL,PERCEIVER_AR_BIN={program.parent}',
    f'{ROOT}/launch/slurm.sbatch',
    'train',
  ).strip()
  if says is None:
    wait_for(lambda: 'FAILED' in slurm('scontrol', 'show', 'job', job))
    state = slurm('scontrol', 'show', 'job', job)
    assert 'Restarts=0' in state and 'ExitCode=2:0' in state
  else:
    wait_for(lambda: log.exists() and says in log.read_text())
    [crashes] = tmp_path.glob('*.crashes')
    assert crashes.read_text() == '1\n'
    slurm('scancel', job)


def wait_for(is_true):
  end = time.monotonic() + _PATIENCE
  while not is_true():
    assert time.monotonic() < end
    time.sleep(0.2)


@pytest.mark.slow
def test_a_preempted_job_is_requeued_and_ends_with_the_same_digests(
  slurm, tmp_path
):
  folder, log = tmp_path / 'run', tmp_path / 'job.log'
  job = slurm(
    'sbatch',
    '--parsable',
    '--ntasks-per-node=2',
    f'--output={log}',
    'launch/slurm.sbatch',
    *_WORDS,
    f'--workdir={folder}',
  ).strip()

  def said(line: str, times: int = 1) -> bool:
    return log.exists() and log.read_text().count(line) >= times

  class Alive:
    """For `wait_until`: the job has not ended."""

    def poll(self) -> int | None:
      state = slurm('scontrol', 'show', 'job', job)
      return 1 if 'FAILED' in state or 'COMPLETED' in state else None

    def communicate(self) -> str:
      return log.read_text() if log.exists() else 'no output'

  metrics = folder / 'metrics.jsonl'
  wait_until(
    lambda: metrics.exists() and metrics.read_bytes().count(b'\n') >= 3,
    Alive(),
    _PATIENCE,
  )
  slurm('scancel', '--signal=TERM', job)
  wait_until(
    lambda: said('status 75; queued again (restart 1)'), Alive(), _PATIENCE
  )
  step = checkpoint.saved_steps(folder)[-1]
  assert 3 <= step < 60
  wait_until(lambda: said('trained to step 60'), Alive(), _PATIENCE)
  text = log.read_text()
  assert f'SIGTERM: step {step} is saved' in text
  assert text.count('SLURM: process 0 of 2') == 2
  assert f'goes on from step {step} of 60' in text

  whole = tmp_path / 'whole'
  subprocess.run(
    [sys.executable, '-m', 'perceiver_ar.main', *_WORDS, f'--workdir={whole}'],
    check=True,
    cwd=ROOT,
    stdout=subprocess.DEVNULL,
    stderr=subprocess.DEVNULL,
  )
  digests = [
    [row.get('data_digest') for row in rows(run)] for run in (folder, whole)
  ]
  assert digests[0] == digests[1]
