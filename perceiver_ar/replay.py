"""A step of a run once more, in one process, beside what was recorded.

From the newest sound checkpoint before it, whose bits are known to be those
that were saved, with the batches that the config gives: so what comes out
otherwise than in metrics.jsonl is due to the code, the packages, the hardware,
or a value that was corrupted. Nothing is written to the workdir.
"""

import contextlib
import dataclasses
import math
from collections.abc import Iterator, Sequence
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from perceiver_ar import (
  checkpoint,
  lines,
  mesh_checks,
  metrics,
  partitioning,
  prefetch,
  saved_step,
  starting,
  train_step,
  workdir,
)
from perceiver_ar import config as config_lib
from perceiver_ar.config import Config, MeshConfig
from perceiver_ar.data import pipeline
from perceiver_ar.errors import UserError
from perceiver_ar.metrics import Row
from perceiver_ar.progress import Progress
from perceiver_ar.train_step import TrainState

_FIELDS = ('data_digest', 'loss', 'grad_norm', 'learning_rate', 'skipped')
# Relative, by the type of compute: sums are taken in another order where
# there are other devices, and each step goes on from the last one's.
_TOLERANCE = {'float32': 1e-3, 'bfloat16': 1e-2}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Report:
  """What was computed, and what it should have been.

  Attributes:
    first: the step of the state that it began with.
    origin: of that state, in words.
    replayed: rows of the steps from `first` on; the last is asked for.
    recorded: those of metrics.jsonl, None where it has none.
    tolerance: relative difference that is taken as none.
    versions: of packages that are others than the checkpoint was written with.
  """

  first: int
  origin: str
  replayed: Sequence[Row]
  recorded: Sequence[Row | None]
  tolerance: float
  versions: Sequence[str]

  @property
  def step(self) -> int:
    return self.first + len(self.replayed) - 1

  @property
  def agrees(self) -> bool:
    """Of all steps that are recorded, and the last one is."""
    return self.recorded[-1] is not None and self.first_off() is None

  def differences(self, step: int) -> dict[str, float] | None:
    """Relative, by field; None if the step has no record."""
    at = step - self.first
    old, new = self.recorded[at], self.replayed[at]
    if old is None:
      return None
    return {name: relative(new[name], old[name]) for name in _FIELDS}

  def first_off(self) -> tuple[int, str] | None:
    """The first step, and its field, that is not within the tolerance."""
    for step in range(self.first, self.step + 1):
      for name, off in (self.differences(step) or {}).items():
        if off > self.tolerance:
          return step, name
    return None

  def to_dict(self) -> dict[str, Any]:
    """Plain values for JSON."""
    off = self.differences(self.step)
    recorded = self.recorded[-1]
    return {
      'step': self.step,
      'first_step': self.first,
      'origin': self.origin,
      'agrees': self.agrees,
      'conclusion': conclude(self),
      'tolerance': self.tolerance,
      'replayed': _chosen(self.replayed[-1]),
      'recorded': recorded and _chosen(recorded),
      'relative_difference': off and _chosen(off),
      'on_the_way': count(self),
    }


def relative(new: Any, old: Any) -> float:
  """The difference of two values, 0 of the same ones, by the larger."""
  if new == old or (new != new and old != old):
    return 0.0
  if isinstance(old, str) or not (math.isfinite(new) and math.isfinite(old)):
    return math.inf
  return abs(new - old) / max(abs(new), abs(old))


def replay(config: Config, folder: epath.PathLike, step: int) -> Report:
  """Computes a step again.

  Args:
    config: of the run, but for what changes no result. A mesh that is the
      run's own, and does not fit this process, becomes all its devices as
      `data`.
    folder: the workdir.
    step: the update from state `step` to `step` + 1.

  Raises:
    UserError: nothing is recorded there, or the config or the data are not
      those of the run.
  """
  recorded = _recorded(folder, step)
  documents = pipeline.open_documents(
    config.data, 'train', seed=config.train.seed
  )
  pipeline.check_compatible(config.model, documents)
  workdir.check(folder, config, documents)
  own = config_lib.resolve(workdir.read_config(folder)).mesh
  mesh, rules = make_mesh(config.mesh, own, jax.devices())
  config = dataclasses.replace(
    config, mesh=dataclasses.replace(config.mesh, rules=rules)
  )
  until = dataclasses.replace(config.train, num_steps=step + 1)
  none = dataclasses.replace(config.evaluate, every=0)
  config = dataclasses.replace(config, train=until, evaluate=none)
  mesh_checks.check_train(config, mesh)
  first, state, origin = _begin(config, folder, mesh, documents, step)
  steps = f'step {step}' if step == first else f'steps {first} to {step}'
  print(f'replays {steps} from {origin}, {_devices(mesh)}')
  rows = list(_steps(config, mesh, state, documents, first))
  return Report(
    first=first,
    origin=origin,
    replayed=rows,
    recorded=[recorded.get(s) for s in range(first, step + 1)],
    tolerance=_TOLERANCE[config.model.dtype],
    versions=_other_versions(folder, first) if first else [],
  )


def _recorded(folder: epath.PathLike, step: int) -> dict[int, Row]:
  rows, _ = metrics.read(folder)
  steps = {row['step']: row for row in rows}
  if not steps:
    raise UserError(
      f'{epath.Path(folder) / "metrics.jsonl"} has no training step yet; '
      'train first'
    )
  if not min(steps) <= step <= max(steps):
    raise UserError(
      f'--step={step} is not among the steps {min(steps)} to {max(steps)} of '
      f'{epath.Path(folder) / "metrics.jsonl"}; use one of these'
    )
  return steps


def make_mesh(
  asked: MeshConfig, own: MeshConfig, devices: Sequence[Any]
) -> tuple[Mesh, str]:
  """What is asked for, of some of the devices if it is small, and its rules.

  The run's `own`, where it does not fit them, is all of them as `data`, over
  which parameters are split.
  """
  sizes = [getattr(asked, axis) for axis in config_lib.MESH_AXES]
  num = len(devices) if -1 in sizes else math.prod(sizes)
  try:
    return partitioning.make_mesh(asked, devices[:num]), asked.rules
  except UserError:
    if asked != own:
      raise
  spread = dataclasses.replace(asked, slice=1, data=-1, context=1, model=1)
  return partitioning.make_mesh(spread, devices), 'fsdp'


def _begin(
  config: Config,
  folder: epath.PathLike,
  mesh: Mesh,
  documents: pipeline.DocumentSource,
  step: int,
) -> tuple[int, TrainState, str]:
  """The step and the state to go on from, and where it is from."""
  abstract = train_step.abstract_state(config, mesh)
  restored = checkpoint.restore_until(
    folder, abstract, step, config.checkpoint.max_host_gb
  )
  if restored is None:
    state = starting.first_state(config, mesh, documents)
    source = config.checkpoint.init_from or f'seed {config.train.seed}'
    return 0, state, f'{source}, as there is no sound checkpoint before'
  first, state = restored
  workdir.check_config(folder, checkpoint.load_config(folder, first), config)
  return first, state, f'checkpoint {first}'


def _devices(mesh: Mesh) -> str:
  axes = ', '.join(f'{n} {s}' for n, s in mesh.shape.items() if s > 1)
  kind = mesh.devices.ravel()[0].device_kind
  return f'on {mesh.size} x {kind}' + (f' ({axes})' if axes else '')


def _steps(
  config: Config,
  mesh: Mesh,
  state: TrainState,
  documents: pipeline.DocumentSource,
  first: int,
) -> Iterator[Row]:
  """Rows from `first` to the end of the config."""
  total = config.train.num_steps
  with (
    contextlib.closing(
      prefetch.placed_batches(config, documents, mesh, first)
    ) as batches,
    Progress('replay', total - first, 'steps') as progress,
  ):
    run = None
    for batch in batches:
      if batch.error is not None:
        raise batch.error
      run = run or starting.compile_step(config, mesh, state, batch.arrays)
      state, sums = run(state, batch.arrays)
      values = {name: float(value) for name, value in sums.items()}
      progress.advance(1)
      yield metrics.step_row(values, pipeline.format_digest(batch.digest))


def _other_versions(folder: epath.PathLike, step: int) -> list[str]:
  path = checkpoint.step_folder(folder, step)
  then = saved_step.read_manifest(path)['versions']
  now = saved_step.versions()
  return [
    f'{name} {then.get(name)} -> {now[name]}'
    for name in now
    if now[name] != then.get(name)
  ]


def _chosen(row: Row) -> dict[str, Any]:
  return {name: lines.plain(row[name]) for name in _FIELDS}


def count(report: Report) -> dict[str, int]:
  """How many steps before the last one are what was recorded."""
  counts = {'identical': 0, 'close': 0, 'other': 0, 'not_recorded': 0}
  for step in range(report.first, report.step):
    off = report.differences(step)
    largest = max(off.values()) if off else 0.0
    if off is None:
      counts['not_recorded'] += 1
    elif not largest:
      counts['identical'] += 1
    else:
      counts['close' if largest <= report.tolerance else 'other'] += 1
  return counts


def render(report: Report) -> str:
  """A small table, and what it means."""
  new, old = report.replayed[-1], report.recorded[-1]
  off = report.differences(report.step)
  table = [(f'step {report.step}', 'replayed', 'recorded', 'difference')]
  for name in _FIELDS:
    table.append(
      (
        name,
        str(new[name]),
        str(old[name]) if old else 'not there',
        _difference(off[name]) if off else '',
      )
    )
  widths = [max(len(row[i]) for row in table) for i in range(4)]
  told = [
    '  '.join(x.ljust(n) for x, n in zip(row, widths, strict=True)).rstrip()
    for row in table
  ]
  if report.step > report.first:
    n = count(report)
    told.append(
      f'on the way from step {report.first}: {n["identical"]} identical, '
      f'{n["close"]} within {report.tolerance}, {n["other"]} other, '
      f'{n["not_recorded"]} not recorded'
    )
  return '\n'.join([*told, conclude(report)]) + '\n'


def _difference(off: float) -> str:
  if not off:
    return 'identical'
  return 'other' if math.isinf(off) else f'{off:.1e}'


def conclude(report: Report) -> str:
  """One sentence: what is off, and what that suggests."""
  if report.recorded[-1] is None:
    return (
      f'metrics.jsonl has no row of step {report.step}, dropped or never '
      'written: there is nothing to compare it with'
    )
  found = report.first_off()
  if found is None:
    off = report.differences(report.step) or {}
    if not any(off.values()):
      return f'step {report.step} is bit for bit what was recorded'
    return (
      f'step {report.step} is what was recorded within {report.tolerance}, '
      'but not bit for bit: as with other devices, or another mesh'
    )
  step, name = found
  if name == 'data_digest':
    return f'from step {step} on the data are others than the run had'
  versions = f' ({", ".join(report.versions)})' if report.versions else ''
  return (
    f'{name} is another from step {step} on, with the same data: other code, '
    f'packages{versions} or hardware than the run had, a value that was '
    'corrupted in the run, or a record that was altered'
  )
