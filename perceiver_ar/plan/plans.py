"""Compiles a step for a machine and says what it would take there."""

import dataclasses
import re
import sys
import time
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import Mesh

from perceiver_ar import partitioning
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError
from perceiver_ar.plan import collectives, counting, memory, programs, timing
from perceiver_ar.plan.hlo import Module
from perceiver_ar.plan.machine import Machine
from perceiver_ar.plan.programs import Program

_GIB = 2**30
_SIZE = r'([\d.]+)([KMGT]?)'
# The compiler's two ways to say that a program is too large: with all that it
# needs, or with its temporaries only.
_USED = re.compile(rf'Used {_SIZE} of {_SIZE} hbm')
_TEMPORARIES = re.compile(
  rf'required for [\w ]+ \({_SIZE}\) exceeds available HBM \({_SIZE}\)'
)
_LARGEST = re.compile(
  rf'Size: {_SIZE}\s+(?:Operator: op_name="([^"]*)"[^\n]*\s+)?'
  r'Shape: (\w+\[[\d,]*\])'
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
  """What one call of a program takes on a machine; bytes are per device.

  Attributes:
    topology, num_slices: as asked for.
    machine: in words.
    command: train, evaluate or sample.
    config: that was planned.
    mesh: sizes by axis.
    fits: whether all classes of memory fit what a program may use.
    hbm_bytes: that it may use.
    bytes_per_chip: by class; they add up to `needed_bytes`.
    needed_bytes: XLA's figure.
    host_bytes: in the memory of the host, for a device; not among them.
    largest: what takes most of the temporaries, if they do not fit.
    assumed_trips: of loops whose text does not say; None if all do.
    num_parameters: of the model.
    model_flops: that the model needs for one call, over all devices.
    saved_flops: that it does not, thanks to the token table.
    executed_flops: that are traced: with what is recomputed, and once what
      XLA has all devices do alike, such as the token table.
    recomputed_flops: of these, computed a second time for the backward pass.
    kernel_flops: of these, in attention kernels, masked blocks included.
    collectives: empty if it did not compile.
    seconds: by what they are spent on; empty if it did not compile.
    num_tokens: predicted in one call.
    num_calls: in the whole run: train.num_steps, else 1.
    compile_seconds: that this plan took.
  """

  topology: str
  num_slices: int
  machine: Machine
  command: str
  config: Config
  mesh: Mapping[str, int]
  fits: bool
  hbm_bytes: int
  bytes_per_chip: Mapping[str, int]
  needed_bytes: int
  host_bytes: int
  largest: tuple[str, ...]
  assumed_trips: int | None
  num_parameters: int
  model_flops: int
  saved_flops: int
  executed_flops: float
  recomputed_flops: float
  kernel_flops: float
  collectives: tuple[collectives.Collective, ...]
  seconds: Mapping[str, float]
  num_tokens: int
  num_calls: int
  compile_seconds: float

  @property
  def num_devices(self) -> int:
    return len(self.machine.devices)

  @property
  def recomputed_share(self) -> float:
    return self.recomputed_flops / self.executed_flops

  @property
  def predicted_mfu(self) -> float | None:
    if not self.seconds:
      return None
    peak = self.machine.chip.peak_flops[self.config.model.dtype]
    return self.model_flops / (self.seconds['total'] * peak * self.num_devices)

  @property
  def tokens_per_second(self) -> float | None:
    return self.num_tokens / self.seconds['total'] if self.seconds else None

  @property
  def days(self) -> float | None:
    if not self.seconds:
      return None
    return self.num_calls * self.seconds['total'] / 86_400

  def to_dict(self) -> dict[str, Any]:
    """Plain numbers for JSON."""
    return {
      'topology': self.topology,
      'num_slices': self.num_slices,
      'num_devices': self.num_devices,
      'command': self.command,
      'mesh': dict(self.mesh),
      'fits': self.fits,
      'hbm_bytes': self.hbm_bytes,
      'bytes_per_chip': dict(self.bytes_per_chip),
      'needed_bytes': self.needed_bytes,
      'host_bytes': self.host_bytes,
      'largest': list(self.largest),
      'num_parameters': self.num_parameters,
      'model_flops': self.model_flops,
      'saved_flops': self.saved_flops,
      'executed_flops': self.executed_flops,
      'recomputed_flops': self.recomputed_flops,
      'kernel_flops': self.kernel_flops,
      'recomputed_share': self.recomputed_share,
      'collectives': [dataclasses.asdict(row) for row in self.collectives],
      'seconds': dict(self.seconds),
      'predicted_mfu': self.predicted_mfu,
      'tokens_per_second': self.tokens_per_second,
      'days': self.days,
      'compile_seconds': self.compile_seconds,
    }


def make_plan(
  config: Config, machine: Machine, command: str, hbm_bytes: int
) -> Plan:
  """Compiles `command` of `config` for a machine whose devices have HBM.

  Raises:
    UserError: the mesh, the batch or the model do not fit the machine.
  """
  config = _over_slices(config, machine)
  mesh = make_mesh(config, machine)
  program = programs.make_program(command, config, mesh)
  num_parameters = sum(x.size for x in jax.tree.leaves(program.params))
  print(
    f'compiling for {machine.name}: {command}, '
    f'{num_parameters:,} parameters, {_axes(mesh)}',
    file=sys.stderr,
    flush=True,
  )
  start = time.monotonic()
  traced = program.function.trace(*program.args)
  work = counting.count(traced.jaxpr.jaxpr, _loop_trips(config, command))
  try:
    compiled: Any = traced.lower().compile()
    found = _read(compiled, program, config, machine, mesh, work)
  except jax.errors.JaxRuntimeError as error:
    found = _read_refusal(str(error), program)
  needed = found['needed_bytes']
  return Plan(
    topology=machine.topology,
    num_slices=machine.num_slices,
    machine=machine,
    command=command,
    config=config,
    mesh=dict(mesh.shape),
    fits=needed <= hbm_bytes and bool(found['seconds']),
    hbm_bytes=hbm_bytes,
    num_parameters=num_parameters,
    model_flops=program.model_flops,
    saved_flops=program.saved_flops,
    executed_flops=work.total,
    recomputed_flops=work.again,
    kernel_flops=work.kernel,
    num_tokens=program.num_tokens,
    num_calls=config.train.num_steps if command == 'train' else 1,
    compile_seconds=round(time.monotonic() - start, 3),
    **found,
  )


def make_mesh(config: Config, machine: Machine) -> Mesh:
  """The mesh of a config on a machine, over all of its slices.

  Raises:
    UserError: it does not fit the machine.
  """
  mesh = _over_slices(config, machine).mesh
  return partitioning.make_mesh(mesh, machine.devices)


def least_bytes(config: Config, machine: Machine, command: str) -> int:
  """What a device needs for what goes in and the gradients, whatever it does.

  Nothing is compiled.
  """
  config = _over_slices(config, machine)
  mesh = make_mesh(config, machine)
  program = programs.make_program(command, config, mesh)
  sizes = memory.abstract_classes(program.args)
  sizes['gradients'] = memory.tree_bytes(program.gradients)
  return sum(sizes.values())


def fitting_step(config: Config, mesh: Mesh, batch: Any) -> Any:
  """The train step, compiled for the devices of `mesh`, which must hold it.

  It is called as `train_step.make_train_step`'s, and need not be compiled
  again.

  Args:
    config: of the run.
    mesh: of real devices.
    batch: one, or its shapes: data may have more position axes than the model
      reads.

  Raises:
    UserError: it needs more memory than a device has.
  """
  program = programs.make_program('train', config, mesh)
  program = dataclasses.replace(program, args=(program.args[0], batch))
  try:
    compiled = program.function.trace(*program.args).lower().compile()
  except jax.errors.JaxRuntimeError as error:
    needed = _read_refusal(str(error), program)['needed_bytes']
    raise UserError(_too_large(needed)) from error
  needed = memory.total(compiled.memory_analysis())
  stats = mesh.local_devices[0].memory_stats()  # None where there are none
  if stats and needed > stats['bytes_limit']:
    raise UserError(_too_large(needed))
  return compiled


def _too_large(needed: int) -> str:
  return (
    f'the train step needs {needed / _GIB:.2f} GiB of each device, and they '
    'have less; `perceiver-ar plan` finds a change that fits'
  )


def _over_slices(config: Config, machine: Machine) -> Config:
  """Several slices are joined by the mesh axis of that name."""
  num = machine.num_slices
  if num == 1 or config.mesh.slice in (num, -1):
    return config
  if config.mesh.slice != 1:
    raise UserError(
      f'mesh.slice {config.mesh.slice} does not fit --num_slices={num}; set '
      'them alike, or leave mesh.slice at 1'
    )
  mesh = dataclasses.replace(config.mesh, slice=num)
  return dataclasses.replace(config, mesh=mesh)


def _axes(mesh: Mesh) -> str:
  return ' x '.join(f'{axis} {size}' for axis, size in mesh.shape.items())


def _loop_trips(config: Config, command: str) -> int:
  """Of loops that do not say: of draws in sampling, else of layers."""
  how = config.sample
  if command == 'sample':
    return max(how.num_latents - how.refill_latents, 1)
  return max(config.model.num_layers // config.model.scan_unroll, 1)


def _read(
  compiled: Any,
  program: Program,
  config: Config,
  machine: Machine,
  mesh: Mesh,
  work: counting.Work,
) -> dict[str, Any]:
  """What a compiled module says of memory, traffic and time."""
  module, analysis = Module(compiled.as_text()), compiled.memory_analysis()
  trips = _loop_trips(config, program.command)
  sent = collectives.collect(module, mesh, machine.chip, trips)
  return {
    'bytes_per_chip': memory.classify(
      module,
      analysis,
      program.params,
      program.gradients,
      config.model,
    ),
    'needed_bytes': memory.total(analysis),
    'host_bytes': memory.on_host(analysis),
    'largest': (),
    'assumed_trips': trips if module.has_unknown_loops() else None,
    'collectives': tuple(sent),
    'seconds': timing.estimate(
      module,
      machine.chip,
      work,
      mesh.size,
      config.model.dtype,
      sent,
      trips,
    ),
  }


def _read_refusal(message: str, program: Program) -> dict[str, Any]:
  """What the compiler says of a program that is too large for the chip."""
  used, temporaries = _USED.search(message), _TEMPORARIES.search(message)
  found = used or temporaries
  if not found:
    reason = ' '.join(message.strip().splitlines()[:2])[:300]
    raise UserError(
      f'the compiler refuses this step ({reason}); try another --topology, '
      'mesh or model.attention'
    )
  sizes = memory.abstract_classes(program.args)
  needed = _bytes(found[1], found[2])
  if not used:
    needed += sum(sizes.values())
  left = max(needed - sum(sizes.values()), 0)
  sizes['gradients'] = min(memory.tree_bytes(program.gradients), left)
  sizes['temporaries'] = left - sizes['gradients']
  largest = tuple(
    f'{_bytes(size, unit) / _GIB:.2f} GiB {shape} {name or ""}'.strip()
    for size, unit, name, shape in _LARGEST.findall(message)[:3]
  )
  return {
    'bytes_per_chip': sizes,
    'needed_bytes': needed,
    'host_bytes': 0,
    'largest': largest,
    'assumed_trips': None,
    'collectives': (),
    'seconds': {},
  }


def _bytes(number: str, unit: str) -> int:
  return int(float(number) * 1024 ** ('KMGT'.find(unit) + 1 if unit else 0))
