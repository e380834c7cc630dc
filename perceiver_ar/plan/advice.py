"""What to change where a step does not fit, and which layouts to compare."""

import dataclasses
import itertools
import math
from collections.abc import Iterator, Mapping
from typing import Any

from perceiver_ar.config import Config
from perceiver_ar.errors import UserError
from perceiver_ar.plan import plans
from perceiver_ar.plan.machine import Machine
from perceiver_ar.plan.plans import Plan

Changes = Mapping[str, Any]

_MOST_COMPILED = 9
_REMATS = ('none', 'dots', 'attention', 'full')
# Of a device, whatever the batch; the rest shrinks with it.
_FIXED = ('parameters', 'optimizer_state', 'gradients')


def apply(config: Config, changes: Changes) -> Config:
  """Sets keys such as 'model.remat'."""
  for key, value in changes.items():
    section, name = key.split('.')
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    config = dataclasses.replace(config, **{section: changed})
  return config


def smallest_change(
  config: Config, machine: Machine, plan: Plan
) -> tuple[Changes, Plan] | None:
  """The first of ever larger changes whose own plan fits; None if none does.

  What is kept for the backward pass goes first, then the part of the batch
  that is computed at a time, then the layout. Steps that cannot fit, as far as
  the plan at hand tells, are not compiled.
  """
  tried = 0

  def attempt(changes: Changes) -> tuple[int, Plan | None]:
    """By how many bytes it does not fit, and its plan if it was compiled."""
    nonlocal tried
    changed = apply(config, changes)
    try:
      least = plans.least_bytes(changed, machine, plan.command)
      if least > plan.hbm_bytes:
        return least - plan.hbm_bytes, None
      other = plans.make_plan(changed, machine, plan.command, plan.hbm_bytes)
    except UserError:  # this model or batch cannot be laid out so
      return 0, None
    tried += 1
    return other.needed_bytes - plan.hbm_bytes, other

  for changes in _candidates(config, machine, plan):
    if tried >= _MOST_COMPILED:
      break
    missing, other = attempt(changes)
    if 0 < missing <= _whole_bytes(apply(config, changes), machine, plan):
      changes = {**changes, 'train.reduce_gradients_once': False}
      _, other = attempt(changes)
    if other and other.fits:
      return changes, other
  return None


def _whole_bytes(config: Config, machine: Machine, plan: Plan) -> int:
  """What whole parameters and gradients of microbatches take, about."""
  if plan.command != 'train' or not config.train.reduce_gradients_once:
    return 0
  later = apply(config, {'train.reduce_gradients_once': False})
  once, every = (
    plans.least_bytes(c, machine, plan.command) for c in (config, later)
  )
  return 2 * (once - every)


def _candidates(
  config: Config, machine: Machine, plan: Plan
) -> Iterator[Changes]:
  sharded = _shardings(config, machine)
  if plan.command != 'train':
    yield from _smaller_batches(config, plan.command, sharded)
    return
  if _whole_bytes(config, machine, plan):
    yield {'train.reduce_gradients_once': False}
  room = plan.hbm_bytes - sum(plan.bytes_per_chip[name] for name in _FIXED)
  if room > 0:
    yield from _smaller_parts(config, plan, room)
  if machine.chip.platform == 'tpu' and not config.optimizer.offload:
    yield {'model.remat': 'offload', 'optimizer.offload': True}
  for more in sharded:
    yield more
    yield dict(more) | {'model.remat': _REMATS[-1]}
  for more, part in itertools.product(sharded, (4, 16)):
    num = config.train.num_microbatches * part
    if config.train.batch_size % num == 0:
      yield dict(more) | {
        'model.remat': _REMATS[-1],
        'train.num_microbatches': num,
      }


def _smaller_batches(
  config: Config, command: str, sharded: list[Changes]
) -> Iterator[Changes]:
  if command == 'evaluate':
    key, size = 'evaluate.batch_size', config.evaluate.batch_size
  else:
    key, size = 'sample.num_samples', config.sample.num_samples
  parts = [size // n for n in (2, 4, 8) if size % n == 0]
  yield from ({key: part} for part in parts)
  for more in sharded:
    yield more
    yield from (dict(more) | {key: part} for part in parts)


def _smaller_parts(config: Config, plan: Plan, room: int) -> Iterator[Changes]:
  """Less kept, then fewer rows at a time, beginning with a likely number."""
  later = _after(config.model.remat)
  for remat in later:
    yield {'model.remat': remat}
  rest = sum(
    size for name, size in plan.bytes_per_chip.items() if name not in _FIXED
  )
  likely = 2 ** max(1, math.ceil(math.log2(max(rest / room, 1))))
  now, size = config.train.num_microbatches, config.train.batch_size
  rows = plan.mesh['slice'] * plan.mesh['data']
  # Recomputation has made room that the plan at hand does not know of.
  first = 2 if later else max(2, likely // 2)
  doubled = [first * 2**i for i in range(7 + likely.bit_length())]
  divides = lambda part: size % (now * part * rows) == 0
  if later and divides(likely):
    yield {'train.num_microbatches': now * likely}
  remat = {'model.remat': later[-1]} if later else {}
  for part in itertools.takewhile(divides, doubled):
    yield remat | {'train.num_microbatches': now * part}


def _after(remat: str) -> tuple[str, ...]:
  return _REMATS[_REMATS.index(remat) + 1 :] if remat in _REMATS else ()


def _shardings(config: Config, machine: Machine) -> list[Changes]:
  """Parameters and inputs over more axes, the nearest first."""
  found: list[Changes] = []
  tensor: Changes = {}
  if config.mesh.rules in ('replicated', 'tensor'):
    found.append({'mesh.rules': 'fsdp_tensor'})
  if config.mesh.rules == 'fsdp_tensor':
    found.append({'mesh.rules': 'fsdp_tensor_vocab'})
    found.append({'mesh.rules': 'context'})
  if config.mesh.rules in ('replicated', 'fsdp'):
    tensor = {'mesh.rules': 'fsdp_tensor'}
  for axis in ('model', 'context'):
    size = getattr(config.mesh, axis)
    more = tensor if axis == 'model' else {}
    for factor in (2, 4, 8):
      if 0 < size * factor <= len(machine.devices) // machine.num_slices:
        found.append({f'mesh.{axis}': size * factor, 'mesh.data': -1} | more)
  return found


def layouts(config: Config, machine: Machine) -> list[Changes]:
  """A handful of layouts to compare, the config's own first."""
  per_slice = len(machine.devices) // machine.num_slices
  found: list[Changes] = [{}]
  for sizes in ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (4, 4)):
    context, model = sizes
    changes: dict[str, Any] = {
      'mesh.data': -1,
      'mesh.context': context,
      'mesh.model': model,
    }
    if config.mesh.rules in ('replicated', 'fsdp') and model > 1:
      changes['mesh.rules'] = 'fsdp_tensor'
    same = apply(config, changes).mesh == config.mesh
    if context * model <= per_slice and not same:
      found.append(changes)
  return found


def sweep(
  config: Config, machine: Machine, command: str, hbm_bytes: int
) -> list[tuple[Changes, Plan | UserError]]:
  """A plan of every layout, or why there is none."""
  rows: list[tuple[Changes, Plan | UserError]] = []
  for changes in layouts(config, machine):
    try:
      plan = plans.make_plan(
        apply(config, changes), machine, command, hbm_bytes
      )
      rows.append((changes, plan))
    except UserError as error:
      rows.append((changes, error))
  return rows
