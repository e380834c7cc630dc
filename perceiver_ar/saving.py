"""Orbax's manager of checkpoints, as a job of many hosts needs it."""

import time
from collections.abc import Mapping

import jax
import orbax.checkpoint as ocp
from etils import epath

from perceiver_ar import distributed, host_memory
from perceiver_ar.config import CheckpointConfig
from perceiver_ar.preservation import Preservation

_LOOK_SECONDS = 0.01
_LOOK_AT_OTHERS_SECONDS = 1.0


class Manager(ocp.CheckpointManager):
  """It tells at once of a save that this process could not make.

  Orbax has all processes meet first, for which those that wait for the files
  of this one never come: it would tell after 20 minutes, of the time.

  Attributes:
    failure: of the save that is being made.
  """

  failure: BaseException | None = None

  def _wait_for_checkpointers(self) -> None:
    try:
      super()._wait_for_checkpointers()
    except BaseException as error:
      self.failure = error
      raise

  def is_writing(self) -> bool:
    """Whether the last save goes on; waits for nobody.

    Orbax's own flag stays set where a save could not even begin, and has a lock
    that is held where hosts wait for each other.
    """
    return self._finalize_thread.map(lambda t: t is not None and t.is_alive())

  def wait_until_finished(self) -> None:
    """Waits for the last save, as long as all are there to make it.

    Raises:
      HostsError, UserError: a process has left; as `distributed.barrier`.
      Exception: whatever this process's part of the save has failed with.
    """
    looked = time.monotonic()
    while self.is_writing():
      if self.failure is not None and jax.process_count() > 1:
        raise self.failure
      if time.monotonic() - looked > _LOOK_AT_OTHERS_SECONDS:
        distributed.check_present('save')
        looked = time.monotonic()
      time.sleep(_LOOK_SECONDS)
    try:
      super().wait_until_finished()
    finally:
      self.failure = None


def open_manager(
  folder: epath.Path,
  config: CheckpointConfig,
  losses: Mapping[int, float],
  *,
  in_parts: bool,
) -> Manager:
  """A manager of the steps in `folder`; `in_parts`, as `host_memory` writes."""
  return Manager(
    folder,
    item_handlers={
      'state': host_memory.writer(config.max_host_gb, in_parts=in_parts),
      'config': ocp.JsonCheckpointHandler(),
    },
    options=ocp.CheckpointManagerOptions(
      cleanup_tmp_directories=True,
      # In the background, a folder that cannot be made is reported after
      # minutes: each writer waits for it in vain.
      async_options=ocp.AsyncOptions(create_directories_asynchronously=False),
      # A damaged step must not keep the manager from starting.
      lightweight_initialize=True,
      preservation_policy=Preservation(config, losses),
    ),
  )
