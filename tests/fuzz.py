"""Parsers of outside input under many bad inputs, in a process of their own.

  python tests/fuzz.py COUNT SEED PARSER...

A parser gives a value that holds what it promises, or a UserError of one
sentence; anything else, a second of work or a memory that grows ends this
process, and says with which input.
"""

import base64
import json
import random
import resource
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import fuzz_parsers
import fuzz_tools

from perceiver_ar.errors import UserError

PARSERS = fuzz_parsers.PARSERS | fuzz_tools.PARSERS
_SECONDS = 5.0  # for one input; a hundred times what the slowest takes
_MEGABYTES = 300  # that a process may grow by, over all inputs
_MEMORY = '/dev/shm' if Path('/dev/shm').is_dir() else None
_ADDRESSES = 4 * 2**30  # beyond what it has: more ends in a MemoryError


class Report(NamedTuple):
  """What became of the inputs of one run."""

  inputs: int
  accepted: int
  slowest: float  # seconds
  megabytes: float  # by which the process grew


def run(name: str, count: int, seed: int) -> Report:
  """Gives a parser so many inputs; raises where it breaks its promise."""
  with tempfile.TemporaryDirectory(dir=_MEMORY) as folder:
    make, parse = PARSERS[name](Path(folder))
    rng = random.Random(seed)
    accepted, slowest = 0, 0.0
    before = _megabytes()
    for _ in range(count):
      data = make(rng)
      seconds, is_value = one(parse, data)
      accepted += is_value
      slowest = max(slowest, seconds)
      grown = _megabytes() - before
      if seconds > _SECONDS or grown > _MEGABYTES:
        raise AssertionError(
          f'{name} took {seconds:.1f} s and {grown:.0f} MiB for {_shown(data)}'
        )
  return Report(count, accepted, slowest, grown if count else 0.0)


def one(parse: Callable[[bytes], None], data: bytes) -> tuple[float, bool]:
  """The seconds that an input takes, and whether it is a value."""
  start = time.process_time()
  try:
    parse(data)
    is_value = True
  except UserError as error:
    is_value = False
    assert str(error).strip(), f'no sentence about {_shown(data)}'
  except BaseException as error:
    error.add_note(f'the input was {_shown(data)}')
    raise
  return time.process_time() - start, is_value


def _shown(data: bytes) -> str:
  return f'{len(data)} bytes, base64 {base64.b64encode(data)[:20_000].decode()}'


def _megabytes() -> float:
  return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def _limit_addresses() -> None:
  pages = int(Path('/proc/self/statm').read_text().split()[0])
  limit = pages * resource.getpagesize() + _ADDRESSES
  resource.setrlimit(resource.RLIMIT_AS, (limit, limit))


def main() -> None:
  count, seed, *names = sys.argv[1:]
  warnings.simplefilter('error')
  _limit_addresses()
  reports = {name: run(name, int(count), int(seed)) for name in names}
  print(json.dumps({n: report._asdict() for n, report in reports.items()}))


if __name__ == '__main__':
  main()
