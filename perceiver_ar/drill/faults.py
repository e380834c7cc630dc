"""The faults, and what must come of each.

A fault ends in a run that is complete; `drills` compares it with one that was
never disturbed.
"""

import contextlib
import dataclasses
import shutil
import signal
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

from perceiver_ar import checkpoint, journal
from perceiver_ar.drill.scene import (
  HANG_SECONDS,
  NUM_STEPS,
  SAVE_EVERY,
  Failed,
  Scene,
)
from perceiver_ar.errors import MISTAKE, RESTART

_NAN_STEP = 7
_SLOWLY = {'pace': 0.5}  # so that a save is over, or has failed, in a step
_PACED = {'pace': 0.1}  # so that there is time to do something to it


class NotTried(Exception):  # noqa: N818 (it is a verdict)
  """This machine cannot do what the drill needs."""


@dataclasses.dataclass(frozen=True)
class Fault:
  """One, and what it is.

  Attributes:
    name: on the command line.
    about: for people.
    play: does it, and finishes the run.
    num_processes: that it takes at least.
    without: steps that the run it is compared with has not made either.
    exact: whether bits are compared; else what the order of sums allows.
    num_late: steps that are made before it is known that a save has failed.
  """

  name: str
  about: str
  play: Callable[[Scene], None]
  num_processes: int = 1
  without: tuple[int, ...] = ()
  exact: bool = True
  num_late: int = 0


def _kill_step(scene: Scene) -> None:
  for on, step in ((0, 6), (-1, 15)):
    job = scene.resume(faults={'kill_at': step}, on=on)
    scene.demand_restart(job, -signal.SIGKILL)
  job = scene.finish()
  scene.demand(job, 'goes on from step .*')


def _kill_save(scene: Scene) -> None:
  for on in _ends(scene):
    job = scene.resume(faults=_SLOWLY | {'kill_in_save': 2}, on=on)
    scene.demand_restart(job, -signal.SIGKILL)
  scene.demand(scene.finish(), r'goes on from step \d+ .*')
  if (scene.seen / 'damaged').exists():
    raise Failed('half of a checkpoint was taken for one')


def _ends(scene: Scene) -> list[int]:
  """The first process, which the others need, and the last."""
  return sorted({0, scene.num_processes - 1})


def _kill_restore(scene: Scene) -> None:
  scene.demand_restart(scene.start(faults={'kill_at': 10}), -signal.SIGKILL)
  for on in _ends(scene):
    job = scene.resume(faults={'kill_in_restore': True}, on=on)
    scene.demand_restart(job, -signal.SIGKILL)
  scene.demand(scene.finish(), 'goes on from step 8 .*')


def _sigterm(scene: Scene) -> None:
  job = scene.stop_at(6)
  scene.demand(job, 'SIGTERM: step .* is saved.*')
  scene.finish()
  if scene.lost:
    raise Failed(f'{scene.lost} steps were lost')


def _hang(scene: Scene) -> None:
  for on, step in zip(_ends(scene), (10, 14), strict=False):
    job = scene.resume(faults=_PACED | {'hang_at': step}, on=on)
    scene.demand_restart(job, RESTART)
    scene.demand(job, f'hangs in .* {HANG_SECONDS:.0f} s')
    scene.demand(job, "last collective '[^']*step [0-9]+'")
    scene.demand(job, 'most recent call first')  # the stacks
  scene.finish()


def _slow(scene: Scene) -> None:
  job = scene.finish(faults={'pace': 0.25})
  last = scene.num_processes - 1
  scene.demand(job, f'process {last} .*is slow: .*')
  if not any(row['event'] == 'slow' for row in journal.read(scene.workdir)):
    raise Failed('the journal does not tell of the slow host')


def _other_hosts(scene: Scene) -> None:
  scene.demand_restart(scene.start(faults={'kill_at': 10}), -signal.SIGKILL)
  # One host more, for ever; or one less.
  other = 2 if scene.num_processes == 1 else scene.num_processes - 1
  scene.demand(scene.finish(num_processes=other), 'goes on from step 8 .*')


def _damaged(
  how: Callable[[Path, int], None],
) -> Callable[[Scene], None]:
  """Damages the newest checkpoint of a run that has ended."""

  def play(scene: Scene) -> None:
    scene.stop_at(6)
    step = checkpoint.saved_steps(scene.seen)[-1]
    how(scene.seen / 'checkpoints' / str(step), scene.num_processes - 1)
    scene.demand(scene.finish(), r'checkpoint \S+ is damaged: .*')
    if not (scene.seen / 'damaged').exists():
      raise Failed('the damaged checkpoint was not kept')

  return play


def _arrays(folder: Path) -> list[Path]:
  files = sorted(p for p in (folder / 'state').rglob('d/*') if p.is_file())
  assert files, folder
  return files


def _truncate(folder: Path, _: int) -> None:
  for file in _arrays(folder):
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])


def _flip(folder: Path, _: int) -> None:
  file = max(_arrays(folder), key=lambda path: path.stat().st_size)
  content = bytearray(file.read_bytes())
  content[len(content) // 2] ^= 1
  file.write_bytes(content)


def _empty(folder: Path, _: int) -> None:
  for file in _arrays(folder):
    file.write_bytes(b'')


def _lose(folder: Path, process: int) -> None:
  shutil.rmtree(folder / 'state' / f'ocdbt.process_{process}')


def _disk_full(scene: Scene) -> None:
  with _small_disk(scene) as disk:
    job = scene.start(faults=_SLOWLY, on=0)
    scene.until_saved(job, SAVE_EVERY)
    ballast = disk / 'ballast'
    with contextlib.suppress(OSError), ballast.open('wb', 0) as file:
      while True:
        file.write(bytes(4096))
    scene.demand_restart(job, 1)
    scene.demand(job, 'a checkpoint could not be written.*')
    scene.demand(job, 'No space left|ENOSPC|RESOURCE_EXHAUSTED')
    ballast.unlink()
    scene.finish()


@contextlib.contextmanager
def _small_disk(scene: Scene) -> Iterator[Path]:
  """8 MB in memory for the checkpoints, seen by the job alone."""
  checkpoints = scene.workdir / 'checkpoints'
  checkpoints.mkdir(parents=True)
  words = f'mount -t tmpfs -o size=8m drill {checkpoints} && echo && cat'
  try:
    holder = subprocess.Popen(
      ['unshare', '--user', '--map-root-user', '--mount', 'sh', '-c', words],
      stdin=subprocess.PIPE,
      stdout=subprocess.PIPE,
      stderr=subprocess.PIPE,
    )
  except FileNotFoundError as error:
    raise NotTried('a small disk takes unshare, of util-linux') from error
  with holder:
    assert holder.stdout and holder.stderr and holder.stdin
    if not holder.stdout.readline():
      said = holder.stderr.read().decode(errors='replace').strip()
      raise NotTried(f'a small disk cannot be mounted here ({said})')
    scene.enter(holder.pid)
    try:
      yield scene.seen / 'checkpoints'
    finally:
      holder.stdin.close()


def _storage(scene: Scene) -> None:
  job = scene.start(faults=_SLOWLY, on=0)
  scene.until_saved(job, SAVE_EVERY)
  # Its folder is gone for a while, as when a network mount is lost.
  place = scene.workdir / 'checkpoints'
  away = place.rename(scene.workdir / 'away')
  place.write_text('')
  scene.demand_restart(job, 1)
  scene.demand(job, 'a checkpoint could not be written.*')
  place.unlink()
  away.rename(place)
  scene.finish()


def _nan_once(scene: Scene) -> None:
  job = scene.finish(faults={'nan_at': [_NAN_STEP]}, on=None)
  row = scene.rows()[_NAN_STEP]
  if not row['skipped']:
    raise Failed(f'step {_NAN_STEP} was not skipped')
  scene.demand(job, rf'step {_NAN_STEP} is skipped .*{row["data_digest"]}.*')


def _nan_many(scene: Scene) -> None:
  job = scene.start(faults={'nan_at': list(range(9, NUM_STEPS))}, on=None)
  scene.demand_status(job, MISTAKE)
  scene.demand(job, '3 steps in a row were skipped.*')
  scene.demand(scene.finish(), 'goes on from step 8 .*')


def _shard_gone(scene: Scene) -> None:
  job = scene.start(faults=_PACED | {'kill_at': 14})
  scene.until(job, 6)
  shard = _shard(scene)
  away = shard.rename(shard.with_suffix('.away'))
  if any(status == 0 for status in job.end()):
    raise Failed('a process ended well')
  job = scene.resume()
  scene.demand_status(job, MISTAKE)
  scene.demand(job, rf'perceiver-ar: .*{shard.name}.*')
  away.rename(shard)
  scene.finish()


def _shard_corrupt(scene: Scene) -> None:
  job = scene.start(faults=_PACED)
  scene.until(job, 6)
  shard = _shard(scene)
  content = shard.read_bytes()
  with shard.open('r+b') as file:  # in place: it is open elsewhere
    for at in range(0, len(content), 8):
      file.seek(at)
      file.write(bytes([content[at] ^ 0x55]))
  scene.demand_status(job, MISTAKE, RESTART)
  if MISTAKE not in job.end():
    raise Failed('no process ended as by a mistake, which it is')
  scene.demand(job, rf'perceiver-ar: .*{shard.name}: record \d+ .*')
  shard.write_bytes(content)
  scene.finish()


def _shard(scene: Scene) -> Path:
  return next((scene.folder / 'data').glob('train*.array_record'))


def _config_changed(scene: Scene) -> None:
  scene.stop_at(6)
  job = scene.resume('--config.optimizer.learning_rate=0.5')
  scene.demand_status(job, MISTAKE)
  scene.demand(job, 'perceiver-ar: .*optimizer.learning_rate.*')
  scene.finish()


FAULTS = (
  Fault('kill-step', 'kill -9 of the first host, and of the last', _kill_step),
  Fault('kill-save', 'kill -9 in the middle of a save', _kill_save),
  Fault('kill-restore', 'kill -9 in the middle of a restore', _kill_restore),
  Fault('sigterm', 'SIGTERM to one host', _sigterm),
  Fault('hang', 'a host that hangs', _hang),
  Fault('slow', 'a host that is five times as slow', _slow, num_processes=2),
  Fault('other-hosts', 'a host that is lost', _other_hosts, exact=False),
  Fault('truncated', 'the newest checkpoint cut short', _damaged(_truncate)),
  Fault('flipped', 'a bit of the newest checkpoint', _damaged(_flip)),
  Fault('emptied', 'the newest checkpoint without bytes', _damaged(_empty)),
  Fault('missing', "the newest without a host's files", _damaged(_lose)),
  Fault('disk-full', 'a disk that is full in a save', _disk_full, num_late=2),
  Fault('storage', 'storage that fails and comes back', _storage, num_late=2),
  Fault('nan-once', 'gradients of one step', _nan_once, without=(_NAN_STEP,)),
  Fault('nan-many', 'gradients of all steps from one on', _nan_many),
  Fault('shard-gone', 'a file of the data disappears', _shard_gone),
  Fault('shard-corrupt', 'a file of the data is damaged', _shard_corrupt),
  Fault('config', 'another config between two starts', _config_changed),
)
