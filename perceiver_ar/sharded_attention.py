"""Attention on a mesh: every device with its own rows, heads and inputs.

Kernels know nothing of meshes, and XLA cannot split them, so each call runs
inside `shard_map`, with what the logical axes of queries and keys mean on the
mesh of the context. Without one (a model that is only initialised, or scored
on one device) the kernel is called as it is.

Letters: B batch, N queries, M keys, F channels of all heads.
"""

import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint
from jax.sharding import AbstractMesh, PartitionSpec

from perceiver_ar import logical, partitioning
from perceiver_ar.config import ModelConfig
from perceiver_ar.ops import attention, context_parallel
from perceiver_ar.ops.attention import Kernel
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns

LATENTS = ('rows', 'latents', 'heads')
INPUTS = ('batch', 'context', 'heads')


def attend(
  config: ModelConfig,
  head_size: int,
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  key_axes: tuple[str, ...],
) -> jax.Array:
  """Latents to `INPUTS`, of which a device keeps its part, or to `LATENTS`."""
  mesh = jax.sharding.get_abstract_mesh()
  kernel = choose(config, mesh, head_size)
  if mesh.empty:
    return attention.attend(q_BNF, k_BMF, v_BMF, mask, turns, kernel)
  queries, keys = logical.mesh_axes(LATENTS), logical.mesh_axes(key_axes)
  (axis,) = keys[1] or (None,)

  def local(
    q_BNF: jax.Array,
    k_BMF: jax.Array,
    v_BMF: jax.Array,
    mask: Mask,
    turns: Turns,
  ) -> jax.Array:
    if axis is not None and mesh.shape[axis] > 1:
      if key_axes == INPUTS:
        split = context_parallel.Split(axis, dim=1 if queries[1] else 0)
        return context_parallel.attend(
          q_BNF, k_BMF, v_BMF, mask, turns, kernel, split
        )
      k_BMF, v_BMF, mask, turns = context_parallel.with_all_keys(
        k_BMF, v_BMF, mask, turns, axis
      )
    return attention.attend(q_BNF, k_BMF, v_BMF, mask, turns, kernel)

  where = logical.spec(LATENTS), logical.spec(key_axes)
  return _map(local, *where, q_BNF, k_BMF, v_BMF, mask, turns)


def attend_cache(
  config: ModelConfig,
  head_size: int,
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
) -> jax.Array:
  """A few queries to a cache of rotated keys: XLA splits it as any matmul."""
  name = cache_name(config)
  kernel = Kernel(name, config.attention_block, head_size, interpret=False)
  return attention.attend(q_BNF, k_BMF, v_BMF, mask, turns, kernel)


def cache_name(config: ModelConfig) -> str:
  """Of what attends to a cache: for a few queries no kernel is worth it."""
  return 'reference' if config.attention == 'reference' else 'chunked'


def row_major(x: jax.Array, axes: Sequence[str]) -> jax.Array:
  """Keeps XLA from turning an array around, as kernels would turn it back.

  On TPU, where it does. By hand, as XLA's partitioner would gather the array.
  """
  mesh = jax.sharding.get_abstract_mesh()
  device = mesh.abstract_device
  if device is None or device.platform != 'tpu':
    return x
  layout = Layout(tuple(range(x.ndim)))
  where = logical.spec(axes)
  return jax.shard_map(
    lambda x: with_layout_constraint(x, layout),
    in_specs=where,
    out_specs=where,
    axis_names={*mesh.auto_axes},
    check_vma=False,
  )(x)


def sum_inputs(x_BMF: jax.Array, ids_BM: jax.Array, num_rows: int) -> jax.Array:
  """Sums of `INPUTS` that have the same id, float32 [V, F] of `num_rows` V.

  Sorted by id on every device first. XLA would sort them itself, but write all
  of them in float32 before.
  """

  def local(x_BMF: jax.Array, ids_BM: jax.Array) -> jax.Array:
    order = jnp.argsort(ids_BM.reshape(-1))
    x_TF = x_BMF.reshape(-1, x_BMF.shape[-1])[order]
    sums_VF = jnp.zeros((num_rows, x_TF.shape[1]), jnp.float32)
    sums_VF = sums_VF.at[ids_BM.reshape(-1)[order]].add(
      x_TF.astype(jnp.float32),
      mode='drop',
      indices_are_sorted=True,
      wrap_negative_indices=False,
    )
    return jax.lax.psum(sums_VF, axes) if axes else sums_VF

  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    axes = ()
    return local(x_BMF, ids_BM)
  where = logical.spec(INPUTS)
  axes = partitioning.axes_of(where[0]) + partitioning.axes_of(where[1])
  return jax.shard_map(
    local,
    in_specs=(where, PartitionSpec(*where[:2])),
    out_specs=PartitionSpec(None, where[2]),
    axis_names={*mesh.auto_axes},
    check_vma=False,
  )(x_BMF, ids_BM)


def num_input_shards() -> int:
  """Over how many devices the inputs of a pass are spread."""
  mesh = jax.sharding.get_abstract_mesh()
  if mesh.empty:
    return 1
  rows, inputs = logical.spec(INPUTS)[:2]
  axes = partitioning.axes_of(rows) + partitioning.axes_of(inputs)
  return math.prod(mesh.shape[axis] for axis in axes)


def choose(config: ModelConfig, mesh: AbstractMesh, head_size: int) -> Kernel:
  platform = jax.default_backend()
  if not mesh.empty and mesh.abstract_device is not None:
    platform = mesh.abstract_device.platform
  return attention.choose(
    config.attention,
    config.attention_block,
    platform=platform,
    dtype=config.dtype,
    head_size=head_size,
  )


def names(config: ModelConfig, mesh: AbstractMesh) -> list[str]:
  """Of the kernels of cross- and self-attention, each once."""
  cross = config.embed_width // config.num_cross_heads
  own = config.width // config.num_self_heads
  return list(dict.fromkeys(choose(config, mesh, n).name for n in (cross, own)))


def _map(
  local: Callable[..., jax.Array],
  queries: PartitionSpec,
  keys: PartitionSpec,
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
) -> jax.Array:
  # What they have of each row, or of each key of a row, lies with the keys.
  masks = jax.tree.map(lambda x: PartitionSpec(*keys[: x.ndim]), mask)
  turned = jax.tree.map(lambda _: PartitionSpec(*queries[:2]), turns.queries)
  turned = Turns(
    turned, jax.tree.map(lambda _: PartitionSpec(*keys[:2]), turns.keys)
  )
  return jax.shard_map(
    local,
    in_specs=(queries, keys, keys, masks, turned),
    out_specs=queries,
    axis_names={*jax.sharding.get_abstract_mesh().auto_axes},
    check_vma=False,
  )(q_BNF, k_BMF, v_BMF, mask, turns)
