"""One saved step on disk: what it says about itself, and reading it back.

Every step has a manifest in its _CHECKPOINT_METADATA: dtype, shape and
checksum of every array, the loss, digests of the config and of the data set,
the versions that wrote it; and a digest of all that. `restore` believes nothing
else.
"""

import contextlib
import errno
import gc
import hashlib
import json
import logging
import math
import os
import sys
import textwrap
import time
from collections.abc import Iterator, Mapping, Sequence
from importlib import metadata as package_metadata
from typing import Any

import jax
import numpy as np
import orbax.checkpoint as ocp
from absl import logging as absl_logging
from etils import epath

from perceiver_ar import distributed, host_memory
from perceiver_ar.checksums import PyTree, checksums, flatten, nest
from perceiver_ar.errors import PASSING, PassingError, UserError

# As TensorStore quotes them: of these a restore may die although the files are
# sound, and then the same may do again,
_AWAY = (
  *('RESOURCE_EXHAUSTED', 'UNAVAILABLE', 'DEADLINE_EXCEEDED', 'ABORTED'),
  *map(os.strerror, PASSING),
)
# or it takes somebody to allow it.
_FORBIDDEN = (
  *('PERMISSION_DENIED', 'UNAUTHENTICATED'),
  *('Forbidden', 'does not have storage'),  # as gcsfs says it
  *map(os.strerror, (errno.EACCES, errno.EPERM)),
)
_OF_FILES = (FileNotFoundError, NotADirectoryError, IsADirectoryError)
_PACKAGES = ('perceiver-ar', 'jax', 'flax', 'optax', 'orbax-checkpoint')


class Damaged(UserError):  # noqa: N818 (it is a state)
  """The files of a checkpoint are not those that were saved."""

  def __init__(self, folder: epath.Path, reason: str):
    super().__init__(f'checkpoint {folder} is damaged: {reason}')
    self.step = int(folder.name)
    self.reason = reason


def make_manifest(
  step: int, state: PyTree, config_json: Any, loss: float | None, data: str
) -> dict[str, Any]:
  arrays = flatten(state)
  distributed.collective(f'checksums of step {step}')
  sums = checksums(state)
  return {
    'step': step,
    # A loss that is not a number cannot be the best.
    'loss': loss if loss is not None and math.isfinite(loss) else None,
    'arrays': {
      name: [np.dtype(leaf.dtype).name, list(leaf.shape), sums[name]]
      for name, leaf in arrays.items()
    },
    'config_sha256': digest(config_json),
    'data': data,
    'versions': versions(),
  }


def versions() -> dict[str, str]:
  try:
    return {name: package_metadata.version(name) for name in _PACKAGES}
  except package_metadata.PackageNotFoundError as error:
    raise UserError(
      f'package {error.name} is not installed, and checkpoints name its '
      'version; install this project with pip install -e .'
    ) from error


def digest(value: Any) -> str:
  text = json.dumps(value, sort_keys=True, separators=(',', ':'))
  return hashlib.sha256(text.encode()).hexdigest()


def read_manifest(folder: epath.Path) -> dict[str, Any]:
  stored = _read_json(folder, '_CHECKPOINT_METADATA')
  try:
    manifest = stored['custom_metadata']['manifest']
    expected = stored['custom_metadata']['sha256']
  except (KeyError, TypeError) as error:
    raise Damaged(folder, '_CHECKPOINT_METADATA has no manifest') from error
  if digest(manifest) != expected:
    raise Damaged(folder, '_CHECKPOINT_METADATA does not match its digest')
  _check_manifest(folder, manifest)
  return manifest


def _check_manifest(folder: epath.Path, manifest: Any) -> None:
  """Raises Damaged if it is none: whoever wrote it wrote its digest, too."""
  try:
    step, loss, arrays = (manifest[k] for k in ('step', 'loss', 'arrays'))
    for name, (dtype, shape, checksum) in arrays.items():
      jax.ShapeDtypeStruct(shape, np.dtype(dtype))
      if not all(type(size) is int and 0 <= size < 2**48 for size in shape):
        raise ValueError(f'{name} has the shape {shape}')
      if type(checksum) is not str:
        raise ValueError(f'{name} has the checksum {checksum!r}')
    if loss is not None and type(loss) not in (int, float):
      raise ValueError(f'the loss {loss!r}')
    if type(manifest['config_sha256']) is not str:
      raise ValueError('the config has no digest')
  except Exception as error:  # whatever is there instead of numbers
    raise Damaged(
      folder, f'its manifest is none ({one_line(error)})'
    ) from error
  if step != int(folder.name):
    raise Damaged(folder, f'it was saved as step {step}')


def read_config(folder: epath.Path, manifest: Mapping[str, Any]) -> Any:
  value = _read_json(folder, 'config/metadata')
  if digest(value) != manifest['config_sha256']:
    raise Damaged(folder, 'config/metadata does not match its digest')
  return value


def _read_json(folder: epath.Path, name: str) -> Any:
  try:
    return json.loads((folder / name).read_text())
  except MemoryError:
    raise
  except Exception as error:  # whatever a disk, a bucket or JSON raises
    _check_damage(folder, error)
    raise Damaged(folder, f'{name}: {one_line(error)}') from error


def _check_damage(folder: epath.Path, error: Exception) -> None:
  """Raises unless the files themselves may be the cause."""
  if any(word in str(error) for word in _FORBIDDEN):
    raise UserError(
      f'{folder} may not be read ({one_line(error)}); allow it, and run again'
    ) from error
  # Of a bucket many have no number, and some are no OSError.
  is_away = isinstance(error, OSError) and not isinstance(error, _OF_FILES)
  code = getattr(error, 'code', None)
  is_away |= type(code) is int and (code == 429 or code >= 500)
  if is_away or any(word in str(error) for word in _AWAY):
    raise PassingError(
      f'{folder} cannot be read now ({one_line(error)}); run again when that '
      'is over'
    ) from error


def read_loss(folder: epath.Path) -> float | None:
  try:
    return read_manifest(folder)['loss']
  except Damaged:
    return None  # whoever restores or verifies it says why


# Restoring. Each process reads its own shards, and then all agree: a process
# that fails alone would leave the others waiting in the next collective.


def restore(
  folder: epath.Path,
  abstract: PyTree,
  prefix: str,
  max_host_gb: float = 0.0,
  *,
  partial: bool = False,
) -> PyTree:
  """The arrays below `prefix`, checked against the manifest.

  With `max_host_gb` few are read at a time; 0: as many as Orbax likes. With
  `partial` there may be others below `prefix`, which are not read.
  """
  wanted = {prefix + k: v for k, v in flatten(abstract).items()}
  try:
    manifest = read_manifest(folder)
    read_config(folder, manifest)
    reason = ''
  except Damaged as error:
    manifest, reason = {}, error.reason
  _agree(folder, reason)
  saved = {k: v for k, v in manifest['arrays'].items() if k.startswith(prefix)}
  if partial:
    saved = {k: v for k, v in saved.items() if k in wanted}
  _check_same_arrays(folder, saved, wanted)
  try:
    arrays = _read_arrays(folder, wanted, max_host_gb)
  except Damaged as error:
    arrays, reason = {}, error.reason
  _agree(folder, reason)
  distributed.collective(f'checksums of {folder.name}, read')
  found = checksums(arrays)
  bad = [name for name in wanted if found[name] != saved[name][2]]
  if bad:
    raise Damaged(
      folder,
      f'the contents of {bad[0]} are not what was saved'
      + (f', nor those of {len(bad) - 1} more arrays' if bad[1:] else ''),
    )
  leaves = [arrays[name] for name in wanted]
  return jax.tree.unflatten(jax.tree.structure(abstract), leaves)


def _read_arrays(
  folder: epath.Path,
  wanted: Mapping[str, jax.ShapeDtypeStruct],
  max_host_gb: float,
) -> dict[str, jax.Array]:
  abstract = nest(wanted)
  args = ocp.args.PyTreeRestore(
    abstract,
    restore_args=ocp.checkpoint_utils.construct_restore_args(abstract),
    partial_restore=True,
  )
  with _quiet_failure(folder) as failure:
    # The handler alone: a Checkpointer would wait for the other processes.
    handler = host_memory.reader(folder / 'state', wanted, max_host_gb)
    restored = handler.restore(folder / 'state', args=args)
    arrays = flatten(restored)
    jax.block_until_ready(arrays)
  if failure:
    raise Damaged(folder, f'its arrays cannot be read ({failure[0]})')
  for name, leaf in wanted.items():
    array = arrays.get(name)
    if (
      not isinstance(array, jax.Array)
      or array.shape != leaf.shape
      or array.dtype != leaf.dtype
    ):
      raise Damaged(folder, f'{name} is missing or of another shape or dtype')
  return {name: arrays[name] for name in wanted}


@contextlib.contextmanager
def _quiet_failure(folder: epath.Path) -> Iterator[list[str]]:
  """Yields a list that ends up with the reason why the files are unreadable.

  Orbax reads with many coroutines and abandons them all when one fails. Each
  would print a page about itself, now or when it is garbage collected.
  """
  failure: list[str] = []
  complaints = []
  complain, sys.unraisablehook = sys.unraisablehook, complaints.append
  asyncio_log = logging.getLogger('asyncio')
  try:
    try:
      yield failure
    except (MemoryError, jax.errors.JaxRuntimeError):
      raise
    except Exception as error:  # whatever the readers of five formats raise
      _check_damage(folder, error)
      failure.append(one_line(error))
    if failure:
      complaints.clear()
      asyncio_log.disabled = True
      time.sleep(0.1)  # until the reads that are under way have ended
      gc.collect()
      complaints.clear()
  finally:
    asyncio_log.disabled = False
    sys.unraisablehook = complain
    for complaint in complaints:
      complain(complaint)


def _check_same_arrays(
  folder: epath.Path,
  saved: Mapping[str, Sequence[Any]],
  wanted: Mapping[str, jax.ShapeDtypeStruct],
) -> None:
  """Raises UserError unless names, shapes and dtypes are the same."""
  differ = []
  for name in sorted({*saved, *wanted}):
    old = _describe(*saved[name][:2]) if name in saved else 'absent'
    leaf = wanted.get(name)
    new = _describe(leaf.dtype, leaf.shape) if leaf is not None else 'absent'
    if old != new:
      differ.append(f'{name} is {old} there and {new} here')
  if differ:
    raise UserError(
      f'checkpoint {folder} holds another model ({len(differ)} arrays differ: '
      f'{"; ".join(differ[:3])}); use the config that it was trained with'
    )


def _describe(dtype: Any, shape: Sequence[int]) -> str:
  return f'{np.dtype(dtype).name}[{",".join(map(str, shape))}]'


def _agree(folder: epath.Path, reason: str) -> None:
  """Raises Damaged on every process if any of them has a reason."""
  reasons = distributed.exchange('restore', reason)
  for process, other in enumerate(reasons):
    if other and not reason:
      reason = f'process {distributed.name_of(process)} found: {other}'
  if reason:
    raise Damaged(folder, reason)


def shorten_complaints() -> None:
  """Each thread of Orbax has a page for what ends in one sentence of ours."""
  absl_logging.get_absl_logger().addFilter(_shorten)


def _shorten(record: logging.LogRecord) -> bool:
  if 'orbax' in record.pathname and record.levelno >= logging.ERROR:
    record.exc_info = None
    record.msg, record.args = textwrap.shorten(record.getMessage(), 160), ()
  return True


def one_line(error: BaseException) -> str:
  """The innermost cause, without TensorStore's page of specification."""
  while error.__cause__ is not None:
    error = error.__cause__
  text = ' '.join(str(error).split()).split(' [tensorstore_spec')[0]
  if len(text) > 300:
    text = f'{text[:100]} ... {text[-200:]}'
  return f'{type(error).__name__}: {text}'
