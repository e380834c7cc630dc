"""Cross-entropy in nats, with the z-loss of the published model.

Letters: B batch, N latents, V vocabulary.
"""

import jax
import jax.numpy as jnp


def softmax_cross_entropy(
  logits_BNV: jax.Array,
  targets_BN: jax.Array,
  *,
  z_loss: float,
  label_smoothing: float,
) -> tuple[jax.Array, jax.Array]:
  """Per position, the cross-entropy and z_loss * log(Z)**2, both float32.

  A smoothed label has 1 - label_smoothing on the target and the rest spread
  over the others; its entropy is subtracted, so that a perfect prediction
  costs nothing (as in T5X).

  Args:
    logits_BNV: float32.
    targets_BN: ids in [0, V).
    z_loss: weight of the squared log-normaliser (Mesh TensorFlow).
    label_smoothing: 0 for plain cross-entropy.
  """
  assert logits_BNV.dtype == jnp.float32, logits_BNV.dtype
  log_z_BN = jax.nn.logsumexp(logits_BNV, axis=-1)
  # A sum, not a gather: it splits with the vocabulary.
  ids_V = jnp.arange(logits_BNV.shape[-1])
  is_target_BNV = ids_V[None, None] == targets_BN[..., None]
  picked_BN = jnp.where(is_target_BNV, logits_BNV, 0.0).sum(axis=-1)
  loss_BN = log_z_BN - picked_BN
  if label_smoothing:
    V = logits_BNV.shape[-1]
    low, high = label_smoothing / (V - 1), 1 - label_smoothing
    mean_BN = log_z_BN - logits_BNV.mean(-1)
    entropy = -(high * jnp.log(high) + label_smoothing * jnp.log(low))
    loss_BN = (high - low) * loss_BN + low * V * mean_BN - entropy
  return loss_BN, z_loss * jnp.square(log_z_BN)
