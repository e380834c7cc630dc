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


def forgets_what_was_saved():
  _replace(checkpoint.Checkpoints, 'restore_newest', lambda *_: None)


def keeps_rows_that_come_again():
  metrics._kept = lambda rows, _: list(rows)


def writes_where_it_is_read():
  """A checkpoint has its name before it is complete."""
  _replace(atomicity, '_get_tmp_directory', lambda final: final)


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


def does_not_ask_whether_it_is_saved():
  _replace(
    checkpoint.Checkpoints,
    '_saving',
    lambda _: contextlib.suppress(Exception),
  )


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
