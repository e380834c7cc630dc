"""Plays faults, compares what is left with an undisturbed run, and tells."""

import collections
import dataclasses
import math
import os
import shutil
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Sequence
from concurrent import futures
from pathlib import Path
from typing import Any

import numpy as np

from perceiver_ar import inspection
from perceiver_ar.data import layouts, text, tokens, writer
from perceiver_ar.drill.faults import FAULTS, Fault, NotTried
from perceiver_ar.drill.scene import (
  HANG_SECONDS,
  NUM_STEPS,
  SAVE_EVERY,
  Failed,
  Scene,
  Trace,
)
from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress

_CONFIG = Path(__file__).parents[2] / 'configs' / 'drill.py'
_VICTIM = (sys.executable, '-m', 'perceiver_ar.drill.victim')
_TOLERANCE = 1e-3  # of sums in another order
_PARAMS_TOLERANCE = 1e-4  # a hundredth of what a single update may change
# Biases of keys have no gradient but noise, and Adam makes it larger.
_NOISE_TOLERANCE = 1e-3


@dataclasses.dataclass(frozen=True)
class Verdict:
  """What came of one fault.

  Attributes:
    fault: its name.
    num_processes: of the job.
    verdict: passed, failed, or not tried.
    said: what the trainer said; or what was wrong with it.
    lost: the most steps that were made again after a start.
    seconds: that the drill took.
  """

  fault: str
  num_processes: int
  verdict: str
  said: str
  lost: int
  seconds: float


class Drills:
  """Faults for jobs of so many processes.

  In a folder of its own, which goes unless something has failed.

  Attributes:
    num_processes: of a job.
    program: that every process of a scene to come runs.
  """

  def __init__(self, num_processes: int):
    if not _CONFIG.exists():
      raise UserError(
        f'{_CONFIG} is missing: drills run the configs of the project; install '
        'it from a checkout with pip install -e .'
      )
    self.num_processes = num_processes
    self.program: Sequence[str] = _VICTIM
    self.folder = Path(tempfile.mkdtemp(prefix='perceiver-ar-drill-'))
    self._undisturbed: dict[tuple[int, ...], Trace | Failed] = {}
    self._lock = threading.Lock()

  def scene(self, name: str) -> Scene:
    """A run that has not begun, with data of its own."""
    folder = self.folder / name
    words = [
      f'--config={_CONFIG}',
      f'--config.data.path={folder / "data"}',
      f'--config.train.num_steps={NUM_STEPS}',
      f'--config.train.hang_seconds={HANG_SECONDS}',
      f'--config.checkpoint.save_every={SAVE_EVERY}',
    ]
    scene = Scene(folder, self.num_processes, self.program, words)
    _write_data(folder / 'data')
    return scene

  def undisturbed(self, without: tuple[int, ...] = ()) -> Trace:
    """What the run comes to if nothing happens, but for steps left out.

    Raises:
      Failed: it failed, the only time that it is made.
    """
    with self._lock:
      if without not in self._undisturbed:
        self._undisturbed[without] = self._leave_undisturbed(without)
      found = self._undisturbed[without]
    if isinstance(found, Failed):
      raise Failed(str(found))
    return found

  def _leave_undisturbed(self, without: tuple[int, ...]) -> Trace | Failed:
    name = '-'.join(['undisturbed', *map(str, without)])
    try:
      scene = self.scene(name)
      faults = {'without': without} if without else {}
      scene.finish(faults=faults, on=None)
      assert scene.final
      return scene.final
    except Exception as error:
      where = self.folder / name
      return Failed(f'undisturbed, it fails: {_sentence(error)}; see {where}')

  def play(self, fault: Fault) -> Verdict:
    start = time.monotonic()
    scene, verdict, said = None, 'passed', ''
    try:
      if self.num_processes < fault.num_processes:
        raise NotTried(f'it takes {fault.num_processes} processes')
      wanted = self.undisturbed(fault.without)
      scene = self.scene(fault.name)
      fault.play(scene)
      assert scene.final
      said = scene.said.replace(f'{scene.workdir}/', '')
      compare(scene.final, wanted, fault)
      if not fault.exact:
        compare_params(scene.final, wanted)
      if scene.lost > (most := SAVE_EVERY + fault.num_late):
        raise Failed(f'{scene.lost} steps were lost, more than {most}')
    except NotTried as error:
      verdict, said = 'not tried', str(error)
    except Exception as error:  # whatever it is, the others are played
      where = f'; see {scene.folder}' if scene else ''
      verdict, said = 'failed', f'{_sentence(error)}{where}'
    return Verdict(
      fault=fault.name,
      num_processes=self.num_processes,
      verdict=verdict,
      said=said,
      lost=scene.lost if scene else 0,
      seconds=round(time.monotonic() - start, 1),
    )

  def remove(self) -> None:
    shutil.rmtree(self.folder)


def compare(got: Trace, wanted: Trace, fault: Fault) -> None:
  """Raises Failed where a run is not what it would have been."""
  a = [row for row in got.rows if row['step'] not in fault.without]
  b = [row for row in wanted.rows if row['step'] not in fault.without]
  if [row['step'] for row in a] != [row['step'] for row in b]:
    raise Failed('other steps are in metrics.jsonl than without the fault')
  for mine, other in zip(a, b, strict=True):
    for name in sorted({*mine, *other}):
      if not _same(mine.get(name), other.get(name), fault.exact):
        raise Failed(
          f'step {mine["step"]} has {name} {mine.get(name)}, and without the '
          f'fault {other.get(name)}'
        )
  if fault.exact and got.arrays != wanted.arrays:
    differ = [k for k in wanted.arrays if got.arrays.get(k) != wanted.arrays[k]]
    raise Failed(f'{differ[0]} ends with other bits than without the fault')


def compare_params(got: Trace, wanted: Trace) -> None:
  """Raises Failed where sums in another order are no reason to differ."""
  for row in inspection.diff(got.workdir, None, wanted.workdir, None)['arrays']:
    name, off = row['name'], row.get('largest_difference', math.inf)
    most = _PARAMS_TOLERANCE
    if name.endswith('key/bias'):
      most = _NOISE_TOLERANCE
    if name.startswith('params/') and not off <= most:  # it may be NaN
      raise Failed(f'{name} ends {off} away from what it is without the fault')


def _sentence(error: Exception) -> str:
  kind = '' if isinstance(error, Failed | UserError) else type(error).__name__
  return f'{kind}: {error}' if kind else str(error)


def _same(a: Any, b: Any, exact: bool) -> bool:
  if isinstance(a, float) and isinstance(b, float) and not exact:
    return math.isclose(a, b, rel_tol=_TOLERANCE)
  return a == b


def chosen(names: Sequence[str]) -> list[Fault]:
  known = {fault.name: fault for fault in FAULTS}
  for name in names:
    if name not in known:
      raise UserError(
        f'there is no drill {name!r}; there is {", ".join(known)}'
      )
  return [known[name] for name in names]


def run(faults: Sequence[Fault], num_processes: int) -> list[Verdict]:
  """Plays one more at a time than there are cores for, and prints a table."""
  drills = Drills(num_processes)
  print(f'{"fault":<14}{"verdict":<11}{"lost":>4}{"s":>6}  the trainer said')
  # Much of a drill is waiting. A container may have fewer cores than it says.
  workers = 1 + min(os.cpu_count() or 1, 8) // num_processes
  verdicts = []
  with (
    Progress('drill', len(faults), 'faults') as progress,
    futures.ThreadPoolExecutor(workers) as pool,
  ):
    for verdict in pool.map(drills.play, faults):
      verdicts.append(verdict)
      print(_line(verdict), flush=True)
      progress.advance(1)
  count = collections.Counter(v.verdict for v in verdicts)
  print(', '.join(f'{num} {verdict}' for verdict, num in count.items()))
  if not count['failed']:
    drills.remove()
  return verdicts


def _line(verdict: Verdict) -> str:
  said = verdict.said
  if verdict.verdict == 'passed':
    said = textwrap.shorten(said.removeprefix('perceiver-ar: '), 80)
  return (
    f'{verdict.fault:<14}{verdict.verdict:<11}{verdict.lost:>4}'
    f'{verdict.seconds:>6.0f}  {said}'
  )


def _write_data(folder: Path) -> None:
  """A prepared data set of a few texts of made-up words."""
  rng = np.random.default_rng(0)
  codec = text.ByteCodec()
  with writer.Writer(
    folder, kind='text', variant='', codec=codec, positions=layouts.INDEX
  ) as target:
    for split, num in (('train', 40), ('validation', 3)):
      for i in range(num):
        words = rng.integers(0, 26, (60, 3)) + ord('a')
        said = ' '.join(''.join(map(chr, word)) for word in words)
        ids = [[tokens.SOS], codec.encode(said), [tokens.EOS]]
        counts = {'bytes': len(said)}
        target.add(
          split, np.concatenate(ids), name=f'{split} {i}', counts=counts
        )
