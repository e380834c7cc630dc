"""A small run in a folder of its own, and the jobs that a drill makes of it."""

import dataclasses
import json
import os
import re
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from perceiver_ar import checkpoint, inspection, metrics, saved_step
from perceiver_ar.errors import RESTART, UserError

SAVE_EVERY = 4
NUM_STEPS = 16
HANG_SECONDS = 10.0
_PATIENCE = 240.0  # seconds for what takes some, and for others to end
_TIMES = ('seconds', 'data_wait')  # which no two runs share


class Failed(Exception):  # noqa: N818 (it is a verdict)
  """What a drill demands did not come about."""


@dataclasses.dataclass(frozen=True)
class Trace:
  """What a run amounts to.

  Attributes:
    rows: of metrics.jsonl, without times.
    arrays: of the last checkpoint, with their checksums.
    workdir: of the run.
  """

  rows: list[dict[str, Any]]
  arrays: dict[str, Any]
  workdir: Path


class Job:
  """The processes of one start of the run."""

  def __init__(
    self, processes: list[subprocess.Popen[bytes]], logs: list[Path]
  ):
    self.processes = processes
    self._logs = logs

  def wait_for(self, is_true: Callable[[], bool], what: str) -> None:
    end = time.monotonic() + _PATIENCE
    while not is_true():
      if any(process.poll() is not None for process in self.processes):
        self.end()
        raise Failed(f'the job ended before {what}: {self.last_words()}')
      if time.monotonic() > end:
        self.kill()
        raise Failed(f'{what} did not come within {_PATIENCE:.0f} s')
      time.sleep(0.005)

  def end(self) -> list[int]:
    """The status of every process; minus the signal that killed one."""
    end = time.monotonic() + _PATIENCE
    while left := [i for i, p in enumerate(self.processes) if p.poll() is None]:
      if time.monotonic() > end:
        self.kill()
        raise Failed(f'processes {left} did not end within {_PATIENCE:.0f} s')
      time.sleep(0.01)
    return [process.wait() for process in self.processes]

  def kill(self) -> None:
    for process in self.processes:
      process.kill()
      process.wait()

  def said(self) -> str:
    return '\n'.join(log.read_text(errors='replace') for log in self._logs)

  def last_words(self) -> str:
    """Of all that they said, the last sentence that is the trainer's own."""
    lines = [x for x in self.said().splitlines() if x.strip()]
    own = [x for x in lines if x.startswith('perceiver-ar: ')]
    return (own or lines or ['nothing'])[-1]


class Scene:
  """A run that faults are put into, start after start.

  Attributes:
    workdir: as its processes see it.
    num_processes: of a start, unless it says otherwise.
    lost: the most steps that a start had to do again.
    said: what the trainer said of the fault.
    final: what the run came to; None until it is finished.
    inside: words that put a command where `workdir` is.
  """

  def __init__(
    self,
    folder: Path,
    num_processes: int,
    program: Sequence[str],
    words: Sequence[str],
  ):
    """`program` takes faults as JSON, and then a command with `words`."""
    self.folder = folder
    self.workdir = folder / 'run'
    self.num_processes = num_processes
    self.lost = 0
    self.said = ''
    self.final: Trace | None = None
    self.inside: list[str] = []
    self._root = Path('/')
    self._program = program
    self._words = words
    self._starts = 0
    folder.mkdir(parents=True)

  def enter(self, process: int) -> None:
    """From now on everything is as this process sees it."""
    target = f'--target={process}'
    self.inside = ['nsenter', target, '--user', '--mount']
    self.inside.append('--preserve-credentials')
    self._root = Path(f'/proc/{process}/root')

  @property
  def seen(self) -> Path:
    """`workdir` as the drill itself sees it."""
    return self._root / self.workdir.relative_to('/')

  def start(
    self,
    *words: str,
    faults: Mapping[str, Any] | None = None,
    on: int | None = -1,
    num_processes: int = 0,
  ) -> Job:
    """Starts the run, or goes on with it.

    Args:
      words: further flags.
      faults: of `victim`, by name.
      on: the process that gets them; all do if it is None.
      num_processes: of the job.
    """
    num = num_processes or self.num_processes
    place = [
      f'--coordinator=127.0.0.1:{_free_port()}',
      f'--num_processes={num}',
    ]
    processes, logs = [], []
    for process in range(num):
      own = faults if on is None or process == on % num else {}
      log = self.folder / f'start-{self._starts}-{process}.log'
      processes.append(
        self._start_process(
          [*words, *(place if num > 1 else [])]
          + ([f'--process_id={process}'] if num > 1 else []),
          own or {},
          log,
        )
      )
      logs.append(log)
    self._starts += 1
    return Job(processes, logs)

  def _start_process(
    self, words: Sequence[str], faults: Mapping[str, Any], log: Path
  ) -> 'subprocess.Popen[bytes]':
    with log.open('wb') as output:
      return subprocess.Popen(
        [
          *(*self.inside, *self._program),
          *(json.dumps(faults), 'train', f'--workdir={self.workdir}'),
          *self._words,
          *words,
        ],
        stdout=output,
        stderr=subprocess.STDOUT,
        env={'JAX_COMPILATION_CACHE_DIR': str(self.folder.parent / 'compiled')}
        | os.environ
        | {
          'JAX_PLATFORMS': 'cpu',
          'JAX_NUM_CPU_DEVICES': '1',
          'JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS': '0',
          # Nothing here is worth optimising, at every start again; nor does
          # anybody read from which lines it was made.
          'XLA_FLAGS': '--xla_backend_optimization_level=0 '
          '--xla_llvm_disable_expensive_passes=true '
          '--xla_cpu_use_fusion_emitters=false '
          '--xla_cpu_parallel_codegen_split_count=1',
          'JAX_TRACEBACK_IN_LOCATIONS_LIMIT': '0',
        },
      )

  def rows(self) -> list[dict[str, Any]]:
    """Of training steps, so far."""
    try:
      return metrics.read(self.seen)[0]
    except UserError:  # none yet, or a line is being written
      return []

  def until(self, job: Job, step: int) -> None:
    job.wait_for(lambda: len(self.rows()) >= step, f'step {step}')

  def until_saved(self, job: Job, step: int) -> None:
    job.wait_for(
      lambda: step in checkpoint.saved_steps(self.seen), f'checkpoint {step}'
    )

  def demand(self, job: Job, pattern: str) -> None:
    """Some process said this; it goes into the table."""
    found = re.search(pattern, job.said())
    if not found:
      raise Failed(f'no process said {pattern!r}, but: {job.last_words()}')
    self.said = self.said or found[0]

  def demand_status(self, job: Job, *allowed: int) -> None:
    for process, status in enumerate(job.end()):
      if status not in allowed:
        raise Failed(
          f'process {process} ended with status {status}, not one of '
          f'{allowed}: {job.last_words()}'
        )

  def demand_restart(self, job: Job, some: int) -> None:
    """All have ended, one of them so, and the others to be started again."""
    # With process 0 goes the service of JAX, which ends whoever is in a step.
    self.demand_status(job, some, RESTART, -signal.SIGABRT)
    if some not in job.end():
      raise Failed(f'no process ended with status {some}: {job.last_words()}')

  def resume(self, *words: str, **how: Any) -> Job:
    """A start, and what had to be done again because of it."""
    reached = len(self.rows())
    job = self.start(*words, **how)
    job.end()
    self._count_lost(reached, job)
    return job

  def _count_lost(self, reached: int, job: Job) -> None:
    if 'train data: ' in job.said():  # else it has not begun
      found = re.search(r'goes on from step (\d+)', job.said())
      self.lost = max(self.lost, reached - (int(found[1]) if found else 0))

  def finish(self, **how: Any) -> Job:
    job = self.resume(**how)
    self.demand_status(job, 0)
    self.final = self._trace()
    return job

  def stop_at(self, step: int) -> Job:
    """Trains to about this step, asks one to end, and all have saved."""
    reached = len(self.rows())
    job = self.start(faults={'pace': 0.1})
    # One that is asked before it has met the others leaves them waiting.
    job.wait_for(lambda: 'train data: ' in job.said(), 'its first step')
    self.until(job, step)
    job.processes[-1].send_signal(signal.SIGTERM)
    self.demand_status(job, RESTART)
    self._count_lost(reached, job)
    return job

  def _trace(self) -> Trace:
    train, evaluations = metrics.read(self.seen)
    rows = [
      {key: value for key, value in row.items() if key not in _TIMES}
      for row in train + evaluations
    ]
    step = checkpoint.saved_steps(self.seen)[-1]
    folder = checkpoint.step_folder(self.seen, step)
    arrays = saved_step.read_manifest(folder)['arrays']
    inspection.read_arrays(folder, [*arrays])  # they are what it says
    return Trace(rows, arrays, self.seen)


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]
