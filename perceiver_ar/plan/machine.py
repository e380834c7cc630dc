"""Opens a described machine: a TPU topology, or simulated CPU devices.

Nothing of it need exist. `libtpu` compiles for TPU topologies on any Linux
host; CPU devices are simulated by as many threads' worth of one process.
"""

import contextlib
import dataclasses
import importlib.util
import math
import os
import re
from typing import Any

import jax
from jax.experimental import topologies

from perceiver_ar import chips
from perceiver_ar.chips import Chip
from perceiver_ar.errors import UserError

_TOPOLOGY = re.compile(r'(\w+):([0-9]{1,6}(?:x[0-9]{1,6}){0,3})')


@dataclasses.dataclass(frozen=True)
class Machine:
  """Devices to compile for.

  Attributes:
    topology: as the user names it, such as 'v5p:4x4x8'.
    num_slices: of that topology, joined by the data center's network.
    chip: what each device can do.
    devices: slice by slice.
  """

  topology: str
  num_slices: int
  chip: Chip
  devices: tuple[Any, ...]

  @property
  def name(self) -> str:
    """Such as '2 slices of 64 x TPU v5p'."""
    slices = f'{self.num_slices} slices of ' if self.num_slices > 1 else ''
    num = len(self.devices) // self.num_slices
    kind = 'CPU' if self.chip.platform == 'cpu' else f'TPU {self.chip.name}'
    part = ' (two devices a chip)' if self.chip.devices > 1 else ''
    return f'{slices}{num} x {kind}{part}'


def open_machine(topology: str, num_slices: int) -> Machine:
  """Call it before anything else asks JAX for devices.

  Raises:
    UserError: there is no such chip or topology, or no compiler for it.
  """
  name, sizes = parsed(topology)
  if num_slices < 1:
    raise UserError(f'--num_slices={num_slices} must be at least 1')
  _stay_on_cpu()
  if name == 'cpu':
    devices = _cpu_devices(topology, sizes, num_slices)
    chip = chips.cpu(_memory() // len(devices))
  else:
    chip = chips.find_chip(name)
    _check_grid(topology, chip, sizes)
    devices = _tpu_devices(topology, sizes, chip, num_slices)
  return Machine(topology, num_slices, chip, tuple(devices))


def parsed(topology: str) -> tuple[str, list[int]]:
  """The chip's name, and the sizes of its grid."""
  found = _TOPOLOGY.fullmatch(topology)
  if not found:
    raise UserError(
      f'--topology={topology} must name a chip and its grid, such as '
      'v5p:4x4x8, v5e:16x16 or cpu:8'
    )
  sizes = [int(size) for size in found[2].split('x')]
  if 0 in sizes:
    raise UserError(f'--topology={topology} has no devices; use sizes above 0')
  return found[1], sizes


def _stay_on_cpu() -> None:
  """Keeps JAX and libtpu from looking for TPUs: minutes, and loud failure."""
  os.environ.setdefault('TPU_SKIP_MDS_QUERY', '1')
  os.environ.setdefault('TPU_WORKER_HOSTNAMES', 'localhost')
  os.environ.setdefault('TPU_ACCELERATOR_TYPE', 'v4-8')
  jax.config.update('jax_platforms', 'cpu')


def _cpu_devices(topology: str, sizes: list[int], num_slices: int) -> list[Any]:
  if len(sizes) != 1 or num_slices != 1:
    raise UserError(
      f'--topology={topology} with --num_slices={num_slices}: simulated CPU '
      'devices are of one slice and a number, such as cpu:8; set '
      '--config.mesh.slice to try slices'
    )
  with contextlib.suppress(RuntimeError):  # devices are in use, as in tests
    jax.config.update('jax_num_cpu_devices', sizes[0])
  devices = jax.devices('cpu')
  if len(devices) < sizes[0]:
    raise UserError(
      f'--topology={topology} needs a process that has not used JAX yet, and '
      f'this one has {len(devices)} devices; run the command by itself'
    )
  return devices[: sizes[0]]


def _memory() -> int:
  return os.sysconf('SC_PAGE_SIZE') * os.sysconf('SC_PHYS_PAGES')


def _check_grid(topology: str, chip: Chip, sizes: list[int]) -> None:
  if len(sizes) != chip.num_dims:
    example = 'x'.join(['4'] * chip.num_dims)
    raise UserError(
      f'--topology={topology}: slices of {chip.name} have {chip.num_dims} '
      f'dimensions, such as {chip.name}:{example}'
    )


def _tpu_devices(
  topology: str, sizes: list[int], chip: Chip, num_slices: int
) -> list[Any]:
  _check_libtpu()
  grid = 'x'.join(map(str, sizes))
  more: dict[str, Any] = dict(chip.options)
  if num_slices > 1:
    more['num_slices'] = num_slices
  try:
    described = topologies.get_topology_desc(
      platform='tpu', topology_name=f'{chip.prefix}:{grid}', **more
    )
  except Exception as error:
    reason = str(error).strip().splitlines()[0]
    raise UserError(
      f'--topology={topology} is none that libtpu compiles for ({reason}); '
      f'use a shape that {chip.name} is offered in'
    ) from error
  devices = sorted(
    described.devices, key=lambda d: getattr(d, 'slice_index', 0) or 0
  )
  expected = math.prod(sizes) * chip.devices * num_slices
  assert len(devices) == expected, (len(devices), expected)
  return devices


def _check_libtpu() -> None:
  if importlib.util.find_spec('libtpu') is None:
    raise UserError(
      'to compile for TPUs, install libtpu: pip install "perceiver-ar[tpu]"; '
      '--topology=cpu:8 works without'
    )
