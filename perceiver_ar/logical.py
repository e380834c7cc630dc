"""What the logical axes of activations mean inside a compiled function.

Models name the axes of what they compute ('batch', 'rows', 'heads', ...), and
pin with `constrain` where it lies. XLA sends what has to be sent for that, but
for the mesh axes that a `shard_map` around takes by hand: over these a device
computes with what it has.
"""

import contextlib
import contextvars
import itertools
from collections.abc import Iterator, Sequence

import jax
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar.errors import UserError
from perceiver_ar.partitioning import (
  BATCH_AXES,
  Rules,
  axes_of,
  num_parts,
  parameter_rules,
)

Axes = Sequence[str | None]
"""Logical names of the axes of an array; None: whole."""

_IN_FORCE: contextvars.ContextVar[Rules] = contextvars.ContextVar('rules')


@contextlib.contextmanager
def activations(
  mesh: Mesh, name: str, *, num_rows: int, num_latents: int
) -> Iterator[None]:
  """Inside a compiled function: logical axes of activations mean `mesh`'s.

  Inputs lie over `batch` x `context`. Latents have their `rows` over the
  context axis as well, or, where there are too few rows, split themselves.

  Args:
    mesh: of the arrays.
    name: of the rules for parameters.
    num_rows: B of a forward pass, over all devices.
    num_latents: N.
  """
  rows, latents = latent_axes(mesh, num_rows, num_latents)
  axes: Rules = {
    'batch': BATCH_AXES,
    'context': 'context',
    'rows': rows,
    'latents': latents,
  }
  with _rules(mesh, name, axes):
    yield


@contextlib.contextmanager
def decoding(mesh: Mesh, name: str) -> Iterator[None]:
  """The same for sampling: the context axis has other samples."""
  rows = (*BATCH_AXES, 'context')
  axes: Rules = {
    'batch': rows,
    'context': None,
    'rows': rows,
    'latents': None,
  }
  with _rules(mesh, name, axes):
    yield


def decoding_sharding(mesh: Mesh, axis: int) -> NamedSharding:
  """Of arrays whose `axis` counts samples."""
  return NamedSharding(
    mesh, PartitionSpec(*[None] * axis, (*BATCH_AXES, 'context'))
  )


@contextlib.contextmanager
def _rules(mesh: Mesh, name: str, axes: Rules) -> Iterator[None]:
  # `embed` is whole: FSDP shards parameters, not activations.
  rules = {**parameter_rules(name), **axes, 'embed': None}
  token = _IN_FORCE.set(rules)
  try:
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
      yield
  finally:
    _IN_FORCE.reset(token)


def mesh_axes(axes: Axes) -> list[tuple[str, ...]]:
  """What every one of these is split over where rules are in force.

  Raises:
    KeyError: one has no rule.
  """
  rules = _IN_FORCE.get()
  return [axes_of(rules[axis]) if axis else () for axis in axes]


def spec(axes: Axes) -> PartitionSpec:
  """The same for XLA, which leaves alone what is by hand."""
  manual = jax.sharding.get_abstract_mesh().manual_axes
  left = [tuple(a for a in over if a not in manual) for over in mesh_axes(axes)]
  return PartitionSpec(*(over or None for over in left))


def constrain(x: jax.Array, axes: Axes) -> jax.Array:
  """Pins where `x` lies; nothing where no rules are in force."""
  if not _IN_FORCE.get({}):
    return x
  return jax.lax.with_sharding_constraint(x, spec(axes))


def split(x: jax.Array, axes: Axes) -> jax.Array:
  """The same for what every device of `context` has whole so far."""
  mesh = jax.sharding.get_abstract_mesh()
  if 'context' not in mesh.manual_axes:
    return constrain(x, axes)
  for dim, over in enumerate(mesh_axes(axes)):
    if 'context' in over:
      size = x.shape[dim] // mesh.shape['context']
      first = jax.lax.axis_index('context') * size
      x = jax.lax.dynamic_slice_in_dim(x, first, size, dim)
  return constrain(x, axes)


def axes_of_sums(name: str, *, once: bool) -> tuple[str, ...]:
  """Mesh axes over which gradients can wait for all microbatches.

  Those that rows of latents are split over, up to one that cannot: rows are
  counted along the first axes first. With whole gradients on every device,
  `once`, that is one which splits a parameter together with an axis that rows
  are not split over; else any that splits parameters.
  """
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return ()
  rows = mesh_axes(('rows',))[0]
  last = set()
  for axes in map(axes_of, parameter_rules(name).values()):
    if not once or any(a not in rows and mesh.shape[a] > 1 for a in axes):
      last |= set(axes)
  large = [axis for axis in rows if mesh.shape[axis] > 1]
  return tuple(itertools.takewhile(lambda axis: axis not in last, large))


def latent_axes(
  mesh: Mesh, num_rows: int, num_latents: int
) -> tuple[tuple[str, ...], str | None]:
  """The mesh axes of the rows of latents, and of the latents of a row.

  Raises:
    UserError: neither divides.
  """
  ways, context = num_parts(mesh, BATCH_AXES), mesh.shape['context']
  if num_rows % (ways * context) == 0:
    return (*BATCH_AXES, 'context'), None
  if num_rows % ways == 0 and num_latents % context == 0:
    return BATCH_AXES, 'context'
  raise UserError(
    f'mesh.context {context} divides neither the {num_rows} rows of a pass, '
    f'split {ways} ways by slice and data already, nor {num_latents} latents; '
    'change the batch size (evaluate.batch_size; train.batch_size / '
    'train.num_microbatches), the latents or the mesh'
  )
