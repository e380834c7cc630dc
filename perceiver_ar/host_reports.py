"""What the processes of a job tell each other at every step.

A few numbers of each process reach all, gathered by the devices in passing:
nobody waits for them, they are read a step later with the metrics. So all
processes know of a signal that one of them got, and act on it at the same
step; and the digest of the whole batch is known, whoever loaded its rows.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar import distributed

_SLOW = 1.5  # times the median host's work
_SHARE = 0.1  # of the step, that a slow host must cost
_MASK = 2**32 - 1


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """Of one process and one step.

  Attributes:
    stop: the signal that asks it to stop, or 0.
    save: it wants a checkpoint soon.
    failed: it cannot read its data, and goes on only until all know.
    digest: of its own rows of the batch, 64 bits.
    bad_records: that were damaged and skipped for these rows.
    data_seconds: it waited for its data.
    own_seconds: it did anything but wait for devices; with `data_seconds`.
  """

  stop: int = 0
  save: bool = False
  failed: bool = False
  digest: int = 0
  bad_records: int = 0
  data_seconds: float = 0.0
  own_seconds: float = 0.0


class Exchange:
  """Sends this process's reports and reads those of all."""

  def __init__(self, mesh: Mesh):
    owners = np.array([d.process_index for d in mesh.devices.flat])
    # Every device has a copy of its process's; one of them is read.
    self._first_P = np.unique(owners, return_index=True)[1]
    self._num_devices = len(owners)
    self._sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names))
    self._gather = jax.jit(
      lambda reports: reports,
      out_shardings=NamedSharding(mesh, PartitionSpec()),
    )

  def send(self, report: Report, of: str) -> Any:
    """Something to `read`, by all processes in the same order.

    Args:
      report: this process's.
      of: what it is about, for people, such as 'step 57'.
    """
    row = _encode(report)[None]
    if len(self._first_P) == 1:
      return row
    shape = (self._num_devices, row.shape[1])
    distributed.collective(f'reports of {of}')
    return self._gather(
      jax.make_array_from_callback(shape, self._sharding, lambda _: row)
    )

  def read(self, sent: Any) -> list[Report]:
    """Every process's, in order; waits until all have sent theirs."""
    return [_decode(row) for row in np.asarray(sent)[self._first_P]]


def _encode(report: Report) -> np.ndarray:
  seconds = np.array([report.data_seconds, report.own_seconds], np.float32)
  words = [
    report.stop,
    report.save,
    report.failed,
    report.digest >> 32,
    report.digest & _MASK,
    report.bad_records,
  ]
  return np.concatenate([np.array(words, np.uint32), seconds.view(np.uint32)])


def _decode(row: np.ndarray) -> Report:
  stop, save, failed, high, low, bad = (int(word) for word in row[:-2])
  data, own = (float(x) for x in row[-2:].copy().view(np.float32))
  return Report(
    stop=stop,
    save=bool(save),
    failed=bool(failed),
    digest=high << 32 | low,
    bad_records=bad,
    data_seconds=data,
    own_seconds=own,
  )


def slowest(reports: Sequence[Sequence[Report]], seconds: float) -> str:
  """Names the host that the others wait for, or ''.

  Args:
    reports: of the last steps, each of all processes.
    seconds: that a step took.
  """
  own_P = np.mean([[r.own_seconds for r in step] for step in reports], axis=0)
  if len(own_P) == 1:
    return ''
  worst = int(own_P.argmax())
  usual = float(np.median(np.delete(own_P, worst)))
  if own_P[worst] < _SLOW * usual or own_P[worst] - usual < _SHARE * seconds:
    return ''
  data = np.mean([step[worst].data_seconds for step in reports])
  return (
    f'process {distributed.name_of(worst)} is slow: of {seconds:.3g} s a step '
    f'its host takes {own_P[worst]:.3g}, {data:.3g} of them for data; '
    f'others take {usual:.3g}'
  )
