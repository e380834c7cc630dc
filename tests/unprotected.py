"""`perceiver_ar.drill.victim` with a protection removed from the trainer.

python tests/unprotected.py NAME FAULTS train --config=...
"""

import contextlib
import json
import sys

import jax.numpy as jnp
from orbax.checkpoint._src.path import atomicity

from perceiver_ar import (
  checkpoint,
  errors,
  host_reports,
  metrics,
  prefetch,
  saved_step,
  stopping,
  train,
  watchdog,
  workdir,
)
from perceiver_ar.data import records
from perceiver_ar.drill import victim


def _replace(owner, name, value):
  assert hasattr(owner, name), name
  setattr(owner, name, value)


def moves_what_it_reads():
  restore = saved_step.restore

  def moving(folder, *args, **kwargs):
    away = folder.parent.parent / folder.name
    folder.rename(away)
    state = restore(away, *args, **kwargs)
    away.rename(folder)
    return state

  saved_step.restore = moving


def keeps_rows_that_come_again():
  metrics._kept = lambda rows, _: list(rows)


def writes_where_it_is_read():
  """A checkpoint has its name before it is complete."""
  _replace(atomicity, '_get_tmp_directory', lambda final: final)
  rename = atomicity.async_path.rename

  async def unless_it_is_there(path, target):
    if path != target:
      await rename(path, target)

  _replace(atomicity.async_path, 'rename', unless_it_is_there)


def knows_no_signals():
  _replace(stopping.Stop, 'on_signals', lambda _: contextlib.nullcontext())


def never_looks_up():
  _replace(watchdog.Watchdog, '_watch', lambda _: None)


def names_nobody():
  host_reports.slowest = lambda *_: ''


def begins_the_data_again():
  placed = prefetch.placed_batches
  prefetch.placed_batches = lambda config, documents, mesh, _: placed(
    config, documents, mesh, 0
  )


def takes_damage_for_a_crash():
  saved_step._quiet_failure = lambda _: contextlib.nullcontext([])


class _Same(str):
  __slots__ = ()
  __hash__ = str.__hash__

  def __eq__(self, other):
    return True

  def __ne__(self, other):
    return False


def believes_every_checksum():
  checksums = saved_step.checksums
  saved_step.checksums = lambda tree: {
    name: _Same(value) for name, value in checksums(tree).items()
  }


def passes_over_saves_that_fail():
  def passing(method):
    def call(*args, **kwargs):
      with contextlib.suppress(errors.SaveError):
        return method(*args, **kwargs)

    return call

  for name in ('save', 'check', 'wait', 'close'):
    method = getattr(checkpoint.Checkpoints, name)
    _replace(checkpoint.Checkpoints, name, passing(method))


def takes_any_gradient():
  jnp.isfinite = lambda x: jnp.ones_like(x, bool)


def skips_for_ever():
  _replace(train._Loop, '_check_skipped', lambda *_: None)


def explains_nothing():
  errors.explain = lambda error: ('', 1)


def reads_anything():
  read = records.Documents.__getitem__

  def lenient(self, index):
    try:
      return read(self, index)
    except Exception:
      return records.np.arange(2, 40, dtype='int32')

  records.Documents.__getitem__ = lenient


def takes_any_config():
  workdir.check_config = lambda *_: None


if __name__ == '__main__':
  globals()[sys.argv[1]]()
  victim.run(json.loads(sys.argv[2]), sys.argv[3:])
