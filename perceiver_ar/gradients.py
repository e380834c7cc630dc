"""Losses of a batch and their gradients, summed over microbatches and devices.

Letters: B batch, M inputs, N latents, P position axes, V vocabulary.
"""

import contextlib
import functools
from collections.abc import Callable, Collection, Sequence
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from perceiver_ar import logical, losses, parameters, partitioning
from perceiver_ar.config import Config, ModelConfig
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.parameters import Params

Batch: TypeAlias = dict[str, jax.Array]
Sums: TypeAlias = dict[str, jax.Array]


def accumulate(
  params: Params, batch: Batch, key: jax.Array, config: Config
) -> tuple[Params, Sums]:
  """Gradients, in float32, and sums over all microbatches.

  A microbatch's are of the type of compute until they are whole.

  With several microbatches, gradients are added up over the mesh once, when all
  are done, if `train.reduce_gradients_once`; for that a device gathers whole
  parameters once a step, and has whole gradients until the end. If not, those
  that FSDP splits are added up after every microbatch, and only axes before the
  first that splits parameters wait, such as the slow network between slices.
  """
  row_B = jnp.arange(len(batch['tokens']))
  parts = batch | {'row': row_B}
  run = functools.partial(_over_microbatches, config=config)
  axes = _waiting_axes(config)
  if not axes:
    return run(params, parts, key)
  mesh = jax.sharding.get_abstract_mesh()
  specs = jax.tree.map(lambda s: s.spec, parameters.shardings(config, mesh))

  def local(params: Params, parts: Batch, key: jax.Array) -> Any:
    params = _by_hand(_gathered, params, specs, axes)
    grads, sums = run(params, parts, key)
    with jax.named_scope('gradient'):
      reduced = functools.partial(_reduced, axes=axes)
      grads = _by_hand(reduced, grads, specs, axes)
      return grads, jax.lax.psum(sums, axes)

  split_params = jax.tree.map(lambda s: _only(s, axes), specs)
  split_rows = _only(PartitionSpec(partitioning.BATCH_AXES), axes)
  return jax.shard_map(
    local,
    in_specs=(split_params, split_rows, PartitionSpec()),
    out_specs=(split_params, PartitionSpec()),
    axis_names=set(axes),
    check_vma=False,
  )(_kernels_as(config.model.dtype, params), parts, key)


def activations(
  config: Config, mesh: Mesh
) -> contextlib.AbstractContextManager[None]:
  """`logical.activations` of a microbatch."""
  return logical.activations(
    mesh,
    config.mesh.rules,
    num_rows=config.train.batch_size // config.train.num_microbatches,
    num_latents=config.model.num_latents,
  )


def abstract(config: Config, mesh: Mesh) -> Params:
  """Shapes and shardings of gradients while microbatches are added up."""
  with activations(config, mesh):
    waiting = _waiting_axes(config)
  split = [axis for axis in mesh.axis_names if axis not in waiting]
  params = parameters.in_float32(parameters.abstract(config, mesh))
  return jax.tree.map(
    lambda x: x.update(
      sharding=NamedSharding(mesh, _only(x.sharding.spec, split))
    ),
    params,
  )


def _waiting_axes(config: Config) -> tuple[str, ...]:
  """Mesh axes that sums cross when all microbatches are done."""
  train = config.train
  if train.num_microbatches == 1:
    return ()
  once = train.reduce_gradients_once
  return logical.axes_of_sums(config.mesh.rules, once=once)


def _only(spec: PartitionSpec, axes: Collection[str]) -> PartitionSpec:
  """Of what an array is split over, these."""
  split = [[a for a in partitioning.axes_of(x) if a in axes] for x in spec]
  return PartitionSpec(*(tuple(over) or None for over in split))


def _kernels_as(dtype: str, params: Params) -> Params:
  """As the model would cast them, if that makes them and gradients smaller."""
  size = jnp.dtype(dtype).itemsize
  return jax.tree_util.tree_map_with_path(
    lambda path, x: (
      x.astype(dtype)
      if path[-1].key == 'kernel' and x.dtype.itemsize > size
      else x
    ),
    params,
  )


def _by_hand(
  send: Callable[[jax.Array, PartitionSpec], jax.Array],
  tree: Params,
  specs: Any,
  axes: Sequence[str],
) -> Params:
  """`send` of every array; left to XLA, the other axes would be gathered."""
  others = jax.sharding.get_abstract_mesh().auto_axes
  split = jax.tree.map(lambda s: _only(s, others), specs)
  return jax.shard_map(
    lambda tree: jax.tree.map(
      lambda x, s: send(x, _only(s, axes)), tree, specs
    ),
    in_specs=(split,),
    out_specs=split,
    axis_names={*others},
    check_vma=False,
  )(tree)


def _gathered(param: jax.Array, spec: PartitionSpec) -> jax.Array:
  for dim, over in enumerate(spec):
    if over:
      param = jax.lax.all_gather(param, over, axis=dim, tiled=True)
  return param


def _reduced(
  grad: jax.Array, spec: PartitionSpec, axes: Sequence[str]
) -> jax.Array:
  """The sum over `axes`, of which a device keeps the part that is its own."""
  for dim, over in enumerate(spec):
    if over:
      # With more axes behind that one, a TPU would make an all-reduce of it.
      flat = grad.reshape(*grad.shape[: dim + 1], -1)
      flat = jax.lax.psum_scatter(flat, over, scatter_dimension=dim, tiled=True)
      grad = flat.reshape(*flat.shape[:-1], *grad.shape[dim + 1 :])
  split = {axis for entry in spec for axis in partitioning.axes_of(entry)}
  rest = [axis for axis in axes if axis not in split]
  return jax.lax.psum(grad, rest) if rest else grad


def _over_microbatches(
  params: Params, batch: Batch, key: jax.Array, config: Config
) -> tuple[Params, Sums]:
  num = config.train.num_microbatches

  def loss(params: Params, batch: Batch) -> tuple[jax.Array, Sums]:
    return _loss_sum(params, batch, key, config)

  def grad(batch: Batch) -> tuple[Params, Sums]:
    grads, sums = jax.grad(loss, has_aux=True)(params, batch)
    return parameters.in_float32(grads), sums

  if num == 1:
    return grad(batch)

  def split(x: jax.Array) -> jax.Array:
    # Strided, so that every microbatch has rows of every device.
    return x.reshape(-1, num, *x.shape[1:]).swapaxes(0, 1)

  def one(total: Any, micro: Batch) -> tuple[Any, None]:
    return jax.tree.map(jnp.add, total, grad(micro)), None

  parts = jax.tree.map(split, batch)
  first = jax.tree.map(lambda x: x[0], parts)
  # Of the sums the names are asked for, forward alone.
  like = params, jax.eval_shape(loss, params, first)[1]
  zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.float32), like)
  return jax.lax.scan(one, zeros, parts)[0]


def _loss_sum(
  params: Params, batch: Batch, key: jax.Array, config: Config
) -> tuple[jax.Array, Sums]:
  """The summed loss of a microbatch, and what is reported of it."""
  model, N = config.model, config.model.num_latents
  drops = model.dropout_rate or model.input_dropout_rate
  with jax.named_scope('ids'):
    inputs_BM, targets_BN, weights_BN = shift(batch['tokens'], N)
    targets_BN, weights_BN = (
      logical.split(x, ('rows', 'latents')) for x in (targets_BN, weights_BN)
    )
  scores = score_latents(
    params,
    inputs_BM,
    batch['positions'],
    targets_BN,
    model,
    z_loss=config.train.z_loss,
    label_smoothing=config.train.label_smoothing,
    row_B=batch['row'],
    key=key if drops or model.num_kept_inputs else None,
  )
  sums = {name: (x_BN * weights_BN).sum() for name, x_BN in scores.items()}
  sums['num_targets'] = weights_BN.sum()
  return sums['loss'] + sums['z_loss'], sums


def score_latents(
  params: Params,
  inputs_BM: jax.Array,
  positions_BMP: jax.Array,
  targets_BN: jax.Array,
  config: ModelConfig,
  *,
  z_loss: float,
  label_smoothing: float,
  row_B: jax.Array | None = None,
  key: jax.Array | None = None,
) -> Sums:
  """`loss`, `z_loss` and `correct` of every latent, [B, N] float32 each.

  With `model.logits_block` the logits of so many latents of a row exist at a
  time, and are computed again for the backward pass. Nothing is dropped without
  a `key`; `row_B` is that of `PerceiverAR.encode`.
  """
  z_BND = PerceiverAR(config).apply(
    {'params': params},
    inputs_BM,
    positions_BMP,
    num_latents=targets_BN.shape[1],
    row_B=row_B,
    rngs={} if key is None else {'dropout': key},
    method=PerceiverAR.encode,
  )
  assert isinstance(z_BND, jax.Array)

  def score(inputs: tuple[jax.Array, jax.Array]) -> Sums:
    z_BnD, targets_Bn = inputs
    logits_BnV = PerceiverAR(config).apply(
      {'params': params}, z_BnD, method=PerceiverAR.predict
    )
    assert isinstance(logits_BnV, jax.Array)
    loss_Bn, z_loss_Bn = losses.softmax_cross_entropy(
      logits_BnV, targets_Bn, z_loss=z_loss, label_smoothing=label_smoothing
    )
    correct_Bn = (logits_BnV.argmax(-1) == targets_Bn).astype(jnp.float32)
    return {'loss': loss_Bn, 'z_loss': z_loss_Bn, 'correct': correct_Bn}

  B, N = targets_BN.shape
  block = config.logits_block or N
  if block >= N:
    return score((z_BND, targets_BN))
  # Strided, so that every block has latents of every device.
  num = -(-N // block)
  parts = z_BND, targets_BN
  parts = jax.tree.map(lambda x: _strided(x, num), parts)
  scores = jax.lax.map(jax.checkpoint(score), parts)
  return jax.tree.map(
    lambda x_nBb: jnp.moveaxis(x_nBb, 0, 2).reshape(B, -1)[:, :N], scores
  )


def _strided(x_BN: jax.Array, num: int) -> jax.Array:
  """Rows [B, N, ...] as `num` blocks of every num-th latent, zero-padded."""
  B, N = x_BN.shape[:2]
  padding = [(0, 0), (0, -N % num)] + [(0, 0)] * (x_BN.ndim - 2)
  x_BN = jnp.pad(x_BN, padding).reshape(B, -1, num, *x_BN.shape[2:])
  return jnp.moveaxis(x_BN, 2, 0)


def shift(
  tokens_BT: jax.Array, num_latents: int
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Inputs [B, M], and targets and their weights (0 on padding) [B, N]."""
  inputs_BM = tokens_BT[:, :-1]
  targets_BN = tokens_BT[:, -num_latents:]
  is_input_BN = inputs_BM[:, -num_latents:] != 0
  return inputs_BM, targets_BN, is_input_BN.astype(jnp.float32)
