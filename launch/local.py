"""Runs a command as several processes of this machine, as on several hosts.

  python launch/local.py --processes=2 --devices_per_process=4 -- \\
      train --config=configs/copy_task.py:tiny --workdir=/tmp/two

The processes speak over loopback, and each has devices of its own, made of the
CPU. Their output comes with a label in front. Ctrl-C asks all of them to save
and end, and pressed again ends them at once. The first that fails ends all, and
its last lines are shown again. The exit status is its own, or 0.
"""

import argparse
import collections
import contextlib
import os
import queue
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Sequence
from typing import Any

_LAST_LINES = 20  # of the process that failed
_PATIENCE = 15.0  # seconds that the others have to end, once one has failed
_AS_ASKED = (75, 130)  # exit statuses after SIGTERM and Ctrl-C
_COLOURS = (36, 33, 35, 32, 34, 31)  # of labels, on a terminal


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--processes', type=int, default=2, help='default: 2')
  parser.add_argument(
    '--devices_per_process', type=int, default=1, help='default: 1'
  )
  parser.add_argument(
    '--port', type=int, help='of process 0 on loopback; default: a free one'
  )
  parser.add_argument(
    'command', nargs='+', help='of perceiver-ar, after --, with its flags'
  )
  args = parser.parse_args(argv)
  for name in ('processes', 'devices_per_process'):
    if getattr(args, name) < 1:
      parser.error(f'--{name}={getattr(args, name)} must be at least 1')
  return Job(args).run()


class Job:
  """The processes, from their start to the end of the last."""

  def __init__(self, args: argparse.Namespace):
    self._processes: list[subprocess.Popen[str]] = []
    self._asked = False
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP):
      if signal.getsignal(number) != signal.SIG_IGN:  # as under nohup
        signal.signal(number, self._pass_on)
    port = args.port or _free_port()
    for process in range(args.processes):
      self._processes.append(_start(args, port, process))
    self._last = [
      collections.deque[str](maxlen=_LAST_LINES) for _ in self._processes
    ]
    self._ended: queue.Queue[int] = queue.Queue()
    self._print = threading.Lock()

  def run(self) -> int:
    readers = [
      threading.Thread(target=self._read, args=(i,))
      for i in range(len(self._processes))
    ]
    for reader in readers:
      reader.start()
    failed, is_as_asked = self._wait()
    for reader in readers:
      reader.join()
    if failed is None:
      return 0
    status = _status(self._processes[failed])
    if is_as_asked:
      return status
    with contextlib.suppress(OSError):
      print(f'process {failed} was the first to fail, with status {status}:')
      print(''.join(self._last[failed]), end='', flush=True)
    return status

  def _wait(self) -> tuple[int | None, bool]:
    """Until all have ended; the first to fail, and whether it was asked to."""
    failed, is_as_asked, deadline = None, False, float('inf')
    left = len(self._processes)
    while left:
      try:
        process = self._ended.get(timeout=0.1)
      except queue.Empty:
        if time.monotonic() > deadline:
          self._signal(signal.SIGKILL)
        continue
      left -= 1
      status = _status(self._processes[process])
      was_asked = self._asked and status in _AS_ASKED
      if status and failed is None:
        # Those that end with it may have words of their own to say.
        failed, deadline = process, time.monotonic() + _PATIENCE
        is_as_asked = was_asked
      elif status and is_as_asked and not was_asked:
        failed, is_as_asked = process, False
    return failed, is_as_asked

  def _pass_on(self, number: int, frame: Any) -> None:
    del frame
    if number == signal.SIGHUP:
      # The terminal has gone: what it would kill is asked to save. It may come
      # twice, from the shell and from the kernel.
      if self._asked:
        return
      number = signal.SIGTERM
    self._signal(signal.SIGKILL if self._asked else number)
    self._asked = True

  def _signal(self, number: int) -> None:
    for process in self._processes:
      if process.poll() is None:
        process.send_signal(number)

  def _read(self, process: int) -> None:
    """Prints what a process prints, line by line, with its label."""
    label = f'[{process}]'
    if sys.stdout.isatty():
      colour = _COLOURS[process % len(_COLOURS)]
      label = f'\033[{colour}m{label}\033[0m'
    output = self._processes[process].stdout
    assert output is not None
    for line in output:
      if line.startswith('[Gloo] '):
        continue  # a line per process and group, whatever the log level
      self._last[process].append(line)
      with self._print, contextlib.suppress(OSError):  # a terminal that is gone
        print(label, line, end='', flush=True)
    self._processes[process].wait()
    self._ended.put(process)


def _start(
  args: argparse.Namespace, port: int, process: int
) -> subprocess.Popen[str]:
  place = [
    f'--coordinator=127.0.0.1:{port}',
    f'--num_processes={args.processes}',
    f'--process_id={process}',
  ]
  return subprocess.Popen(
    [sys.executable, '-m', 'perceiver_ar.main', *args.command, *place],
    stdin=subprocess.DEVNULL,
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    errors='replace',
    env=os.environ
    | {
      'JAX_PLATFORMS': 'cpu',
      'JAX_NUM_CPU_DEVICES': str(args.devices_per_process),
      'PYTHONUNBUFFERED': '1',
    },
    # Ctrl-C on a terminal reaches this process alone, which passes it on.
    start_new_session=True,
  )


def _status(process: subprocess.Popen[str]) -> int:
  """As a shell has it: 128 and the signal's number."""
  code = process.returncode
  return 128 - code if code < 0 else code


def _free_port() -> int:
  with socket.socket() as probe:
    probe.bind(('127.0.0.1', 0))
    return probe.getsockname()[1]


if __name__ == '__main__':
  sys.exit(main())
