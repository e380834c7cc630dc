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


@dataclasses.dataclass(frozen=True)
class Placed:
  """A batch on the devices.

  Attributes:
    arrays: the global batch.
    digest: of this process's own rows; the processes' add up to the batch's.
    seconds: that the loop waited for it.
  """

  arrays: dict[str, Any]
  digest: int
  seconds: float


def placed_batches(
  config: Config,
  documents: pipeline.DocumentSource,
  mesh: Mesh,
  first_step: int,
) -> Generator[Placed]:
  """Every batch, `data.device_prefetch` of them ahead of the one in use."""
  total = config.train.batch_size
  rows = partitioning.host_rows(mesh, total)
  ahead: collections.deque[Placed] = collections.deque()
  loaded = pipeline.train_batches(
    config, documents, first_step=first_step, rows_b=rows.rows_b
  )
  with contextlib.closing(loaded):
    while True:
      start = time.monotonic()
      while len(ahead) <= config.data.device_prefetch:
        batch = next(loaded, None)
        if batch is None:
          break
        own = {name: local[rows.own_b] for name, local in batch.items()}
        arrays = partitioning.global_batch(batch, mesh, total)
        digest = pipeline.digest(own, rows.rows_b[rows.own_b])
        ahead.append(Placed(arrays, digest, 0.0))
      if not ahead:
        return
      seconds = time.monotonic() - start
      journal.spent('data', seconds)
      yield dataclasses.replace(ahead.popleft(), seconds=seconds)
