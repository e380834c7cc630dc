"""Where a device's memory goes, by class.

Arguments are read from the compiled module, padding included, and named by
what the step calls them. Of the temporaries the gradients are known (as large
as the parameters in float32, or as whole ones), and so is what the forward loop
over layers keeps for the backward one: arrays with one row per layer that are
no parameters. The rest is called temporaries. All classes together are what XLA
says it needs.
"""

import math
import re
from collections.abc import Collection
from typing import Any

import jax

from perceiver_ar.config import ModelConfig
from perceiver_ar.plan.hlo import HOST, Array, Module

CLASSES: tuple[str, ...] = (
  'parameters',
  'optimizer_state',
  'gradients',
  'activations',
  'temporaries',
  'cache',
  'batch',
)
_ARGUMENT_CLASSES = (
  (r'^(state\.)?params\b', 'parameters'),
  (r'^state\.', 'optimizer_state'),  # counts too
  (r'^cache\b', 'cache'),
)


def class_of(argument: str) -> str:
  """The class of an argument that the step calls so."""
  for pattern, name in _ARGUMENT_CLASSES:
    if re.search(pattern, argument):
      return name
  return 'batch'


def classify(
  module: Module,
  analysis: Any,
  params: Any,
  gradients: Any | None,
  model: ModelConfig,
) -> dict[str, int]:
  """Bytes of a device by class.

  Args:
    module: compiled.
    analysis: XLA's, of the same.
    params: abstract, with shardings.
    gradients: the same, if there are any.
    model: whose layers a loop runs over.
  """
  sizes = dict.fromkeys(CLASSES, 0)
  for instruction in module.computations[module.entry].values():
    if instruction.opcode == 'parameter':
      for array in instruction.arrays:
        if array.space != HOST:
          sizes[class_of(instruction.op_name)] += array.padded_bytes
  fresh = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
  left = analysis.temp_size_in_bytes + max(fresh, 0)
  if gradients is not None:
    sizes['gradients'] = min(tree_bytes(gradients), left)
    known = shapes(params) | shapes(gradients)
    kept = kept_by_layers(module, known, model)
    sizes['activations'] = min(kept, left - sizes['gradients'])
  sizes['temporaries'] = left - sizes['gradients'] - sizes['activations']
  return sizes


def total(analysis: Any) -> int:
  """What XLA says a device needs for this program."""
  return (
    analysis.argument_size_in_bytes
    + analysis.output_size_in_bytes
    - analysis.alias_size_in_bytes
    + analysis.temp_size_in_bytes
  )


def on_host(analysis: Any) -> int:
  """What it keeps in the memory of the host, of one device."""
  return analysis.host_argument_size_in_bytes + analysis.host_temp_size_in_bytes


def abstract_classes(args: Any) -> dict[str, int]:
  """Bytes of the arguments by class, without padding and a compiled module."""
  sizes = dict.fromkeys(CLASSES, 0)
  state, *rest = args
  for path, leaf in jax.tree_util.tree_leaves_with_path(state):
    prefix = 'state' if hasattr(state, 'params') else 'params'
    name = prefix + jax.tree_util.keystr(path)
    sizes[class_of(name)] += shard_bytes(leaf)
  sizes['batch'] += tree_bytes(rest)
  return sizes


def tree_bytes(tree: Any) -> int:
  """Of a device."""
  return sum(shard_bytes(leaf) for leaf in jax.tree.leaves(tree))


def shard_bytes(leaf: Any) -> int:
  """In the memory of a device; none if the host has it."""
  sharding = getattr(leaf, 'sharding', None)
  shape = sharding.shard_shape(leaf.shape) if sharding else leaf.shape
  if sharding and sharding.memory_kind == 'pinned_host':
    return 0
  return math.prod(shape) * leaf.dtype.itemsize


def shapes(tree: Any) -> set[tuple[int, ...]]:
  """Of all arrays, whole and as each device holds them."""
  found = set()
  for leaf in jax.tree.leaves(tree):
    found |= {_squeezed(leaf.shape)}
    found |= {_squeezed(leaf.sharding.shard_shape(leaf.shape))}
  return found


def _squeezed(shape: tuple[int, ...]) -> tuple[int, ...]:
  """Without the ones, which XLA adds and drops."""
  return tuple(size for size in shape if size != 1)


def kept_by_layers(
  module: Module, params: Collection[tuple[int, ...]], model: ModelConfig
) -> int:
  """Bytes of the arrays of one row per layer that a loop over layers carries.

  The largest such loop is taken: the forward one writes what the backward one
  reads. Parameters, their gradients and copies are left out by their shapes.
  What layers outside of it keep is not known: those that `scan_unroll` leaves
  over, and all if it takes them at once.
  """
  num_trips = model.num_layers // model.scan_unroll
  largest = 0
  for name, instruction, _ in module.runs(num_trips):
    if instruction.opcode != 'while':
      continue
    trips = module.trip_count(name, instruction) or num_trips
    if trips not in (num_trips, num_trips - 1):  # one may be taken out
      continue
    kept = sum(
      array.padded_bytes
      for array in instruction.arrays
      if _is_kept(array, params, model)
    )
    largest = max(largest, kept)
  return largest


def _is_kept(
  array: Array, params: Collection[tuple[int, ...]], model: ModelConfig
) -> bool:
  # Layers stand in front; what was asked for by row may have lost its ones.
  num, unroll = model.num_layers, model.scan_unroll
  rows = (num // unroll, unroll) if unroll > 1 else (num,)
  front, rest = array.dims[: len(rows)], array.dims[len(rows) :]
  return (
    front == rows
    and len(rest) > 1
    and array.space != HOST
    and _squeezed((num, *rest)) not in params
  )
