"""Checksums of arrays: the same on every mesh, other for any other bits.

Computed where the arrays are, by one function, from integers alone.
"""

import functools
from collections.abc import Mapping, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

PyTree: TypeAlias = Any


def checksums(tree: PyTree) -> dict[str, str]:
  """Path of every array -> 64 bits in hex, the same on every mesh.

  Each element is mixed with its index, and the results are added modulo
  2**32, twice: integers, so the order of the sum does not matter. Mixing is
  one-to-one, so no change of a single element goes unnoticed.
  """
  arrays = flatten(tree)
  if not arrays:
    return {}
  leaves = [jnp.asarray(leaf) for leaf in arrays.values()]
  compute = _checksum_function(_replicated(leaves))
  # One at a time: a CPU makes temporaries of twice the size of a leaf.
  sums = [np.asarray(compute(leaf)).tolist() for leaf in leaves]
  return {
    name: f'{first:08x}{second:08x}'
    for name, (first, second) in zip(arrays, sums, strict=True)
  }


def flatten(tree: PyTree) -> dict[str, Any]:
  """Path of every leaf, such as params/embed/table, -> the leaf."""
  flat, _ = jax.tree_util.tree_flatten_with_path(tree)
  arrays = {
    jax.tree_util.keystr(path, simple=True, separator='/'): leaf
    for path, leaf in flat
  }
  assert len(arrays) == len(flat), 'two arrays have the same path'
  return arrays


def nest(flat: Mapping[str, Any]) -> dict[str, Any]:
  """Nested dicts with the leaves at these paths."""
  tree: dict[str, Any] = {}
  for path, leaf in flat.items():
    *parents, name = path.split('/')
    node = tree
    for parent in parents:
      node = node.setdefault(parent, {})
    node[name] = leaf
  return tree


def _replicated(leaves: Sequence[jax.Array]) -> jax.sharding.Sharding | None:
  """Where every process can read the sums; None for a single device."""
  for leaf in leaves:
    if isinstance(leaf.sharding, jax.sharding.NamedSharding):
      mesh = leaf.sharding.mesh
      return jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
  return None


@functools.cache
def _checksum_function(sharding: jax.sharding.Sharding | None) -> Any:
  return jax.jit(checksum, out_shardings=sharding)


def checksum(x: jax.Array) -> jax.Array:
  """Two uint32 of one array, or of one shard of it, inside a function."""
  # What is offloaded comes here for it; nothing computes on the host.
  bits = _as_uint32(jax.device_put(x, jax.memory.Space.Device))
  index = jnp.zeros(bits.shape, jnp.uint32)
  for axis, size in enumerate(bits.shape):
    index *= jnp.uint32(size % 2**32)
    index += jax.lax.broadcasted_iota(jnp.uint32, bits.shape, axis)
  key = _mix(index + jnp.uint32(0x9E3779B9))
  first = _mix(bits ^ key)
  second = _mix((bits ^ jnp.uint32(0x6A09E667)) + key)
  return jnp.stack([jnp.sum(y, dtype=jnp.uint32) for y in (first, second)])


def _as_uint32(x: jax.Array) -> jax.Array:
  if x.dtype == jnp.bool:
    return x.astype(jnp.uint32)
  width = min(8 * x.dtype.itemsize, 32)
  # 64-bit numbers become pairs along a new last axis.
  bits = jax.lax.bitcast_convert_type(x, jnp.dtype(f'uint{width}'))
  return bits.astype(jnp.uint32)


def _mix(x: jax.Array) -> jax.Array:
  """A one-to-one scrambling of 32 bits (the finaliser of MurmurHash3)."""
  x = (x ^ (x >> 16)) * jnp.uint32(0x85EBCA6B)
  x = (x ^ (x >> 13)) * jnp.uint32(0xC2B2AE35)
  return x ^ (x >> 16)
