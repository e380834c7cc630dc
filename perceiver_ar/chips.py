"""What accelerators can do: figures that a plan is held against.

Sources, for all but the clock and what the compiler keeps for itself:
  - Google Cloud's pages "TPU v4", "TPU v5e", "TPU v5p", "TPU v6e" and "TPU7x
    (Ironwood)" (docs.cloud.google.com/tpu/docs): peak, HBM, HBM bandwidth,
    ports, ICI bandwidth (both ways and over all ports there, one way and of
    one port here), DCN bandwidth.
  - "How to Scale Your Model" (jax-ml.github.io/scaling-book/tpus): v4's ICI
    and v4's DCN, which the first does not give, and where a torus closes.
In three dimensions optical switches close it, and only between whole cubes of
4x4x4: if one dimension is no multiple of 4, all are lines. In two dimensions
each that is 16 long closes, whatever the other is.
The clock follows from the peak where the pages say what units there are: cores
x matrix units x 2 x side^2 operations a cycle (v4, v5e, v5p). For v6e they say
two units of 256 x 256, which would be 3.5 GHz; assumed is v5p's clock, half of
that, at four times the operations a cycle of v5p's core, and as many of each
device of 7x. By these clocks a bfloat16 matmul of 16,384 runs, in the cycles
that libtpu 0.0.42 expects of it, at 94 % of the peak on v4 and v5p, 92 % on
v5e, 78 % on v6e (at 3.5 GHz it would be 156 %) and 85 % on 7x.
What the host holds comes over PCIe: 16 to 32 GB/s a chip, says the second.
`usable` is what libtpu 0.0.42 says it has when a program is too large for it.
"""

import dataclasses
from collections.abc import Mapping, Sequence

from perceiver_ar.errors import UserError

HOST_BANDWIDTH = 16e9  # bytes per second, one way; the lower end

_GIB = 2**30


@dataclasses.dataclass(frozen=True, kw_only=True)
class Chip:
  """One chip, or one device where `devices` of them share a chip.

  Attributes:
    name: as topologies begin, such as 'v5p'.
    platform: 'tpu' or 'cpu'.
    prefix: of the compiler's names of topologies.
    options: of the compiler's topologies.
    devices: that JAX sees per chip; all figures are of one of them.
    hbm_bytes: of memory, as sold.
    usable_bytes: of it, that a program may use.
    peak_flops: by type of the operands, per second. Matmuls of float32 are one
      pass of bfloat16, unless a precision is asked for.
    hbm_bandwidth: bytes per second.
    link_bandwidth: bytes per second, one ICI port, one way, the device's share.
    num_links: ICI ports of a chip; two per dimension of the torus.
    torus_multiple: a dimension closes to a ring if this divides it; of three
      dimensions, if it divides all of them.
    dcn_bandwidth: bytes per second, one way, the chip's share of its host's.
    clock_hz: cycles per second.
  """

  name: str
  platform: str
  prefix: str
  options: Mapping[str, str]
  devices: int
  hbm_bytes: int
  usable_bytes: int
  peak_flops: Mapping[str, float]
  hbm_bandwidth: float
  link_bandwidth: float
  num_links: int
  torus_multiple: int
  dcn_bandwidth: float
  clock_hz: float

  @property
  def num_dims(self) -> int:
    return self.num_links // 2

  def rings(self, shape: Sequence[int]) -> list[bool]:
    """Which dimensions of a slice of this shape are rings, and not lines."""
    divides = [size % self.torus_multiple == 0 for size in shape]
    return [all(divides)] * len(shape) if self.num_dims == 3 else divides


def _peak(bfloat16: float, int8: float) -> dict[str, float]:
  return {'float32': bfloat16, 'bfloat16': bfloat16, 'int8': int8}


_TPUS = (
  Chip(
    name='v4',
    platform='tpu',
    prefix='v4',
    options={'chip_config_name': 'megacore'},  # else two devices per chip
    devices=1,
    hbm_bytes=32 * _GIB,
    usable_bytes=int(30.75 * _GIB),
    peak_flops=_peak(275e12, 275e12),
    hbm_bandwidth=1228e9,
    link_bandwidth=45e9,
    num_links=6,
    torus_multiple=4,
    dcn_bandwidth=6.25e9,
    clock_hz=1.05e9,
  ),
  Chip(
    name='v5e',
    platform='tpu',
    prefix='v5e',
    options={},
    devices=1,
    hbm_bytes=16 * _GIB,
    usable_bytes=int(15.75 * _GIB),
    peak_flops=_peak(197e12, 393e12),
    hbm_bandwidth=819e9,
    link_bandwidth=50e9,
    num_links=4,
    torus_multiple=16,
    dcn_bandwidth=3.125e9,
    clock_hz=1.5e9,
  ),
  Chip(
    name='v5p',
    platform='tpu',
    prefix='v5p',
    options={},
    devices=1,
    hbm_bytes=95 * _GIB,
    usable_bytes=int(95.74 * _GIB),
    peak_flops=_peak(459e12, 918e12),
    hbm_bandwidth=2765e9,
    link_bandwidth=100e9,
    num_links=6,
    torus_multiple=4,
    dcn_bandwidth=6.25e9,
    clock_hz=1.75e9,
  ),
  Chip(
    name='v6e',
    platform='tpu',
    prefix='v6e',
    options={},
    devices=1,
    hbm_bytes=32 * _GIB,
    usable_bytes=int(31.25 * _GIB),
    peak_flops=_peak(918e12, 1836e12),
    hbm_bandwidth=1638e9,
    link_bandwidth=100e9,
    num_links=4,
    torus_multiple=16,
    dcn_bandwidth=12.5e9,
    clock_hz=1.75e9,
  ),
  Chip(
    name='7x',
    platform='tpu',
    prefix='tpu7x',
    options={},
    devices=2,
    hbm_bytes=96 * _GIB,
    usable_bytes=int(94.75 * _GIB),
    peak_flops=_peak(2307e12 / 2, 4614e12 / 2),  # int8: the page gives FP8
    hbm_bandwidth=7380e9 / 2,
    link_bandwidth=100e9 / 2,
    num_links=6,
    torus_multiple=4,
    dcn_bandwidth=12.5e9 / 2,
    clock_hz=2.2e9,
  ),
)
_CHIPS = {chip.name: chip for chip in _TPUS} | {
  chip.prefix: chip for chip in _TPUS
}


def find_chip(name: str) -> Chip:
  if name not in _CHIPS:
    known = ', '.join(chip.name for chip in _TPUS)
    raise UserError(
      f'no figures are known of chip {name!r}; use one of {known}, or cpu'
    )
  return _CHIPS[name]


def cpu(memory_bytes: int) -> Chip:
  """A device of a simulated mesh; only its memory is this machine's.

  The rest is round numbers of about a CPU core, so that plans of small models
  can be read and compared; as predictions they are worth nothing.
  """
  return Chip(
    name='cpu',
    platform='cpu',
    prefix='cpu',
    options={},
    devices=1,
    hbm_bytes=memory_bytes,
    usable_bytes=memory_bytes,
    peak_flops=_peak(50e9, 50e9),
    hbm_bandwidth=10e9,
    link_bandwidth=1e9,
    num_links=2,
    torus_multiple=1,
    dcn_bandwidth=1e9,
    clock_hz=1e9,
  )
