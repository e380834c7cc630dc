"""What a step sends: by mesh axis, kind of collective and phase of the model.

A device's number in a module's replica groups is its place in the mesh, so the
axes along which a group's places differ are the axes that it goes over. Bytes
are those that one device sends in a ring, the sum over a whole step.
"""

import collections
import dataclasses
import math
import re
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from jax.sharding import Mesh

from perceiver_ar.chips import Chip
from perceiver_ar.plan.hlo import Instruction, Module

KINDS = (
  'all-reduce',
  'all-gather',
  'reduce-scatter',
  'all-to-all',
  'ragged-all-to-all',
  'collective-permute',
  'collective-broadcast',
)
# How slices exchange: by their hosts, and what they meet for.
_BETWEEN_SLICES = re.compile(r'_xla_megascale_transfer_type="(\w+)"')
_CHANNEL = re.compile(r'channel_id=(\d+)')
_LITERAL = re.compile(
  r'(?:replica_groups|source_target_pairs)=\{((?:\{[\d,]*\},?)*)\}'
)
_TILES = r'\[([\d,]+)\](?:T\(([\d,]+)\))?'  # numbers in order, transposed
_IOTA = re.compile(rf'replica_groups=\[([\d,]+)\]<={_TILES}')
# The compiler's own mesh, its devices if out of order, and axes of it.
_AXES = re.compile(
  r'replica_groups=mesh\[([^\]]+)\](?:, device_ids=\(([^ ]+)\))? \{([^}]*)\}'
)
_AXIS = re.compile(r"'([^']+)'(?::\((\d+)\)(\d+))?")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Collective:
  """All collectives of one kind, axis, network and phase in a step.

  Attributes:
    kind: XLA's name.
    axis: of the mesh; several are joined by '+'.
    network: 'ici' within a slice, 'dcn' between slices.
    phase: 'input', 'latent', 'gradient' (sums over the batch, but for those of
      the input phase after every microbatch) or 'optimizer' (with gathers of
      whole parameters for several microbatches).
    bytes: that one device sends in a step.
    count: how many of them run in a step.
    seconds: that they take at the network's full bandwidth.
  """

  kind: str
  axis: str
  network: str
  phase: str
  bytes: int
  count: int
  seconds: float


class _Found(NamedTuple):
  """One collective of the text; `operand_bytes` are what a device brings."""

  attributes: str
  kind: str
  phase: str
  operand_bytes: int
  times: int


def parse_groups(attributes: str, num_devices: int) -> list[list[int]]:
  """Replica groups, or the pairs of a permutation, as places in the mesh."""
  if found := _AXES.search(attributes):
    return _groups_of_axes(found[1], found[2], found[3])
  if found := _IOTA.search(attributes):
    shape = _ints(found[1])
    return _places(found[2], found[3]).reshape(shape[0], -1).tolist()
  found = _LITERAL.search(attributes)
  assert found, f'replica groups of another form: {attributes[:200]}'
  groups = re.findall(r'\{([\d,]+)\}', found[1])
  return [_ints(group) for group in groups] or [list(range(num_devices))]


def _groups_of_axes(mesh: str, ids: str | None, axes: str) -> list[list[int]]:
  """Groups along some axes, or parts of axes, of a mesh of the compiler's.

  A part such as 'a':(2)4 is the dimension of size 4 behind one of size 2 of
  axis `a`.
  """
  sizes = {name: int(size) for name, size in re.findall(r"'(.*?)'=(\d+)", mesh)}
  asked = collections.defaultdict(list)
  for name, before, own in _AXIS.findall(axes):
    asked[name].append((int(before or 1), int(own or sizes[name])))
  shape: list[int] = []
  along: list[int] = []
  for name, size in sizes.items():
    done = 1
    for before, own in sorted(asked[name]):
      along.append(len(shape) + 1)
      shape += [before // done, own]
      done = before * own
    shape.append(size // done)
  places = np.arange(math.prod(shape))
  if ids:
    tiles = re.fullmatch(_TILES, ids)
    places = _places(*tiles.groups()) if tiles else np.array(_ints(ids))
  rest = [dim for dim in range(len(shape)) if dim not in along]
  num = math.prod(shape[dim] for dim in rest)
  ordered = places.reshape(shape).transpose([*rest, *along])
  return ordered.reshape(num, -1).tolist()


def _places(dims: str, order: str | None) -> np.ndarray:
  shape = _ints(dims)
  places = np.arange(math.prod(shape)).reshape(shape)
  return places.transpose(_ints(order)) if order else places


def _ints(text: str) -> list[int]:
  return [int(word) for word in text.split(',')]


def phase(op_name: str) -> str:
  """The part of the step that an instruction's scopes name."""
  if re.search(r'[/.(]layers\b', op_name):
    return 'latent'
  if re.search(
    r'\b(ids|cross|embed|to_latents|merge)\b|_inputs|_circle', op_name
  ):
    return 'input'
  if re.search(r'PerceiverAR\.encode(?!\)*/while/)', op_name):
    return 'input'
  if re.search(r'/gradient/', op_name):
    return 'gradient'
  if re.search(r'PerceiverAR|jvp\(|\b(norm|logits)\b', op_name):
    return 'latent'
  return 'optimizer'


def sent_bytes(kind: str, operand_bytes: int, size: int) -> float:
  """What a device of a ring of `size` sends, given what it brings."""
  if kind == 'collective-permute':
    return operand_bytes
  if kind == 'all-gather':
    return operand_bytes * (size - 1)
  share = operand_bytes * (size - 1) / size
  return 2 * share if kind == 'all-reduce' else share


def collect(
  module: Module, mesh: Mesh, chip: Chip, default_trips: int
) -> list[Collective]:
  """All collectives of a step, the costliest first."""
  totals: dict[tuple[str, ...], list[float]] = collections.defaultdict(
    lambda: [0.0, 0.0, 0.0]
  )
  for found in _found(module, default_trips):
    for network, axis, num_bytes, rate in _ways(found, module, mesh, chip):
      where = found.phase
      if where == 'gradient' and 'model' in axis:  # of activations
        where = 'latent'
      total = totals[found.kind, axis, network, where]
      for i, value in enumerate((num_bytes, 1, num_bytes / rate)):
        total[i] += found.times * value
  rows = [
    Collective(
      kind=kind,
      axis=axis,
      network=network,
      phase=where,
      bytes=round(num_bytes),
      count=round(count),
      seconds=seconds,
    )
    for (kind, axis, network, where), (num_bytes, count, seconds) in (
      totals.items()
    )
  ]
  return sorted(rows, key=lambda row: -row.seconds)


def _ways(
  found: _Found, module: Module, mesh: Mesh, chip: Chip
) -> Iterator[tuple[str, str, float, float]]:
  """The ways that a collective goes: (network, axis, bytes, bytes/second)."""
  if _BETWEEN_SLICES.search(found.attributes):
    num_bytes = sent_bytes(found.kind, found.operand_bytes, mesh.shape['slice'])
    yield 'dcn', 'slice', num_bytes, chip.dcn_bandwidth
    return
  groups = parse_groups(found.attributes, module.num_partitions or mesh.size)
  if found.kind == 'collective-permute':
    yield from _hops(found.operand_bytes, groups, mesh, chip)
  else:
    yield from _legs(found.kind, found.operand_bytes, groups, mesh, chip)


def is_collective(module: Module, instruction: Instruction) -> bool:
  return any(kind_of(inner) for inner in module.within(instruction))


def kind_of(instruction: Instruction) -> str | None:
  """What is collective about it; None if nothing is."""
  kind = instruction.opcode.removesuffix('-start')
  if kind == 'send' and (
    found := _BETWEEN_SLICES.search(instruction.attributes)
  ):
    kind = found[1].lower().replace('_', '-')
  return kind if kind in KINDS else None


def _found(module: Module, default_trips: int) -> Iterator[_Found]:
  seen = set()
  for name, outer, times in module.runs(default_trips):
    for inner in module.within(outer):
      kind = kind_of(inner)
      if kind is None:
        continue
      # The parts of one that is spread over several fusions share a channel.
      channel = _CHANNEL.search(inner.attributes)
      if channel and inner is not outer:
        if (name, kind, channel[1]) in seen:
          continue
        seen.add((name, kind, channel[1]))
      called = ' '.join(outer.called('calls'))
      if kind == 'all-reduce' and 'all-reduce-scatter' in called:
        kind = 'reduce-scatter'
      scope = inner.op_name or module.scope(name, outer)
      yield _Found(
        inner.attributes,
        kind,
        _phase_of(module, inner, scope),
        _brought(module, inner, kind),
        times,
      )


def _phase_of(module: Module, instruction: Instruction, scope: str) -> str:
  """Backward, sums over the batch are of the gradients of parameters.

  But not those that gather: an array that is zero outside of a device's part.
  Nor those in attention, which has no parameters: of keys that were gathered.
  """
  operands = _operands(module, instruction)
  gathers = any(i.opcode == 'dynamic-update-slice' for i in operands)
  kind = kind_of(instruction)
  sums = kind in ('all-reduce', 'reduce-scatter') and not gathers
  where = phase(scope)
  of_parameters = 'transpose(' in scope and '/attend/' not in scope
  return 'gradient' if where == 'latent' and sums and of_parameters else where


def _brought(module: Module, instruction: Instruction, kind: str) -> int:
  """Bytes of what a device brings to a collective."""
  if kind == instruction.opcode == 'all-reduce':  # may convert its operands
    return sum(array.num_bytes for array in instruction.arrays)
  operands = _operands(module, instruction)
  return sum(array.num_bytes for i in operands for array in i.arrays)


def _operands(module: Module, instruction: Instruction) -> list[Instruction]:
  body = module.home(instruction)
  return [body[name] for name in instruction.operand_names if name in body]


def _hops(
  operand_bytes: int, pairs: Sequence[Sequence[int]], mesh: Mesh, chip: Chip
) -> Iterator[tuple[str, str, float, float]]:
  """The same for a permutation: as slow as the slowest of its hops.

  Many a device is its own target, the first as a rule.
  """
  sources, targets = _places_in(mesh, np.array(pairs).T)
  if axes := _axes_between(mesh, sources, targets):
    far = 'slice' in axes
    rate = chip.dcn_bandwidth if far else chip.link_bandwidth
    yield 'dcn' if far else 'ici', '+'.join(axes), operand_bytes, rate


def _places_in(mesh: Mesh, numbers: np.ndarray) -> np.ndarray:
  """Indices in the mesh of devices with these numbers [...], [..., axes]."""
  return np.stack(np.unravel_index(numbers, mesh.devices.shape), axis=-1)


def _axes_between(mesh: Mesh, here: np.ndarray, there: np.ndarray) -> list[str]:
  """The axes along which any of some places [n, axes] differ."""
  differ = (here != there).any(axis=0)
  return [axis for axis, d in zip(mesh.axis_names, differ, strict=True) if d]


def _legs(
  kind: str,
  operand_bytes: int,
  groups: Sequence[Sequence[int]],
  mesh: Mesh,
  chip: Chip,
) -> Iterator[tuple[str, str, float, float]]:
  """The same for one that names its groups.

  One that crosses slices does so apart from what it does within each, so that
  every device exchanges its own share only with those of the other slices.
  """
  group = np.array(max(groups, key=len))
  places = _places_in(mesh, group)
  axes = _axes_between(mesh, places[:1], places)
  if not axes:
    return
  near = [axis for axis in axes if axis != 'slice']
  slices = places[:, mesh.axis_names.index('slice')]
  num_slices = len(set(slices.tolist()))
  size = len(group) // num_slices
  far_bytes = sent_bytes(kind, operand_bytes, num_slices)
  near_bytes = sent_bytes(kind, operand_bytes, size)
  if kind == 'all-gather':
    near_bytes *= num_slices  # what came from the other slices goes on
  elif kind != 'all-to-all':
    far_bytes /= size  # what is reduced within the slice, a share of it each
  if near:
    in_slice = mesh.devices.flat[group[slices == slices[0]]]
    rate = ici_rate(in_slice, mesh.devices.flat, chip)
    yield 'ici', '+'.join(near), near_bytes, rate
  if num_slices > 1:
    yield 'dcn', 'slice', far_bytes, chip.dcn_bandwidth


def ici_rate(group: Iterable[Any], devices: Iterable[Any], chip: Chip) -> float:
  """Bytes per second that each device of a group can send around it.

  A ring in every dimension of the torus that the group extends over: both ways
  where the dimension closes, one way where it is a line.
  """
  places = np.array([getattr(device, 'coords', ()) for device in group])
  if not places.size:  # not a TPU
    return 2 * chip.link_bandwidth
  shape = np.array([device.coords for device in devices]).max(axis=0) + 1
  links = 0
  rings = chip.rings(shape)
  for place, size, is_ring in zip(places.T, shape, rings, strict=True):
    reach = len(set(place.tolist()))
    closes = reach == size and is_ring
    links += (2 if closes else 1) if reach > 1 else 0
  # Two devices of one chip have six times a link of the chip between them
  # (Google Cloud), of which a device's share is a part.
  return (links or 6 * chip.devices) * chip.link_bandwidth
