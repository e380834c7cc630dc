"""What to change where a step does not fit, and which layouts to compare."""

import dataclasses
import itertools
import math
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from perceiver_ar import partitioning
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError
from perceiver_ar.plan import plans
from perceiver_ar.plan.machine import Machine
from perceiver_ar.plan.plans import Plan

Changes = Mapping[str, Any]

_MOST_COMPILED = 9
_FOR_AXES = 3  # of these, whatever else there is to try
_REMATS = ('none', 'dots', 'attention', 'full')
# Of a device, whatever the batch; the rest shrinks with it.
_FIXED = ('parameters', 'optimizer_state', 'gradients')
# Rules that may split parameters further, the nearest first.
_FURTHER = {
  'replicated': ('fsdp_tensor',),
  'fsdp': ('fsdp_tensor',),
  'tensor': ('fsdp_tensor',),
  'fsdp_tensor': ('fsdp_tensor_vocab', 'context'),
}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Advice:
  """What came of the search for a change that fits.

  Attributes:
    change: the smallest, with its plan; None if none was found.
    num_compiled: steps on the way there.
    was_cut: whether there were more to compile than are.
  """

  change: tuple[Changes, Plan] | None
  num_compiled: int
  was_cut: bool


def apply(config: Config, changes: Changes) -> Config:
  """Sets keys such as 'model.remat'."""
  for key, value in changes.items():
    section, name = key.split('.')
    changed = dataclasses.replace(getattr(config, section), **{name: value})
    config = dataclasses.replace(config, **{section: changed})
  return config


def smallest_change(config: Config, machine: Machine, plan: Plan) -> Advice:
  """The first of ever larger changes whose own plan fits.

  What is kept for the backward pass goes first, then the part of the batch
  that is computed at a time, then the layout. Steps that cannot fit, as far as
  the plan at hand tells, are not compiled.
  """
  search, change = _Search(config, machine, plan), None
  for most, candidates in _stages(config, machine, plan):
    change = search.first(candidates, most)
    if change:
      break
  return Advice(
    change=change, num_compiled=search.num_compiled, was_cut=search.was_cut
  )


class _Search:
  """Compiles what changes make of a config, and nothing twice."""

  def __init__(self, config: Config, machine: Machine, plan: Plan) -> None:
    self.num_compiled = 0
    self.was_cut = False
    self._config, self._machine, self._plan = config, machine, plan
    self._seen = [config]

  def first(
    self, candidates: Iterable[Changes], most: int
  ) -> tuple[Changes, Plan] | None:
    """The first that fits, unless `most` are compiled before."""
    for changes in candidates:
      if self.num_compiled >= most:
        self.was_cut = True
        break
      missing, other = self._attempt(changes)
      changed = apply(self._config, changes)
      if 0 < missing <= _whole_bytes(changed, self._machine, self._plan):
        changes = {**changes, 'train.reduce_gradients_once': False}
        _, other = self._attempt(changes)
      if other and other.fits:
        return changes, other
    return None

  def _attempt(self, changes: Changes) -> tuple[int, Plan | None]:
    """By how many bytes it does not fit, and its plan if it was compiled."""
    changed, plan = apply(self._config, changes), self._plan
    if changed in self._seen:
      return 0, None
    self._seen.append(changed)
    try:
      least = plans.least_bytes(changed, self._machine, plan.command)
      if least > plan.hbm_bytes:
        return least - plan.hbm_bytes, None
      other = plans.make_plan(
        changed, self._machine, plan.command, plan.hbm_bytes
      )
    except UserError:  # this model or batch cannot be laid out so
      return 0, None
    self.num_compiled += 1
    return other.needed_bytes - plan.hbm_bytes, other


def _whole_bytes(config: Config, machine: Machine, plan: Plan) -> int:
  """What whole parameters and gradients of microbatches take, about."""
  if plan.command != 'train' or not config.train.reduce_gradients_once:
    return 0
  later = apply(config, {'train.reduce_gradients_once': False})
  once, every = (
    plans.least_bytes(c, machine, plan.command) for c in (config, later)
  )
  return 2 * (once - every)


def _stages(
  config: Config, machine: Machine, plan: Plan
) -> Iterator[tuple[int, Iterable[Changes]]]:
  """Ever larger changes, kind by kind: how many may be compiled by its end."""
  rules, axes = _further_rules(config, plan), _longer_axes(config, plan)
  less = _less_at_a_time(config, plan.command)
  before_axes = _MOST_COMPILED - (_FOR_AXES if axes else 0)
  same = _within_layout(config, machine, plan)
  yield before_axes - len(rules), same if plan.command == 'train' else less
  for most, layouts in (
    (before_axes, rules),
    *((_MOST_COMPILED, sizes) for sizes in axes),
  ):
    pairs = itertools.product(({}, *less), layouts)
    yield most, ({**layout, **smaller} for smaller, layout in pairs)


def _within_layout(
  config: Config, machine: Machine, plan: Plan
) -> Iterator[Changes]:
  """Of training: what is kept, and the rows at a time."""
  if _whole_bytes(config, machine, plan):
    yield {'train.reduce_gradients_once': False}
  room = plan.hbm_bytes - sum(plan.bytes_per_chip[name] for name in _FIXED)
  if room > 0:
    yield from _smaller_parts(config, plan, room)
  if machine.chip.platform == 'tpu' and not config.optimizer.offload:
    yield {'model.remat': 'offload', 'optimizer.offload': True}


def _less_at_a_time(config: Config, command: str) -> list[Changes]:
  """What is tried in any layout, ever less."""
  if command == 'train':
    later, num = _after(config.model.remat), config.train.num_microbatches
    remat = {'model.remat': later[-1]} if later else {}
    parts = [num * n for n in (2, 4, 16)]
    fit = [n for n in parts if config.train.batch_size % n == 0]
    return [remat, *({**remat, 'train.num_microbatches': n} for n in fit)]
  if command == 'evaluate':
    key, size = 'evaluate.batch_size', config.evaluate.batch_size
  else:
    key, size = 'sample.num_samples', config.sample.num_samples
  return [{key: size // n} for n in (2, 4, 8) if size % n == 0]


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


def _further_rules(config: Config, plan: Plan) -> list[Changes]:
  """Those that make a difference on this mesh."""
  mine = config.mesh.rules
  return [
    {'mesh.rules': rules}
    for rules in _FURTHER.get(mine, ())
    if _split(rules, plan.mesh) != _split(mine, plan.mesh)
  ]


def _split(rules: str, sizes: Mapping[str, int]) -> dict[str, list[str]]:
  """The mesh axes longer than one that logical axes go to."""
  return {
    name: [axis for axis in partitioning.axes_of(entry) if sizes[axis] > 1]
    for name, entry in partitioning.parameter_rules(rules).items()
  }


def _longer_axes(config: Config, plan: Plan) -> list[list[Changes]]:
  """More devices for a row, and fewer rows at a time; the nearest first.

  Sizes are written out: the config may leave another axis to be found.
  """
  data, found = plan.mesh['data'], []
  for factor in (2, 4, 8):
    if data % factor == 0:
      model, context = (
        {f'mesh.{axis}': plan.mesh[axis] * factor, 'mesh.data': data // factor}
        for axis in ('model', 'context')
      )
      found.append([model | _tensor(config), context])
  return found


def _tensor(config: Config) -> dict[str, Any]:
  """Rules that split parameters over `model`, if the config's do not."""
  is_split = partitioning.splits_parameters(config.mesh.rules, 'model')
  return {} if is_split else {'mesh.rules': 'fsdp_tensor'}


def layouts(config: Config, machine: Machine) -> list[Changes]:
  """A handful of layouts to compare, the config's own first."""
  try:
    own = plans.make_mesh(config, machine).shape
  except UserError:  # its line says why
    own = {'slice': max(config.mesh.slice, machine.num_slices)}
  per_slice = len(machine.devices) // own['slice']
  found: list[Changes] = [{}]
  for context, model in ((1, 1), (1, 2), (1, 4), (2, 1), (4, 1), (4, 4)):
    data, rest = divmod(per_slice, context * model)
    sizes = {'data': data, 'context': context, 'model': model}
    rules = _tensor(config) if model > 1 else {}
    same = not rules and all(own.get(k) == n for k, n in sizes.items())
    if not rest and not same:
      found.append({f'mesh.{k}': n for k, n in sizes.items()} | rules)
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
