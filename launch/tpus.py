"""TPU slices as GKE offers them: labels of nodes, hosts, chips of a host.

Source: AI-Hypercomputer/xpk, src/xpk/core/system_characteristics.py; sizes of
pods: Google Cloud's pages "TPU v4", "TPU v5p" and "TPU7x (Ironwood)".
"""

import dataclasses
import math
import re


class UserError(ValueError):
  """The user's: one sentence with flag, value and remedy."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
  """TPUs of one generation, as GKE offers them.

  Attributes:
    accelerator: value of the node label cloud.google.com/gke-tpu-accelerator.
    xpk: how XPK's names of device types begin.
    topologies: that are offered, but for cuboids.
    pod_chips: 0, or the size of a pod of which any cuboid of 4x4x4 cubes is
      offered.
  """

  accelerator: str
  xpk: str
  topologies: tuple[str, ...]
  pod_chips: int


_FLAT = ('1x1', '2x2', '2x4', '4x4', '4x8', '8x8', '8x16', '16x16')
_SMALL = ('2x2x1', '2x2x2', '2x2x4', '2x4x4')

GENERATIONS = {
  'v4': Generation(
    accelerator='tpu-v4-podslice',
    xpk='v4',
    topologies=_SMALL,
    pod_chips=4096,
  ),
  'v5e': Generation(
    accelerator='tpu-v5-lite-podslice',
    xpk='v5litepod',
    topologies=_FLAT,
    pod_chips=0,
  ),
  'v5p': Generation(
    accelerator='tpu-v5p-slice',
    xpk='v5p',
    topologies=_SMALL,
    pod_chips=8960,
  ),
  'v6e': Generation(
    accelerator='tpu-v6e-slice',
    xpk='v6e',
    topologies=_FLAT,
    pod_chips=0,
  ),
  '7x': Generation(
    accelerator='tpu7x',
    xpk='tpu7x',
    topologies=('1x1x1', *_SMALL),
    pod_chips=9216,
  ),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Slice:
  """One slice: chips joined by ICI, in hosts.

  Attributes:
    generation: of its chips.
    topology: value of the node label cloud.google.com/gke-tpu-topology.
    num_hosts: each a pod.
    chips_per_host: all of them are asked for; GKE gives no part of a host.
  """

  generation: Generation
  topology: str
  num_hosts: int
  chips_per_host: int


def find_slice(topology: str) -> Slice:
  """Hosts of a topology such as 'v5p:4x4x8'."""
  name, _, grid = topology.partition(':')
  if name not in GENERATIONS:
    raise UserError(
      f'--topology={topology} names no TPU that GKE has; use one of '
      f'{", ".join(GENERATIONS)} and its grid, such as v5p:4x4x8'
    )
  generation = GENERATIONS[name]
  if grid not in generation.topologies and not _is_cuboid(generation, grid):
    known = ', '.join(generation.topologies)
    more = (
      ', or three multiples of 4 in ascending order, such as 4x4x8, of up to '
      f'{generation.pod_chips:,} chips'
    )
    raise UserError(
      f'--topology={topology} is not offered; {name} comes as {known}'
      f'{more if generation.pod_chips else ""}'
    )
  num_chips = math.prod(int(size) for size in grid.split('x'))
  # Eight chips of v5e and v6e are also offered in one host. Such slices cannot
  # be joined, so this asks for two hosts, as XPK does.
  per_host = min(num_chips, 4)
  return Slice(
    generation=generation,
    topology=grid,
    num_hosts=num_chips // per_host,
    chips_per_host=per_host,
  )


def _is_cuboid(generation: Generation, grid: str) -> bool:
  if not re.fullmatch(r'[0-9]{1,4}x[0-9]{1,4}x[0-9]{1,4}', grid):
    return False
  sizes = [int(size) for size in grid.split('x')]
  return (
    sizes == sorted(sizes)
    and all(size and size % 4 == 0 for size in sizes)
    and math.prod(sizes) <= generation.pod_chips
  )
