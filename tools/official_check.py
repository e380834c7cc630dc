"""Runs imported weights on the inputs of their file: do the outputs agree?

Letters: B examples, M inputs, N latents, V vocabulary.
"""

import functools
import math
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import official_config
import official_data
import official_weights
from official_data import Examples
from official_files import Published

from perceiver_ar import losses
from perceiver_ar.checksums import flatten
from perceiver_ar.config import ModelConfig
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR

TOLERANCE = 2e-5
_Z_LOSS = 1e-4  # as published
_PARTS = ('logits', 'loss', 'total_loss', 'gradients')


def compare(
  published: Published,
  model: ModelConfig,
  params: Any,
  examples: Examples | None,
) -> dict[str, Any]:
  """How far our outputs are from those in the file.

  Returns:
    `logits` and `loss` (per target): the largest difference. `total_loss`:
    the difference relative to max(1, total), since float32 holds no more of a
    sum. `gradients`: the largest difference relative to the largest gradient.
    None for what the file does not have, which `not_checked` lists; and
    `tolerance` and `ok`.
  """
  if examples is None or examples.positions_BMP is None:
    raise UserError(
      f'{published.path} has no inputs with their positions, so nothing can '
      'be checked; leave --check out'
    )
  labels_BN, mask_BN = _labels(published, model, examples)
  with_gradients = labels_BN is not None and bool(published.gradients)
  logits_BNV, loss_BN, grads = _run(
    model, params, examples, labels_BN, mask_BN, with_gradients=with_gradients
  )
  found = _outputs(published, model, examples, logits_BNV, loss_BN, mask_BN)
  missing = []
  if with_gradients:
    found['gradients'], missing = _gradients(published, model, grads)
  missing = [part for part in _PARTS if found[part] is None] + missing
  values = [value for value in found.values() if value is not None]
  if not values:
    raise UserError(
      f'{published.path} has no logits, losses or gradients, so nothing can '
      'be checked; leave --check out'
    )
  return {
    # JSON has no number for what is none.
    **{
      k: v if v is None or math.isfinite(v) else str(v)
      for k, v in found.items()
    },
    'not_checked': missing,
    'tolerance': TOLERANCE,
    'ok': all(value <= TOLERANCE for value in values),
  }


def inconsistency(published: Published) -> str | None:
  """What is wrong with the file's own sum of its losses, if anything."""
  arrays, path = published.examples, published.path
  if not {'loss', 'total_loss'} <= set(arrays):
    return None
  total = float(official_data.checked(arrays, 'total_loss', (), path))
  loss_BN = arrays['loss'].astype(np.float64)
  if 'loss_mask' in arrays:
    mask_BN = official_data.checked(arrays, 'loss_mask', loss_BN.shape, path)
    loss_BN = np.where(mask_BN, loss_BN, 0)
  if abs(total - loss_BN.sum()) <= TOLERANCE * max(1, abs(total)):
    return None
  return (
    f"the file's total_loss {total} is not the sum {loss_BN.sum()} of its loss"
  )


def _labels(
  published: Published, model: ModelConfig, examples: Examples
) -> tuple[np.ndarray | None, np.ndarray]:
  """The id that each latent predicts, and which of them count; [B, N]."""
  arrays, path = published.examples, published.path
  B, N = len(examples.lengths_B), model.num_latents
  is_latent_BN = np.arange(N) >= N - examples.lengths_B[:, None]
  if 'labels' in arrays:
    labels_BN = official_data.checked(arrays, 'labels', (B, N), path)
  elif examples.targets_BM is not None:
    labels_BN = official_data.right_aligned(
      examples.targets_BM, examples.lengths_B
    )[:, -N:]
  else:
    return None, is_latent_BN
  mask_BN = is_latent_BN & (labels_BN != 0)
  if 'loss_mask' in arrays:
    mask_BN = official_data.checked(arrays, 'loss_mask', (B, N), path) != 0
  return labels_BN, mask_BN


def _run(
  model: ModelConfig,
  params: Any,
  examples: Examples,
  labels_BN: np.ndarray | None,
  mask_BN: np.ndarray,
  *,
  with_gradients: bool,
) -> tuple[jax.Array, jax.Array, Any]:
  """Our logits and losses, and the gradients of the sum of the losses."""
  lengths_B, positions_BMP = examples.lengths_B, examples.positions_BMP
  assert positions_BMP is not None
  batch = {
    'tokens': official_data.right_aligned(examples.inputs_BM, lengths_B),
    'positions': official_data.right_aligned(positions_BMP, lengths_B),
    'targets': mask_BN * 0 if labels_BN is None else labels_BN,
    'mask': mask_BN,
  }
  run = _with_gradients if with_gradients else _without_gradients
  with jax.default_matmul_precision('highest'):
    grads, (logits_BNV, loss_BN) = run(params, batch, model)
  return logits_BNV, loss_BN, grads


def _loss_sum(
  params: Any, batch: dict[str, jax.Array], model: ModelConfig
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
  logits_BNV = PerceiverAR(model).apply(
    {'params': params},
    batch['tokens'],
    batch['positions'],
    num_latents=model.num_latents,
  )
  assert isinstance(logits_BNV, jax.Array)
  loss_BN, z_loss_BN = losses.softmax_cross_entropy(
    logits_BNV, batch['targets'], z_loss=_Z_LOSS, label_smoothing=0.0
  )
  loss_BN = jnp.where(batch['mask'], loss_BN + z_loss_BN, 0)
  return loss_BN.sum(), (logits_BNV, loss_BN)


@functools.partial(jax.jit, static_argnums=2)
def _with_gradients(
  params: Any, batch: dict[str, jax.Array], model: ModelConfig
) -> Any:
  return jax.grad(_loss_sum, has_aux=True)(params, batch, model)


@functools.partial(jax.jit, static_argnums=2)
def _without_gradients(
  params: Any, batch: dict[str, jax.Array], model: ModelConfig
) -> Any:
  return None, _loss_sum(params, batch, model)[1]


def _outputs(
  published: Published,
  model: ModelConfig,
  examples: Examples,
  logits_BNV: jax.Array,
  loss_BN: jax.Array,
  mask_BN: np.ndarray,
) -> dict[str, float | None]:
  arrays, path = published.examples, published.path
  found: dict[str, float | None] = dict.fromkeys(_PARTS)
  B, N, V = logits_BNV.shape
  if 'logits' in arrays:
    theirs = official_data.checked(arrays, 'logits', (B, N, V), path)
    # Latents without a token mean nothing, and are computed differently.
    is_latent_BN = np.arange(N) >= N - examples.lengths_B[:, None]
    found['logits'] = _largest((logits_BNV - theirs)[is_latent_BN])
  if examples.targets_BM is None and 'labels' not in arrays:
    return found
  ours = np.asarray(loss_BN, np.float64)
  if 'loss' in arrays:
    theirs = official_data.checked(arrays, 'loss', (B, N), path)
    found['loss'] = _largest((ours - theirs)[mask_BN])
  if 'total_loss' in arrays:
    total = float(official_data.checked(arrays, 'total_loss', (), path))
    found['total_loss'] = float(abs(ours.sum() - total) / max(1, abs(total)))
  return found


def _gradients(
  published: Published, model: ModelConfig, grads: Any
) -> tuple[float | None, list[str]]:
  """Their relative difference, and the weights without one to compare."""
  theirs, flat = published.gradients, flatten(grads)
  off, largest, missing = [], [], []
  fixed: set[str] = set()
  if official_config.has_fixed_tables(published, model.position_encoding):
    fixed = {
      official_weights.table_name(axis)
      for axis in range(len(model.position_sizes))
    }
  for leaf in official_weights.leaves(model):
    if leaf.name not in theirs or leaf.name in fixed:
      missing.append(f'g/{leaf.name}')
      continue
    array = official_data.checked(theirs, leaf.name, leaf.shape, published.path)
    expected = leaf.convert(array)
    ours = np.asarray(flat[leaf.path])
    ours = ours if leaf.layer is None else ours[leaf.layer]
    off.append(_largest(ours - expected))
    largest.append(_largest(expected))
  if not off:
    return None, []
  return float(np.max(off) / (np.max(largest) or 1)), missing


def _largest(x: Any) -> float:
  return float(np.abs(np.asarray(x, np.float64)).max(initial=0))
