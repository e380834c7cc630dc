"""Silent corruption: copies of an array that are no longer the same.

What the mesh does not split is on many devices, which all update it alike.
When a chip computes wrongly or its memory loses a bit, its copy differs from
then on. Every so many steps the devices hash what they hold, and the hashes of
copies are compared. A state is also compared before it is saved: of an array
one copy is written, and whether it was the right one could not be told later.
"""

import collections
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar import distributed, partitioning
from perceiver_ar.checksums import PyTree, checksum, flatten
from perceiver_ar.errors import CorruptionError

_SHOWN = 3  # devices that are named


class Replicas:
  """Compares the replicas of a state; nobody waits for it but a save."""

  def __init__(self, state: PyTree, mesh: Mesh, *, every: int, step: int):
    """Compiles what it needs.

    Args:
      state: arrays, or their shapes and shardings. What rests in the memory
        of the host is not compared.
      mesh: of all of them.
      every: so many steps `send` does something; with 0 nothing ever does.
      step: of `state`, which is taken to be sound.
    """
    self._mesh, self._every, self._sound = mesh, every, step
    self._sent: tuple[int, jax.Array] | None = None
    self._names: list[str] = []
    if not every:
      return
    arrays = {
      name: leaf
      for name, leaf in flatten(state).items()
      if _has_replicas(leaf.sharding)
    }
    if not arrays:
      return
    self._names = list(arrays)
    shardings = [leaf.sharding for leaf in arrays.values()]
    self._twins_DL = np.stack([_twins(x) for x in shardings], axis=-1)
    specs = [x.spec for x in shardings]
    leaves = list(arrays.values())
    self._hash = _make_hash(mesh, specs).lower(leaves).compile()

  def send(self, step: int, state: PyTree) -> None:
    """Lets the devices hash `state`, if it is time, for a `read` later."""
    if self._names and step % self._every == 0:
      self._start(step, state)

  def check(self, step: int, state: PyTree) -> None:
    """Compares now; raises as `read` does."""
    if self._names and step != self._sound:
      self._start(step, state)
      self.read()

  def _start(self, step: int, state: PyTree) -> None:
    arrays = flatten(state)
    distributed.collective(f'hashes of copies at step {step}')
    self._sent = step, self._hash([arrays[name] for name in self._names])

  def read(self) -> None:
    """Waits for what was sent, if anything was.

    Raises:
      CorruptionError: replicas differ; on all processes alike.
    """
    if self._sent is None:
      return
    step, hashes = self._sent
    self._sent = None
    hashes_DL2 = np.asarray(hashes).astype(np.uint64)
    hashes_DL = hashes_DL2[..., 0] << 32 | hashes_DL2[..., 1]
    twins_DL = np.take_along_axis(hashes_DL, self._twins_DL, axis=0)
    if (bad_L := (hashes_DL != twins_DL).any(axis=0)).any():
      raise CorruptionError(self._sentence(step, hashes_DL, bad_L))
    self._sound = step

  def _sentence(
    self, step: int, hashes_DL: np.ndarray, bad_L: np.ndarray
  ) -> str:
    first, num = int(bad_L.argmax()), int(bad_L.sum())
    odd, is_sure = odd_ones(hashes_DL[:, first], self._twins_DL[:, first])
    named = ' and '.join(self._name(at) for at in odd[:_SHOWN])
    if odd[_SHOWN:]:
      named += f' and {len(odd) - _SHOWN} more'
    what = self._names[first]
    others = f', and so are {num - 1} more arrays' if num > 1 else ''
    how = (
      f'is on {named} other than on most devices that have it{others}'
      if is_sure
      else f'is not the same on {named}{others}; most do not agree, so that '
      'there is no telling which is right'
    )
    return (
      f'silent corruption, found at step {step}: {what} {how}. All devices '
      f'agreed at step {self._sound}: checkpoints up to there are not in '
      'doubt, and none was saved since; run again to go on from the newest, '
      'without a device that is named again'
    )

  def _name(self, at: int) -> str:
    device = self._mesh.devices.flat[at]
    process = distributed.name_of(device.process_index)
    return f'device {device.id} ({device.device_kind}) of process {process}'


def uncompared(params: PyTree, every: int) -> str:
  """Says which parameters `Replicas` cannot compare; '' if none.

  Args:
    params: arrays, or their shapes and shardings.
    every: of `Replicas`.
  """
  leaves = jax.tree.leaves(params)
  single = sum(x.size for x in leaves if not _has_replicas(x.sharding))
  is_alone = all(x.sharding.mesh.size == 1 for x in leaves)
  if not every or not single or is_alone:
    return ''
  total = sum(x.size for x in leaves)
  return (
    f'silent corruption would go unseen in {single:,} of {total:,} parameters: '
    'the mesh has one copy of them, and train.check_replicas_every compares '
    'copies'
  )


def odd_ones(
  hashes_D: np.ndarray, twins_D: np.ndarray
) -> tuple[list[int], bool]:
  """The devices at fault, and whether that is sure.

  It is where more than half of the holders of a shard agree; else all of its
  holders are returned.

  Args:
    hashes_D: of one array, by device.
    twins_D: the first device that holds the same shard.
  """
  odd: list[int] = []
  is_sure = True
  for twin in np.unique(twins_D):
    holders = np.flatnonzero(twins_D == twin).tolist()
    found = collections.Counter(hashes_D[holders].tolist())
    usual, num = found.most_common(1)[0]
    if 2 * num > len(holders):
      odd += [at for at in holders if hashes_D[at] != usual]
    else:
      odd, is_sure = odd + holders, False
  return odd, is_sure


def _make_hash(mesh: Mesh, specs: list[PartitionSpec]) -> Any:
  """Arrays -> the hashes of their shards on every device, [D, L, 2]."""

  def local(shards: list[jax.Array]) -> jax.Array:
    return jnp.stack([checksum(shard) for shard in shards])[None]

  gathered = jax.shard_map(
    local,
    mesh=mesh,
    in_specs=(specs,),
    out_specs=PartitionSpec(mesh.axis_names),
    check_vma=False,  # it takes what is replicated to be the same
  )
  return jax.jit(gathered, out_shardings=partitioning.replicated(mesh))


def _has_replicas(sharding: NamedSharding) -> bool:
  """On devices: what is offloaded has its hashes in checkpoints only."""
  if sharding.memory_kind == 'pinned_host':
    return False
  return len(np.unique(_twins(sharding))) < sharding.mesh.size


def _twins(sharding: NamedSharding) -> np.ndarray:
  """Of every device the first that holds the same shard, [D]."""
  mesh = sharding.mesh
  used = {a for entry in sharding.spec for a in partitioning.axes_of(entry)}
  whole = [i for i, name in enumerate(mesh.axis_names) if name not in used]
  index = np.arange(mesh.size).reshape(tuple(mesh.shape.values()))
  first = index.min(axis=tuple(whole), keepdims=True)
  return np.broadcast_to(first, index.shape).ravel()
