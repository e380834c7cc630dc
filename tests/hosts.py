"""Jobs of several real processes on loopback."""

import json
import os
import pathlib
import socket
import subprocess
import sys
from collections.abc import Mapping, Sequence
from typing import Any

ROOT = pathlib.Path(__file__).parents[1]

# A process that never reaches the barrier of that name.
_LATE = """
import sys, time
from perceiver_ar import distributed
from perceiver_ar.drill import victim
on_time = distributed.barrier
def late(name):
  if name == sys.argv[1]:
    print('late', flush=True)
    time.sleep(600)
  on_time(name)
distributed.barrier = late
victim.run({}, sys.argv[2:])
"""


def start_process(
  words: Sequence[str],
  *,
  devices: int = 1,
  late_at: str = '',
  faults: Mapping[str, Any] | None = None,
  code: pathlib.Path = ROOT,
) -> 'subprocess.Popen[str]':
  """`perceiver-ar WORDS`, or one that hangs before a barrier, or worse."""
  start = ['-m', 'perceiver_ar.drill.victim', json.dumps(faults or {})]
  if late_at:
    start = ['-c', _LATE, late_at]
  return subprocess.Popen(
    [sys.executable, *start, *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=code,
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(devices),
    },
  )


def start_job(
  *words: str,
  processes: int,
  devices: int = 1,
  late: tuple[int, str] = (-1, ''),
  faults: Mapping[int, Mapping[str, Any]] | None = None,
  extra: Sequence[Sequence[str]] = (),
  code: Sequence[pathlib.Path] = (),
) -> 'list[subprocess.Popen[str]]':
  """`perceiver-ar WORDS` as so many processes.

  Args:
    words: of the command.
    processes: of the job.
    devices: of each.
    late: a process and the barrier that it never reaches.
    faults: of `perceiver_ar.drill.victim`, by process.
    extra: words for each process alone.
    code: the folder that each has its packages from, before all others.
  """
  place = [f'--coordinator=127.0.0.1:{free_port()}']
  place.append(f'--num_processes={processes}')
  return [
    start_process(
      [*words, *place, f'--process_id={p}', *(extra[p] if extra else ())],
      devices=devices,
      late_at=late[1] if p == late[0] else '',
      faults=(faults or {}).get(p),
      code=code[p] if code else ROOT,
    )
    for p in range(processes)
  ]


def ends(
  job: 'Sequence[subprocess.Popen[str]]', seconds: float = 300
) -> list[tuple[int, str]]:
  """How every process ended, and what it said."""
  try:
    said = [process.communicate(timeout=seconds)[0] for process in job]
    return [(p.returncode, out) for p, out in zip(job, said, strict=True)]
  finally:
    for process in job:
      process.kill()


def free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]
