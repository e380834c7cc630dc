"""Checkpoints that are either bit for bit what was saved, or refused.

Orbax writes the arrays (asynchronously, each host its own shards) and renames
a finished step into place. It does not notice flipped bits and casts silently,
so every step carries a manifest: the dtype, the shape and a checksum of every
array, the loss and a digest of the config, itself under a digest. Nothing is
restored that does not agree with it.

A checkpoint is the folder WORKDIR/checkpoints/STEP; a copy in the checkpoints
of another WORKDIR is one, too.
"""

import contextlib
import dataclasses
import itertools
import json
import logging
import math
from collections.abc import Iterator, Mapping
from typing import Self, TypeAlias

import jax
import orbax.checkpoint as ocp
from etils import epath

from perceiver_ar import config as config_lib
from perceiver_ar import (
  distributed,
  host_memory,
  journal,
  paths,
  saved_step,
  saving,
)
from perceiver_ar.checksums import PyTree, flatten, nest
from perceiver_ar.config import CheckpointConfig, Config
from perceiver_ar.errors import HostsError, SaveError, UserError
from perceiver_ar.saved_step import Damaged

Path: TypeAlias = epath.PathLike

_CHECKPOINTS = 'checkpoints'
_DAMAGED = 'damaged'
_log = logging.getLogger(__name__)


class Checkpoints:
  """The checkpoints that a training run writes and resumes from.

  Attributes:
    losses: of evaluations by step: the best are kept.
    last_memory: by how many bytes this process grew in the last save or restore
      that is over, without what that left in host memory; None: not known.
    last_seconds: from the last save's begin until it was seen to be over.
  """

  def __init__(self, workdir: Path, config: CheckpointConfig):
    self.last_memory: int | None = None
    self.last_seconds: float | None = None
    self._saved: tuple[int, host_memory.Meter] | None = None
    self._config = config
    self._workdir = paths.absolute(workdir)
    saved_step.shorten_complaints()
    saved_step.versions()  # fails before the first step, not at its save
    self._folder = self._workdir / _CHECKPOINTS
    self.losses = {
      step: loss
      for step in saved_steps(workdir)
      if (loss := saved_step.read_loss(self._folder / str(step))) is not None
    }
    self._in_parts = False
    self._manager = self._open()

  def _open(self) -> saving.Manager:
    return saving.open_manager(
      self._folder, self._config, self.losses, in_parts=self._in_parts
    )

  def learn(self, losses: Mapping[int, float | None]) -> None:
    """Of evaluations by step, which no save has come with."""
    known = {step: loss for step, loss in losses.items() if loss is not None}
    self.losses |= {s: loss for s, loss in known.items() if math.isfinite(loss)}

  def __enter__(self) -> Self:
    return self

  def __exit__(self, kind: object, *exception: object) -> None:
    # That others have left is an echo of what ends this process.
    with contextlib.suppress(*([HostsError] if kind else [])):
      self.close()

  def close(self) -> None:
    """Waits for the last save; raises SaveError if it failed."""
    with self._saving():
      self._manager.close()
    self._measure_save()

  def wait(self) -> None:
    """Waits for the last save; raises SaveError if it failed."""
    with self._saving():
      self._manager.wait_until_finished()
    self._measure_save()

  def _measure_save(self) -> None:
    if self._saved is None:
      return
    (step, meter), self._saved = self._saved, None
    self.last_seconds = meter.seconds()
    self._tell_memory('save', step, meter.growth())

  def _tell_memory(self, doing: str, step: int, growth: int | None) -> None:
    self.last_memory, max_gb = growth, self._config.max_host_gb
    host_memory.warn_above(f'the {doing} of step {step}', growth, max_gb)
    journal.event('memory', doing=doing, step=step, bytes=growth)

  def check(self) -> None:
    """Raises SaveError if the last save has failed; waits for none."""
    if self._manager.failure or not self._manager.is_saving_in_progress():
      self.wait()  # not at all

  def writing(self) -> float:
    """For how many seconds the last save goes on by now; 0: it is over."""
    saved, is_on = self._saved, self._manager.is_writing()
    return saved[1].seconds() if saved and is_on else 0.0

  @contextlib.contextmanager
  def _saving(self) -> Iterator[None]:
    try:
      yield
    except (HostsError, UserError):  # another process has left
      raise
    except Exception as error:  # whatever a file system or Orbax raises
      raise SaveError(
        f'a checkpoint could not be written to {self._folder} '
        f'({saved_step.one_line(error)}); make room there or mend the storage, '
        'and run again'
      ) from error

  def save(
    self,
    step: int,
    state: PyTree,
    *,
    config: Config,
    loss: float | None,
    data: str = '',
  ) -> None:
    """Starts to save `state`, whose buffers may be donated right after.

    Returns when it is saved if it does not fit into `max_host_gb`.
    A step that is there already is left as it is.

    Args:
      step: the number of updates that `state` has seen.
      state: a pytree of arrays.
      config: what the run is made of.
      loss: of the evaluation at this step, if there was one.
      data: the fingerprint of what it was trained on, if that is known.
    """
    if step in self.steps():
      return
    self.wait()  # as Orbax would; and the last save's memory is known
    max_gb = self._config.max_host_gb
    if not self._in_parts and not host_memory.fits(flatten(state), max_gb):
      self.close()
      self._in_parts = True
      self._manager = self._open()
    config_json = dataclasses.asdict(config)
    meter = host_memory.Meter()
    manifest = saved_step.make_manifest(step, state, config_json, loss, data)
    if manifest['loss'] is not None:
      self.losses[step] = manifest['loss']
    with self._saving():
      saved = self._manager.save(
        step,
        args=ocp.args.Composite(
          state=ocp.args.PyTreeSave(
            nest(flatten(state)),
            ocdbt_target_data_file_size=host_memory.file_bytes(max_gb),
          ),
          config=ocp.args.JsonSave(config_json),
        ),
        custom_metadata={
          'manifest': manifest,
          'sha256': saved_step.digest(manifest),
        },
        force=True,
      )
    assert saved
    self._saved = step, meter
    if self._in_parts:
      self.wait()

  def steps(self) -> list[int]:
    """In order, with the one that is being written."""
    self.check()
    return sorted(self._manager.all_steps())

  def latest(self) -> int | None:
    return max(self.steps(), default=None)

  def restore(self, step: int, abstract_state: PyTree) -> PyTree:
    """The state at `step`, laid out as `abstract_state` says.

    Args:
      step: one of `steps()`.
      abstract_state: jax.ShapeDtypeStruct leaves with shardings, on any mesh.

    Raises:
      Damaged: a file is missing, cut short or altered.
      UserError: there is no such step, or it holds another model.
    """
    self.wait()
    folder, meter = step_folder(self._workdir, step), host_memory.Meter()
    max_gb = self._config.max_host_gb
    state = saved_step.restore(folder, abstract_state, '', max_gb)
    self._measure_restore(step, state, meter)
    return state

  def _measure_restore(
    self, step: int, state: PyTree, meter: host_memory.Meter
  ) -> None:
    growth = meter.growth()
    if growth is not None:
      at_rest = host_memory.at_rest(flatten(state).values())
      growth = max(0, growth - at_rest)
    self._tell_memory('restore', step, growth)

  def restore_newest(self, abstract_state: PyTree) -> tuple[int, PyTree] | None:
    """The newest sound step and its state; sets damaged newer ones aside.

    Raises:
      UserError: all are damaged or gone, or the newest is another model's.
    """
    self.wait()
    meter, max_gb = host_memory.Meter(), self._config.max_host_gb
    damaged, found = _newest_sound(
      self._workdir, abstract_state, '', None, max_gb
    )
    used = f'step {found[0]} is used instead' if found else 'none else is sound'
    for error in damaged:
      self._set_aside(error, used)
    if found is not None:
      self._measure_restore(*found, meter)
    elif not damaged:
      journal.check_never_saved(self._workdir)
    else:
      raise UserError(
        f'every checkpoint in {self._folder} was damaged, and they were moved '
        f'to {self._workdir / _DAMAGED}; choose another --workdir to train '
        'from the start'
      )
    return found

  def _set_aside(self, error: Damaged, instead: str) -> None:
    folder = self._folder / str(error.step)
    target = _free_place(self._workdir, error.step)
    # Everyone has chosen `target` before the first process moves anything.
    distributed.barrier('restore')
    if jax.process_index() == 0:
      target.parent.mkdir(parents=True, exist_ok=True)
      folder.rename(target)
      journal.event('set_aside', step=error.step, reason=error.reason)
    _warn('%s; it is kept in %s, and %s', error, target, instead)
    distributed.barrier('restore')
    self.losses.pop(error.step, None)
    self._manager.reload()


def restore_params(
  workdir: Path,
  abstract_params: PyTree,
  step: int | None,
  max_host_gb: float = 0.0,
) -> tuple[int, PyTree]:
  """The step and the parameters alone, for those who only read.

  Nothing is moved: a run may be writing to the same folder.

  Args:
    workdir: the folder that holds `checkpoints`.
    abstract_params: jax.ShapeDtypeStruct leaves with shardings, on any mesh.
    step: which one; None takes the newest that is sound, and says so where
      that is not the newest.
    max_host_gb: of host memory, besides the arrays; 0: no limit.

  Raises:
    Damaged: `step` is.
    UserError: there is no checkpoint, or it holds another model.
  """
  if step is not None:
    folder = step_folder(workdir, step)
    return step, saved_step.restore(
      folder, abstract_params, 'params/', max_host_gb
    )
  damaged, found = _newest_sound(
    workdir, abstract_params, 'params/', None, max_host_gb
  )
  if found is not None:
    for error in damaged:
      _warn('%s; step %d is used instead', error, found[0])
    return found
  if damaged:
    raise UserError(f'{damaged[0]}; and no sound checkpoint is beside it')
  raise UserError(
    f'{epath.Path(workdir) / _CHECKPOINTS} holds no checkpoint; train first, '
    'or name another --workdir'
  )


def restore_until(
  workdir: Path, abstract_state: PyTree, last: int, max_host_gb: float = 0.0
) -> tuple[int, PyTree] | None:
  """The newest sound step up to `last`, and its state; None if there is none.

  For those who only read: nothing is moved.

  Args:
    workdir: the folder that holds `checkpoints`.
    abstract_state: jax.ShapeDtypeStruct leaves with shardings, on any mesh.
    last: the newest step that will do.
    max_host_gb: as in `restore_params`.

  Raises:
    UserError: it holds another model.
  """
  damaged, found = _newest_sound(workdir, abstract_state, '', last, max_host_gb)
  used = 'no step before it is sound'
  if found:
    used = f'step {found[0]} is used instead'
  for error in damaged:
    _warn('%s; %s', error, used)
  return found


def load_config(workdir: Path, step: int) -> Config:
  """The config that a checkpoint was trained with.

  Raises:
    Damaged: it is not the one that was saved.
  """
  folder = step_folder(workdir, step)
  return config_lib.resolve(
    saved_step.read_config(folder, saved_step.read_manifest(folder))
  )


def load_fingerprint(workdir: Path, step: int) -> str:
  """Of the data set that a checkpoint was trained on; '' if it says none."""
  return saved_step.read_manifest(step_folder(workdir, step)).get('data', '')


def saved_steps(workdir: Path) -> list[int]:
  """The steps in `workdir`, in order, sound or not."""
  folder = epath.Path(workdir) / _CHECKPOINTS
  names = [path.name for path in ocp.path.step.checkpoint_steps_paths(folder)]
  return sorted(int(name) for name in names if name.isdecimal())


def _newest_sound(
  workdir: Path,
  abstract: PyTree,
  prefix: str,
  last: int | None,
  max_host_gb: float,
) -> tuple[list[Damaged], tuple[int, PyTree] | None]:
  """The newest step, up to `last`, that can be restored; those that cannot."""
  damaged: list[Damaged] = []
  # One list: a run may be writing, and shared folders may lag behind.
  steps = distributed.exchange('restore', json.dumps(saved_steps(workdir)))[0]
  for step in reversed(json.loads(steps)):
    if last is not None and step > last:
      continue
    distributed.wait_for(lambda step=step: step in saved_steps(workdir))
    try:
      folder = step_folder(workdir, step)
      tree = saved_step.restore(folder, abstract, prefix, max_host_gb)
    except Damaged as error:
      damaged.append(error)
    else:
      return damaged, (step, tree)
  return damaged, None


def _free_place(workdir: epath.Path, step: int) -> epath.Path:
  places = (workdir / _DAMAGED / f'{step}-{n}' for n in itertools.count(1))
  return next(place for place in places if not place.exists())


def step_folder(workdir: Path, step: int) -> epath.Path:
  folder = paths.absolute(workdir) / _CHECKPOINTS
  if step not in (steps := saved_steps(workdir)):
    there = ', '.join(map(str, steps)) or 'none'
    raise UserError(f'{folder} has no step {step}; it has: {there}')
  return folder / str(step)


def _warn(message: str, *values: object) -> None:
  if jax.process_index() == 0:
    _log.warning(message, *values)
