"""Reads published weights from disk, without running what is in the file.

Two formats hold them: an .npz with the weights as `p/MODULE/LEAF` (gradients
as `g/...`, a `config` in JSON, and inputs with what the model made of them),
and the pickled checkpoints, nested dicts of module -> leaf -> array.
"""

import dataclasses
import io
import json
import zipfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import archives
import array_pickles
import numpy as np

from perceiver_ar.errors import UserError

ROOT = 'perceiver_ar'
"""The Haiku module that all others are in."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Published:
  """What a file holds.

  Attributes:
    path: of the file.
    config: of the model; empty for a pickle.
    weights: by name, such as perceiver_ar/~/embed/embeddings.
    gradients: by the same names.
    examples: everything else: inputs, logits, losses.
    notes: what was done on reading that the user should know.
  """

  path: Path
  config: dict[str, Any]
  weights: dict[str, np.ndarray]
  gradients: dict[str, np.ndarray]
  examples: dict[str, np.ndarray]
  notes: tuple[str, ...]


def read_npz(path: Path) -> Published:
  content = io.BytesIO(_read(path))
  try:
    with zipfile.ZipFile(content) as archive:
      archives.check_zip(path, archive, len(content.getbuffer()))
    content.seek(0)
    with np.load(content, allow_pickle=False) as file:
      arrays = {name: file[name] for name in file.files}
  except UserError:
    raise
  except Exception as error:  # a damaged file raises anything
    raise UserError(
      f'{path} is no .npz of plain arrays ({_one_line(error)}); give a file '
      'that numpy.savez wrote'
    ) from error
  weights = _below('p/', arrays)
  if not weights:
    raise UserError(
      f'{path} holds no weights: none of its {len(arrays)} arrays is named '
      'p/MODULE/LEAF'
    )
  rest = {k: v for k, v in arrays.items() if k[:2] not in ('p/', 'g/')}
  config = _read_config(rest.pop('config', None), path)
  return Published(
    path=path,
    config=config,
    weights=weights,
    gradients=_below('g/', arrays),
    examples=rest,
    notes=(),
  )


def read_pickle(path: Path) -> Published:
  content = io.BytesIO(_read(path))
  try:
    tree = array_pickles.load(content)
  except UserError as error:
    raise UserError(
      f'{path} {error}; pickle the parameters as nested dicts of numpy arrays'
    ) from error
  except Exception as error:  # a damaged pickle raises anything
    raise UserError(
      f'{path} is no readable pickle ({_one_line(error)}); give one of nested '
      'dicts of numpy arrays'
    ) from error
  found = list(_parameter_dicts(tree, ''))
  if len(found) != 1:
    where = ', '.join(place or 'the top' for place, _ in found)
    raise UserError(
      f'{path} holds {len(found)} dicts of modules named {ROOT}/...'
      f'{" (" + where + ")" if found else ""}, and must hold one; pickle the '
      'dict of the parameters alone'
    )
  weights, notes = _without_replicas(_leaves(found[0][1], path), path)
  return Published(
    path=path,
    config={},
    weights=weights,
    gradients={},
    examples={},
    notes=notes,
  )


def _read(path: Path) -> bytes:
  try:
    return path.read_bytes()
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror}); give the file with the '
      'weights'
    ) from error


def _one_line(error: Exception) -> str:
  return ' '.join(f'{type(error).__name__}: {error}'.split())[:200]


def _below(prefix: str, arrays: Mapping[str, np.ndarray]) -> dict[str, Any]:
  return {
    name.removeprefix(prefix): array
    for name, array in arrays.items()
    if name.startswith(prefix)
  }


def _read_config(array: np.ndarray | None, path: Path) -> dict[str, Any]:
  if array is None:
    return {}
  try:
    config = json.loads(str(array))
  except (ValueError, RecursionError) as error:
    raise UserError(
      f"{path}: 'config' is not JSON ({error}); write it with json.dumps"
    ) from error
  if not isinstance(config, dict):
    raise UserError(f"{path}: 'config' is {config!r}; it must be an object")
  return config


def _parameter_dicts(
  tree: Any, place: str
) -> Iterator[tuple[str, dict[Any, Any]]]:
  """All dicts, at any depth, whose keys are names of the model's modules."""
  if not isinstance(tree, dict):
    return
  if any(str(key).startswith(f'{ROOT}/') for key in tree):
    yield place, tree
    return
  for key, child in tree.items():
    yield from _parameter_dicts(child, f'{place}/{key}' if place else str(key))


def _leaves(modules: Mapping[Any, Any], path: Path) -> dict[str, np.ndarray]:
  weights = {}
  for module, leaves in modules.items():
    if not isinstance(leaves, dict):
      raise UserError(
        f'{path}: module {module} is a {type(leaves).__name__}; it must be a '
        'dict of arrays'
      )
    for leaf, array in leaves.items():
      if not isinstance(array, np.ndarray):
        raise UserError(
          f'{path}: weight {module}/{leaf} is a {type(array).__name__}; it '
          'must be an array'
        )
      weights[f'{module}/{leaf}'] = np.asarray(array)
  return weights


def _without_replicas(
  weights: dict[str, np.ndarray], path: Path
) -> tuple[dict[str, np.ndarray], tuple[str, ...]]:
  """Takes the first of the copies, one per device, that a run has saved."""
  table = weights.get(f'{ROOT}/~/embed/embeddings')
  if table is None or table.ndim != 3:
    return weights, ()
  num = len(table)
  for name, array in weights.items():
    if array.shape[:1] != (num,):
      raise UserError(
        f'{path}: weight {name} has the shape {array.shape} and no axis of '
        f'{num} replicas, as the embedding {table.shape} has; take one replica '
        'of every weight'
      )
  note = f'every weight has {num} replicas: the first is taken'
  return {name: array[0] for name, array in weights.items()}, (note,)
