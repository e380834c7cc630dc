"""What a process holds in host memory while it saves or restores.

A budget (`checkpoint.max_host_gb`) is spent on what Orbax was seen to need.
Saving, that is a host copy of the arrays and, while they are written, their
encoded chunks, which may be as large. A state of which both fit is copied at
once, and written while training goes on. A larger one is saved in parts, two
of which and the chunks of one are held at a time, and training waits: its next
step would overwrite what is not copied yet. Restoring, an array that is being
read takes up to three times its size.

An array that is larger than a part is a part by itself.
"""

import collections
import contextlib
import ctypes
import logging
import math
import pathlib
import time
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, cast

import jax
import orbax.checkpoint as ocp
from etils import epath
from orbax.checkpoint._src.metadata import array_metadata_store

# Where Orbax's own documentation imports it from.
from orbax.checkpoint._src.serialization import types as serialization

from perceiver_ar import distributed

_GB = 10**9
# Of the budget, what is moved at a time: three such, and buffers.
_PART = 1 / 4
# Files, and the chunks of which large arrays consist in them, are whole in the
# memory of their writer; the 2 GiB that Orbax likes would suit few budgets.
_FILE_BYTES = 2**28
# What threads, caches and compiling took, whatever the budget.
_OVERHEAD_BYTES = 250_000_000
_M_MMAP_THRESHOLD = -3  # as malloc.h has it
_PROC = pathlib.Path('/proc/self')
_log = logging.getLogger(__name__)


class Meter:
  """What has become of this process since the meter was made."""

  def __init__(self) -> None:
    self._since = time.monotonic() - distributed.waited()
    self._start = _status('VmRSS')
    # Forgets earlier peaks; where that is refused, growth is an upper bound.
    with contextlib.suppress(OSError):
      (_PROC / 'clear_refs').write_text('5')

  def seconds(self) -> float:
    """Without those at barriers: others being late is no matter of ours."""
    return time.monotonic() - distributed.waited() - self._since

  def growth(self) -> int | None:
    """By how many bytes, at its largest; None where there is no /proc."""
    peak = _status('VmHWM')
    if self._start is None or peak is None:
      return None
    return max(0, peak - self._start)


def _status(name: str) -> int | None:
  try:
    lines = (_PROC / 'status').read_text().splitlines()
  except OSError:
    return None
  sizes = [line.split()[1] for line in lines if line.startswith(f'{name}:')]
  return int(sizes[0]) * 1024 if sizes else None


def warn_above(what: str, growth: int | None, max_gb: float) -> None:
  """Says so if `growth` bytes are clearly more than the budget."""
  if not max_gb or growth is None:
    return
  if growth > max_gb * _GB + _OVERHEAD_BYTES:
    _log.warning(
      '%s took %.3g GB of the memory of this host, more than '
      'checkpoint.max_host_gb %g',
      *(what, growth / _GB, max_gb),
    )


def at_rest(arrays: Iterable[jax.Array]) -> int:
  """Bytes of this process's arrays that are in host memory, not on a device."""
  shards = [shard for array in arrays for shard in array.addressable_shards]
  return sum(
    shard.data.nbytes
    for shard in shards
    if shard.device.platform == 'cpu'
    or shard.data.sharding.memory_kind == 'pinned_host'
  )


def fits(arrays: Mapping[str, jax.Array], max_gb: float) -> bool:
  """Whether they can be saved at once: the same on every process."""
  if not max_gb:
    return True
  held = {name: _held(array) for name, array in arrays.items()}
  total, part = sum(held.values()), max_gb * _PART * _GB
  if 2 * total <= max_gb * _GB:
    return True
  largest = max(held, key=lambda name: held[name])
  alone = ''
  if held[largest] > part:
    alone = f' and, by itself, {largest} of {held[largest] / _GB:.3g} GB'
  if jax.process_index() == 0:
    _log.warning(
      'saving %.3g GB at once takes twice that of the memory of a host, more '
      'than checkpoint.max_host_gb %g: it is done in parts of %.3g GB%s, and '
      'training waits for them',
      *(total / _GB, max_gb, part / _GB, alone),
    )
  return False


def _held(array: jax.Array) -> float:
  """Bytes of it that pass through the host with most of its devices.

  Each device saves its share, those with the same values too.
  """
  devices = array.sharding.device_set
  counts = collections.Counter(device.process_index for device in devices)
  return array.nbytes * max(counts.values()) / len(devices)


class _InParts(serialization.DefaultSerializationStatusCallback):
  """Arrays wait for room before they are copied.

  The limit alone changes nothing, nor does Orbax 0.12's own
  `is_prioritized_key_fn`, which nobody reads.
  """

  def key_priority(self, path: Sequence[Any]) -> serialization.TransferPriority:
    if len(path) == 1:  # step and counts; with none at once Orbax warns
      return serialization.TransferPriority.SYNCHRONOUS
    return serialization.TransferPriority.ASYNCHRONOUS_DEPRIORITIZED


def writer(max_gb: float, *, in_parts: bool) -> ocp.PyTreeCheckpointHandler:
  """Saves arrays at once, or in parts of which three are within the budget."""
  if not in_parts:
    return ocp.PyTreeCheckpointHandler()
  _give_back_what_is_freed()
  arrays = ocp.type_handlers.ArrayHandler(
    array_metadata_store=array_metadata_store.Store(), callback=_InParts()
  )
  return ocp.PyTreeCheckpointHandler(
    save_device_host_concurrent_gb=cast(Any, max_gb * _PART),
    type_handler_registry=ocp.type_handlers.create_type_handler_registry(
      (jax.Array, arrays)
    ),
    # Otherwise every array keeps its copy on the host for as long as it lives.
    enable_pinned_host_transfer=jax.default_backend() != 'cpu',
  )


def _give_back_what_is_freed() -> None:
  """Large buffers go back to the system at once.

  glibc would keep some in the pools of its threads, up to a few times what the
  budget of a save is. A CPU's own arrays are such buffers, and would be slower.
  """
  if jax.default_backend() == 'cpu':
    return
  with contextlib.suppress(AttributeError, TypeError, OSError):  # no glibc
    ctypes.CDLL(None).mallopt(_M_MMAP_THRESHOLD, 2**20)


def file_bytes(max_gb: float) -> int | None:
  """How large the files of a state may be; None: as Orbax likes."""
  return min(_FILE_BYTES, math.ceil(max_gb * _GB / 8)) if max_gb else None


def reader(
  folder: epath.Path, wanted: Mapping[str, jax.ShapeDtypeStruct], max_gb: float
) -> ocp.PyTreeCheckpointHandler:
  """Reads so few arrays at a time that three times their size is in the budget.

  Args:
    folder: of the arrays.
    wanted: by their path.
    max_gb: 0: no limit.
  """
  handler = ocp.PyTreeCheckpointHandler()
  if not max_gb:
    return handler
  _give_back_what_is_freed()
  stored, _ = jax.tree_util.tree_flatten_with_path(
    handler.metadata(folder).tree, is_leaf=lambda x: hasattr(x, 'storage')
  )
  read = [
    _read_bytes(wanted[name], leaf.storage.chunk_shape)
    for path, leaf in stored
    if (name := jax.tree_util.keystr(path, simple=True, separator='/'))
    in wanted
  ]
  # Orbax refuses, rather than to read alone, what is not below its limit.
  limit = max([max_gb * _PART, *(1.001 * size / _GB for size in read)])
  return ocp.PyTreeCheckpointHandler(restore_concurrent_gb=cast(Any, limit))


def _read_bytes(array: jax.ShapeDtypeStruct, chunks: Sequence[int]) -> int:
  """Of whole chunks, what is read for the largest shard of this process."""
  sharding = array.sharding
  assert isinstance(sharding, jax.sharding.Sharding)
  places = sharding.addressable_devices_indices_map(array.shape).values()
  return max(
    array.dtype.itemsize
    * math.prod(
      chunk * (-(-stop // chunk) - start // chunk)
      for place, size, chunk in zip(index, array.shape, chunks, strict=True)
      for start, stop, _ in [place.indices(size)]
    )
    for index in places
    if index is not None
  )
