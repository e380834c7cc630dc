"""Where arrays live: the mesh, and rules from logical axes to its axes.

Models name the axes of their parameters ('embed', 'heads', ...). A set of
rules maps these names to mesh axes. Linen could apply rules, but would not
check them: it replicates an axis without a rule, drops a mesh axis that is used
twice, and takes names of the wrong number. All of that is refused here.
"""

import dataclasses
import functools
import math
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import numpy as np
import optax
from flax import linen as nn
from jax.experimental import mesh_utils
from jax.sharding import (
  AbstractMesh,
  AxisType,
  Mesh,
  NamedSharding,
  PartitionSpec,
)

from perceiver_ar.config import MESH_AXES, MeshConfig
from perceiver_ar.errors import UserError

BATCH_AXES = ('slice', 'data')

Rules = Mapping[str, str | tuple[str, ...] | None]
AnyMesh = Mesh | AbstractMesh

_UNSHARDED: Rules = dict.fromkeys(
  (
    *('embed', 'latent_embed', 'heads', 'kv', 'mlp'),
    *('vocab', 'positions', 'layers', 'norm'),
  )
)
_FSDP: Rules = {'embed': 'data'}
_TENSOR: Rules = {'heads': 'model', 'mlp': 'model', 'latent_embed': 'model'}
# Apart, because the 259 ids of bytes divide by nothing.
_VOCAB: Rules = {'vocab': 'model'}
# Parameters split further, for gathers of them over `context` in every layer.
_CONTEXT: Rules = {'embed': ('data', 'context')}
_SETS: dict[str, Rules] = {
  'replicated': {},
  'fsdp': _FSDP,
  'tensor': _TENSOR,
  'fsdp_tensor': {**_FSDP, **_TENSOR},
  'fsdp_tensor_vocab': {**_FSDP, **_TENSOR, **_VOCAB},
  'context': {**_CONTEXT, **_TENSOR},
}
# Elements (64 MiB of float32) from which on a parameter must be sharded, if
# the rules shard parameters at all.
_LARGE = 2**24


def parameter_rules(name: str) -> Rules:
  if name not in _SETS:
    raise UserError(
      f'mesh.rules {name!r} does not exist; use one of {", ".join(_SETS)}'
    )
  return {**_UNSHARDED, **_SETS[name]}


def splits_parameters(name: str, axis: str) -> bool:
  """Whether the rules of that name split any over a mesh axis."""
  return any(axis in axes_of(x) for x in parameter_rules(name).values())


def axes_of(entry: Any) -> tuple[str, ...]:
  """The mesh axes of an entry of rules, or of a PartitionSpec."""
  return (entry,) if isinstance(entry, str) else tuple(entry or ())


def num_parts(mesh: AnyMesh, axes: Sequence[str]) -> int:
  """How many parts these axes make together."""
  return math.prod(mesh.shape[axis] for axis in axes)


def num_input_parts(mesh: Mesh) -> int:
  """Over how many devices the inputs of a pass are spread."""
  return num_parts(mesh, (*BATCH_AXES, 'context'))


def make_mesh(config: MeshConfig, devices: Sequence[Any]) -> Mesh:
  """The devices as slice x data x context x model; -1 takes what is left.

  Raises:
    UserError: the sizes do not multiply to the number of devices.
  """
  sizes = [getattr(config, axis) for axis in MESH_AXES]
  asked = ' x '.join(f'{axis} {getattr(config, axis)}' for axis in MESH_AXES)
  fixed = math.prod(size for size in sizes if size != -1)
  if sizes.count(-1) > 1 or any(size < 1 and size != -1 for size in sizes):
    raise UserError(
      f'mesh {asked}: sizes must be positive, and at most one may be -1'
    )
  if len(devices) % fixed or (-1 not in sizes and fixed != len(devices)):
    raise UserError(
      f'mesh {asked} does not fit {len(devices)} devices; its sizes must '
      f'multiply to {len(devices)}, or one of them be -1'
    )
  shape = [len(devices) // fixed if size == -1 else size for size in sizes]
  return Mesh(
    _arrange(shape, devices),
    MESH_AXES,
    axis_types=(AxisType.Auto,) * len(MESH_AXES),
  )


def _arrange(shape: Sequence[int], devices: Sequence[Any]) -> np.ndarray:
  """Neighbours in the mesh are neighbours in the machine, where it says so.

  Raises:
    UserError: the slice axis is not as long as there are TPU slices.
  """
  if devices[0].platform != 'tpu':
    return np.asarray(devices).reshape(shape)
  num_slices = len({getattr(d, 'slice_index', 0) for d in devices})
  if shape[0] != num_slices:
    raise UserError(
      f'mesh.slice is {shape[0]}, and the devices are of {num_slices} slices; '
      f'set mesh.slice={num_slices}'
    )
  if num_slices == 1:
    return mesh_utils.create_device_mesh(
      shape, devices, allow_split_physical_axes=True
    )
  return mesh_utils.create_hybrid_device_mesh(
    [1, *shape[1:]],
    [num_slices, 1, 1, 1],
    devices,
    allow_split_physical_axes=True,
  )


def parameter_shardings(boxed: Any, mesh: AnyMesh, rules: Rules) -> Any:
  """A sharding for every parameter of an abstract, boxed tree, unboxed.

  Raises:
    UserError: an axis has no rule or no mesh axis to go to, is sharded twice,
      is not divisible, or a large parameter stays whole; the sentence names
      the parameter.
  """

  def one(path: Any, leaf: Any) -> NamedSharding:
    name = '/'.join(str(key.key) for key in path)
    assert isinstance(leaf, nn.LogicallyPartitioned), f'{name} has no axes'
    spec = _spec(name, leaf.value.shape, leaf.names, mesh, rules)
    return NamedSharding(mesh, spec)

  return jax.tree_util.tree_map_with_path(
    one, boxed, is_leaf=lambda x: isinstance(x, nn.LogicallyPartitioned)
  )


def _spec(
  name: str,
  shape: tuple[int, ...],
  axes: Sequence[str | None],
  mesh: AnyMesh,
  rules: Rules,
) -> PartitionSpec:
  if len(axes) != len(shape):
    raise UserError(
      f'{name} has shape {shape} and {len(axes)} logical axes {tuple(axes)}; '
      'name one per dimension'
    )
  if missing := [axis for axis in axes if axis not in rules]:
    raise UserError(
      f'{name}: no rule for logical axis {missing[0]!r}; add it to '
      'partitioning.py'
    )
  entries = [rules[axis] for axis in axes if axis is not None]
  used: set[str] = set()
  for axis, size, entry in zip(axes, shape, entries, strict=True):
    over = axes_of(entry)
    if unknown := set(over) - set(mesh.axis_names):
      raise UserError(
        f'{name}: logical axis {axis!r} goes to {sorted(unknown)[0]!r}, and '
        f'the mesh has {", ".join(mesh.axis_names)}'
      )
    if used & set(over):
      raise UserError(
        f'{name}: logical axes {tuple(axes)} use mesh axis '
        f'{sorted(used & set(over))[0]!r} twice; give one of them another rule'
      )
    used |= set(over)
    ways = num_parts(mesh, over)
    if size % ways:
      raise UserError(
        f'{name}: axis {axis!r} of size {size} is not divisible by mesh axis '
        f'{"*".join(over)} of size {ways}; change the size, the mesh or '
        'mesh.rules'
      )
  _check_sharded(name, shape, axes, mesh, rules)
  return PartitionSpec(*entries)


def _check_sharded(
  name: str,
  shape: tuple[int, ...],
  axes: Sequence[str | None],
  mesh: AnyMesh,
  rules: Rules,
) -> None:
  """Under rules that shard parameters, a large one must not be left whole."""

  def is_split(rules: Rules) -> bool:
    ways = [num_parts(mesh, axes_of(rules.get(str(axis)))) for axis in axes]
    return any(w > 1 and n % w == 0 for n, w in zip(shape, ways, strict=True))

  is_meant = mesh.size == 1 or not any(rules.values())
  if not is_meant and not is_split(rules) and math.prod(shape) >= _LARGE:
    better = [f'mesh.rules={x}, ' for x, r in _SETS.items() if is_split(r)]
    raise UserError(
      f'{name} with {math.prod(shape):,} elements is left whole on every '
      f'device; use {"".join(better[:1])}a mesh that its rules shard over, or '
      'mesh.rules=replicated if that is meant'
    )


def optimizer_shardings(
  optimizer: optax.GradientTransformation,
  abstract_params: Any,
  shardings: Any,
  mesh: Mesh,
) -> Any:
  """Moments live with their parameters; counts and factors on every device."""
  whole = replicated(mesh)
  return optax.tree.map_params(
    optimizer,
    lambda moment, param, sharding: (
      sharding if moment.shape == param.shape else whole
    ),
    jax.eval_shape(optimizer.init, abstract_params),
    abstract_params,
    shardings,
    transform_non_params=lambda _: whole,
  )


def batch_sharding(mesh: Mesh) -> NamedSharding:
  """Rows over slice and data."""
  return NamedSharding(mesh, PartitionSpec(BATCH_AXES))


def replicated(mesh: Mesh) -> NamedSharding:
  return NamedSharding(mesh, PartitionSpec())


@dataclasses.dataclass(frozen=True)
class HostRows:
  """The rows of a global batch that this process loads.

  Attributes:
    rows_b: those that the process's devices hold, in order. Processes hold the
      same ones where the context or model axis spans them.
    own_b: of these, which no process before it holds: every row is one
      process's own.
  """

  rows_b: np.ndarray
  own_b: np.ndarray


@functools.cache
def host_rows(mesh: Mesh, total: int) -> HostRows:
  """Which rows of a batch of `total` this process loads."""
  holders: dict[int, set[int]] = {}
  shards = batch_sharding(mesh).devices_indices_map((total,))
  for device, (rows,) in shards.items():
    for row in range(*rows.indices(total)):
      holders.setdefault(row, set()).add(device.process_index)
  me = jax.process_index()
  rows = sorted(row for row, held in holders.items() if me in held)
  own = [min(holders[row]) == me for row in rows]
  return HostRows(np.array(rows), np.array(own))


def global_batch(
  batch: Mapping[str, np.ndarray], mesh: Mesh, total: int
) -> dict[str, Any]:
  """This process's `host_rows` as global arrays of `total` rows, sharded."""
  sharding, rows = batch_sharding(mesh), host_rows(mesh, total)

  def place(local: np.ndarray) -> jax.Array:
    def shard(index: Any) -> np.ndarray:
      first, end, _ = index[0].indices(total)
      at = int(np.searchsorted(rows.rows_b, first))
      return local[at : at + end - first]

    shape = (total, *local.shape[1:])
    return jax.make_array_from_callback(shape, sharding, shard)

  return {name: place(local) for name, local in batch.items()}
