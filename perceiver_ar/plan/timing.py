"""How long a step would take, by what it is spent on.

On TPU the compiler has written the cycles that it expects into the module. It
has none for kernels, whose operations are counted instead, and for collectives
those of no contention, so that bytes over bandwidth are used. Nothing is
assumed to overlap: the sum is what a step takes if it does not.
"""

from typing import Any

from perceiver_ar.chips import Chip
from perceiver_ar.plan import collectives
from perceiver_ar.plan.counting import Work
from perceiver_ar.plan.hlo import Instruction, Module

# Of the peak, by attention kernels with heads of 128 lanes.
KERNEL_EFFICIENCY = 0.5
# Free, or overlapped with what the compiler has put between start and done.
_FREE = (
  'parameter',
  'constant',
  'tuple',
  'get-tuple-element',
  'bitcast',
  'while',
  'conditional',
  'call',
  'after-all',
  'partition-id',
  'replica-id',
  'send',
  'recv',
)


def estimate(
  module: Module,
  chip: Chip,
  work: Work,
  num_devices: int,
  dtype: str,
  sent: list[collectives.Collective],
  default_trips: int,
) -> dict[str, float]:
  """Seconds of a step: matmul, attention_kernel, data_movement, collectives.

  Args:
    module: compiled.
    chip: that it is compiled for.
    work: counted in the trace, over all devices.
    num_devices: that share it.
    dtype: of compute.
    sent: by this module.
    default_trips: of loops that do not say how often they run.
  """
  peak = chip.peak_flops[dtype] * num_devices
  kernel = work.kernel / (peak * KERNEL_EFFICIENCY)
  if chip.platform == 'cpu':
    matmul = work.matmul / peak
    moved = _moved_bytes(module, default_trips) / chip.hbm_bandwidth
  else:
    cycles = _cycles(module, default_trips)
    matmul, moved = (
      cycles[has_dot] / chip.clock_hz for has_dot in (True, False)
    )
  seconds: dict[str, float] = {
    'matmul': matmul,
    'attention_kernel': kernel,
    'data_movement': moved,
    'collectives': sum(row.seconds for row in sent),
  }
  return seconds | {'total': sum(seconds.values())}


def _cycles(module: Module, default_trips: int) -> dict[bool, int]:
  """Cycles of what has a matmul in it, and of what has none."""
  cycles = {True: 0, False: 0}
  for _, instruction, times in module.runs(default_trips):
    if instruction.cycles is None or _is_elsewhere(module, instruction):
      continue
    cycles[has_dot(module, instruction)] += times * instruction.cycles
  return cycles


def _moved_bytes(module: Module, default_trips: int) -> int:
  """Read and written by all instructions that do not multiply matrices."""
  total = 0
  for name, instruction, times in module.runs(default_trips):
    if _is_elsewhere(module, instruction) or has_dot(module, instruction):
      continue
    body = module.computations[name]
    read = [body[n] for n in instruction.operand_names if n in body]
    arrays = [a for i in (instruction, *read) for a in i.arrays]
    # A slice of a stacked array is read by itself, not with all the others.
    most = max((a.num_bytes for a in instruction.arrays), default=0)
    total += times * sum(min(a.num_bytes, 2 * most) for a in arrays)
  return total


def has_dot(module: Module, instruction: Instruction) -> bool:
  return any(
    inner.opcode in ('dot', 'convolution')
    for inner in module.within(instruction)
  )


def _is_elsewhere(module: Module, instruction: Instruction) -> bool:
  """Free, overlapped, or counted as a collective."""
  opcode: Any = instruction.opcode
  return (
    opcode in _FREE
    or opcode.endswith(('-start', '-done'))
    # A matmul may have a part of a collective fused into it.
    or (
      collectives.is_collective(module, instruction)
      and not has_dot(module, instruction)
    )
  )
