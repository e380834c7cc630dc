"""Looking at checkpoints without their model: list, verify, compare, export.

Nothing is renamed or moved: a run may be writing to the same folder.
"""

import datetime
from collections.abc import Sequence
from typing import Any

import jax
import numpy as np
from etils import epath

from perceiver_ar import checkpoint, config, lines, saved_step
from perceiver_ar.checkpoint import Path
from perceiver_ar.checksums import flatten, nest
from perceiver_ar.errors import UserError
from perceiver_ar.saved_step import Damaged


def list_steps(workdir: Path) -> list[dict[str, Any]]:
  """For each step: `step`, `loss` or None, `bytes` on disk, `created`."""
  rows = []
  for step in checkpoint.saved_steps(workdir):
    folder = checkpoint.step_folder(workdir, step)
    files = [file.stat() for file in _files(folder)]
    # In a bucket folders have no time.
    newest = max((file.mtime for file in files), default=0)
    time = datetime.datetime.fromtimestamp(newest)
    rows.append(
      {
        'step': step,
        'loss': saved_step.read_loss(folder),
        'bytes': sum(file.length for file in files),
        'created': time.isoformat(sep=' ', timespec='seconds'),
      }
    )
  return rows


def _files(path: epath.Path) -> list[epath.Path]:
  if path.is_dir():
    return [file for child in path.iterdir() for file in _files(child)]
  return [path]


def verify(workdir: Path) -> list[dict[str, Any]]:
  """For each step: `step`, `ok`, `reason` if not. Changes nothing.

  Needs neither the model nor the mesh: one array at a time is read onto one
  device. Steps that a run removes meanwhile are left out.
  """
  rows = []
  for step in checkpoint.saved_steps(workdir):
    reason = ''
    try:
      folder = checkpoint.step_folder(workdir, step)
      for name in saved_step.read_manifest(folder)['arrays']:
        read_arrays(folder, [name])
    except UserError as error:
      if step not in checkpoint.saved_steps(workdir):
        continue
      if not isinstance(error, Damaged):
        raise
      reason = error.reason
    rows.append({'step': step, 'ok': not reason, 'reason': reason})
  return rows


def diff(
  workdir: Path, step: int | None, other: Path, other_step: int | None
) -> dict[str, Any]:
  """What differs between two steps: `config` keys and `arrays`.

  Args:
    workdir: of the first.
    step: of the first; None takes the newest.
    other: workdir of the second, perhaps the same.
    other_step: of the second; None takes the newest.

  Returns:
    `steps`, `config` (lines) and `arrays`, which has for each that differs
    its `name` and either `shapes` or `largest_difference`.
  """
  steps = _chosen(workdir, step), _chosen(other, other_step)
  folders = [
    checkpoint.step_folder(d, s)
    for d, s in zip((workdir, other), steps, strict=True)
  ]
  configs = [
    checkpoint.load_config(d, s)
    for d, s in zip((workdir, other), steps, strict=True)
  ]
  names = [saved_step.read_manifest(folder)['arrays'] for folder in folders]
  rows = []
  for name in sorted({*names[0], *names[1]}):
    a, b = (
      read_arrays(folder, [name])[name] if name in there else None
      for folder, there in zip(folders, names, strict=True)
    )
    if a is None or b is None or a.shape != b.shape or a.dtype != b.dtype:
      rows.append({'name': name, 'shapes': [_shape(a), _shape(b)]})
    elif a.tobytes() != b.tobytes():
      off = _largest_difference(a, b)
      rows.append({'name': name, 'largest_difference': lines.plain(off)})
  return {
    'steps': steps,
    'config': config.differences(*configs),
    'arrays': rows,
  }


def _largest_difference(a: np.ndarray, b: np.ndarray) -> float:
  """Of two arrays; NaN where one alone has it."""
  a, b = a.astype(np.float64), b.astype(np.float64)
  with np.errstate(invalid='ignore'):  # infinity less infinity
    off = np.where((a == b) | (np.isnan(a) & np.isnan(b)), 0.0, np.abs(a - b))
  return float(off.max())


def export(workdir: Path, step: int | None, path: Path) -> dict[str, Any]:
  """Writes the parameters of a step as one safetensors file.

  Names are paths such as layers/attention/query/kernel; layers are stacked
  along the first axis. The metadata holds the step.
  """
  from safetensors.numpy import save

  step = _chosen(workdir, step)
  folder, prefix = checkpoint.step_folder(workdir, step), 'params/'
  known = saved_step.read_manifest(folder)['arrays']
  arrays = {  # one by one: all are more than a device may hold
    name.removeprefix(prefix): read_arrays(folder, [name])[name]
    for name in known
    if name.startswith(prefix)
  }
  target = epath.Path(path)
  target.parent.mkdir(parents=True, exist_ok=True)
  target.write_bytes(save(arrays, metadata={'step': str(step)}))
  num = sum(array.size for array in arrays.values())
  return {'step': step, 'arrays': len(arrays), 'parameters': num}


def read_arrays(
  folder: epath.Path, names: Sequence[str]
) -> dict[str, np.ndarray]:
  """Those of a step, checked, by way of one device.

  Raises:
    Damaged: the files are not those that were saved.
  """
  sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  known = saved_step.read_manifest(folder)['arrays']
  abstract = {
    name: jax.ShapeDtypeStruct(shape, dtype, sharding=sharding)
    for name in names
    for dtype, shape, _ in [known[name]]
  }
  tree = saved_step.restore(folder, nest(abstract), '', partial=True)
  return {name: np.asarray(array) for name, array in flatten(tree).items()}


def _chosen(workdir: Path, step: int | None) -> int:
  steps = checkpoint.saved_steps(workdir)
  if not steps:
    raise UserError(
      f'{workdir} holds no checkpoint; --workdir must be the folder of a run'
    )
  return steps[-1] if step is None else step


def _shape(array: np.ndarray | None) -> str:
  if array is None:
    return 'absent'
  return f'{array.dtype.name}[{",".join(map(str, array.shape))}]'
