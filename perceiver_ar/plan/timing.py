"""How long a step would take, by what it is spent on.

On TPU the compiler has written the cycles that it expects into the module. It
has none for kernels, whose operations are counted instead, and none for
gathers, scatters and sorts; for collectives it has those of no contention. Of
these, bytes over bandwidth are used, and so for what goes to the host and comes
from there. None of this is assumed to overlap: the sum is what a step takes if
it does not. What the compiler fetches into a core's own memory while it
computes is taken to be there in time.
"""

from typing import Any

from perceiver_ar.chips import HOST_BANDWIDTH, Chip
from perceiver_ar.plan import collectives
from perceiver_ar.plan.counting import Work
from perceiver_ar.plan.hlo import HOST, Instruction, Module

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
  """Seconds of a step, by what they are spent on, and in `total`.

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
  cycles, num_bytes = _costs(module, default_trips)
  moved = work.moved / num_devices + num_bytes
  seconds: dict[str, float] = {
    'matmul': cycles[True] / chip.clock_hz,
    'attention_kernel': kernel,
    'data_movement': cycles[False] / chip.clock_hz + moved / chip.hbm_bandwidth,
    'host_transfers': _host_bytes(module, default_trips) / HOST_BANDWIDTH,
    'collectives': sum(row.seconds for row in sent),
  }
  if chip.platform == 'cpu':
    seconds['matmul'] = work.matmul / peak
  return seconds | {'total': sum(seconds.values())}


def _costs(module: Module, default_trips: int) -> tuple[dict[bool, int], int]:
  """Cycles of what has a matmul in it and of what has none; and bytes.

  Bytes are those read and written by all that has no matmul and of which the
  compiler says no cycles: everything on CPU; gathers, scatters, sorts on TPU.
  """
  cycles, num_bytes = {True: 0, False: 0}, 0
  for name, instruction, times in module.runs(default_trips):
    if _is_elsewhere(module, instruction):
      continue
    if instruction.cycles is not None:
      cycles[has_dot(module, instruction)] += times * instruction.cycles
    elif not has_dot(module, instruction):
      num_bytes += times * _moved_bytes(module, name, instruction)
  return cycles, num_bytes


def _host_bytes(module: Module, default_trips: int) -> int:
  """What goes between a device's memory and its host's."""
  total = 0
  for _, instruction, times in module.runs(default_trips):
    spaces = {array.space for array in instruction.arrays}
    if instruction.opcode.endswith('-start') and {0, HOST} <= spaces:
      # Of a slice there, what is here; beside it are only indices.
      here = [a for a in instruction.arrays if a.space != HOST]
      total += times * max(array.padded_bytes for array in here)
  return total


def _moved_bytes(
  module: Module, computation: str, instruction: Instruction
) -> int:
  body = module.computations[computation]
  read = [body[n] for n in instruction.operand_names if n in body]
  if instruction.opcode == 'dynamic-update-slice':  # in place
    return 2 * sum(a.padded_bytes for a in read[1].arrays)
  sizes = [a.padded_bytes for i in (instruction, *read) for a in i.arrays]
  # What is scattered is read whole, into however few rows.
  if any(i.opcode == 'scatter' for i in module.within(instruction)):
    return sum(sizes)
  # A slice of a stacked array is read by itself, not with all the others.
  most = max((a.padded_bytes for a in instruction.arrays), default=0)
  return sum(min(size, 2 * most) for size in sizes)


def has_dot(module: Module, instruction: Instruction) -> bool:
  return any(
    inner.opcode in ('dot', 'convolution')
    for inner in module.within(instruction)
  )


def _is_elsewhere(module: Module, instruction: Instruction) -> bool:
  """Free, overlapped, or counted as a collective or in the trace."""
  opcode: Any = instruction.opcode
  return (
    opcode in _FREE
    or '"tpu_custom_call"' in instruction.attributes  # counted in the trace
    or '"AllocateBuffer"' in instruction.attributes
    or opcode.endswith(('-start', '-done'))
    # A matmul may have a part of a collective fused into it.
    or (
      collectives.is_collective(module, instruction)
      and not has_dot(module, instruction)
    )
  )
