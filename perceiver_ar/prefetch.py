"""Batches on the devices, ahead of the step that needs them."""

import collections
import contextlib
import dataclasses
import time
from collections.abc import Generator
from typing import Any

from jax.sharding import Mesh

from perceiver_ar import journal, partitioning
from perceiver_ar.config import Config
from perceiver_ar.data import pipeline
from perceiver_ar.errors import UserError


@dataclasses.dataclass(frozen=True)
class Placed:
  """A batch on the devices.

  Attributes:
    arrays: the global batch.
    digest: of this process's own rows; the processes' add up to the batch's.
    bad_records: that were damaged and skipped for them; likewise.
    seconds: that the loop waited for it.
    error: why it could not be loaded; the rest is of the one before.
  """

  arrays: dict[str, Any]
  digest: int
  bad_records: int
  seconds: float = 0.0
  error: UserError | None = None


def placed_batches(
  config: Config,
  documents: pipeline.DocumentSource,
  mesh: Mesh,
  first_step: int,
) -> Generator[Placed]:
  """Every batch, `data.device_prefetch` of them ahead of the one in use.

  Where one cannot be loaded, there is one more, with the error: within a step,
  other processes would wait in vain for one that ends. The first one raises.
  """
  rows = partitioning.host_rows(mesh, config.train.batch_size)
  ahead: collections.deque[Placed] = collections.deque()
  last = error = None
  loaded = pipeline.train_batches(
    config, documents, first_step=first_step, rows_b=rows.rows_b
  )
  with contextlib.closing(loaded):
    while True:
      start = time.monotonic()
      while error is None and len(ahead) <= config.data.device_prefetch:
        try:
          batch = next(loaded, None)
        except UserError as raised:
          error = raised
          break
        if batch is None:
          break
        ahead.append(_place(batch, rows, mesh, config.train.batch_size))
      if not ahead and error is not None:
        if last is None:
          raise error
        ahead.append(dataclasses.replace(last, error=error))
      if not ahead:
        return
      last = ahead.popleft()
      seconds = time.monotonic() - start
      journal.spent('data', seconds)
      yield dataclasses.replace(last, seconds=seconds)


def _place(
  batch: dict[str, Any], rows: partitioning.HostRows, mesh: Mesh, total: int
) -> Placed:
  own = {name: local[rows.own_b] for name, local in batch.items()}
  num_bad = int(own.pop('bad_records').sum())
  arrays = {name: batch[name] for name in own}
  return Placed(
    arrays=partitioning.global_batch(arrays, mesh, total),
    digest=pipeline.digest(own, rows.rows_b[rows.own_b]),
    bad_records=num_bad,
  )
