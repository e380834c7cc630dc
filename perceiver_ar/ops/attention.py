"""The one seam of attention, and its plain implementation.

Every implementation computes the same function: softmax over the visible keys
in float32, and zero for a query that sees none. Two of them, `chunked` and
`flash`, are pairs of a forward pass that gives log-sum-exps and a backward
pass that takes them, so that keys may be split over devices
(`context_parallel`); the gradient of the pair is defined here.

Letters: B batch, N queries, M keys, H heads, K head size.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar.errors import UserError
from perceiver_ar.ops import chunked, flash, rotation
from perceiver_ar.ops.masks import Mask, visible
from perceiver_ar.ops.rotation import Turn

_PAIRS = ('chunked', 'flash')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An implementation, chosen.

  Attributes:
    name: 'reference', 'chunked', 'flash' or 'cudnn'.
    block: keys per block of 'chunked'; any size, M need not divide by it.
    interpret: run 'flash' without a TPU, slowly.
  """

  name: str
  block: int
  interpret: bool

  @property
  def can_split_keys(self) -> bool:
    return self.name in _PAIRS


def choose(
  name: str, block: int, *, platform: str, dtype: str, head_size: int
) -> Kernel:
  """The implementation that a config's name means on a platform.

  Args:
    name: 'auto' takes the fastest: flash on TPU, cudnn on GPU where it can,
      chunked elsewhere; any other name is taken at its word.
    block: see `Kernel`.
    platform: 'cpu', 'gpu' or 'tpu', of the devices that will compute.
    dtype: of queries and keys.
    head_size: K.

  Raises:
    UserError: the implementation does not exist there.
  """
  fits_cudnn = head_size <= 128 and head_size % 8 == 0
  if name == 'auto':
    name = {'tpu': 'flash', 'gpu': 'cudnn'}.get(platform, 'chunked')
    if name == 'cudnn' and (dtype != 'bfloat16' or not fits_cudnn):
      name = 'chunked'
  if name == 'cudnn' and not (
    (platform, dtype) == ('gpu', 'bfloat16') and fits_cudnn
  ):
    raise UserError(
      'model.attention cudnn needs a GPU, model.dtype bfloat16 and heads of '
      f'8, 16, ... 128 channels, and this is {platform}, {dtype} and '
      f'{head_size}; use auto'
    )
  if name == 'flash' and platform == 'gpu':
    raise UserError(
      'model.attention flash is for TPU, and this is gpu; use auto'
    )
  return Kernel(name, block, interpret=platform != 'tpu')


def attend(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
) -> jax.Array:
  """Multi-head attention, [B, N, H, K] of the queries' type.

  Args:
    q_BNHK: queries, rotated but not yet scaled.
    k_BMHK: keys, not yet rotated.
    v_BMHK: values.
    mask: which keys a query sees.
    turn: the rotation of the keys of all heads.
    kernel: how it is computed.
  """
  q_BNHK = scaled(q_BNHK)
  if kernel.name in _PAIRS:
    return _attend(q_BNHK, k_BMHK, v_BMHK, mask, turn, kernel)
  k_BMHK = _rotated(k_BMHK, turn)
  if kernel.name == 'cudnn':
    return _cudnn(q_BNHK, k_BMHK, v_BMHK, mask)
  assert kernel.name == 'reference', kernel
  return reference(q_BNHK, k_BMHK, v_BMHK, mask)


def scaled(q_BNHK: jax.Array) -> jax.Array:
  return q_BNHK * q_BNHK.shape[-1] ** -0.5


def _rotated(x_BMHK: jax.Array, turn: Turn | None) -> jax.Array:
  return rotation.rotate(x_BMHK, turn, x_BMHK.shape[2])


def forward(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
) -> tuple[jax.Array, jax.Array]:
  """Outputs [B, N, H, K] of scaled queries, and log-sum-exps [B, H, N]."""
  if kernel.name == 'flash':
    return flash.forward(
      q_BNHK, k_BMHK, v_BMHK, mask, turn, interpret=kernel.interpret
    )
  assert kernel.name == 'chunked', kernel
  k_BMHK = _rotated(k_BMHK, turn)
  return chunked.forward(q_BNHK, k_BMHK, v_BMHK, mask, kernel.block)


def backward(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
  lse_BHN: jax.Array,
  delta_BHN: jax.Array,
  dout_BNHK: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of scaled queries, keys before their rotation, and values.

  Probabilities are taken from `lse_BHN` and their mean gradients from
  `delta_BHN`, which may be of more keys than are here.
  """
  rest = lse_BHN, delta_BHN, dout_BNHK
  if kernel.name == 'flash':
    return flash.backward(
      q_BNHK, k_BMHK, v_BMHK, mask, turn, *rest, interpret=kernel.interpret
    )
  assert kernel.name == 'chunked', kernel
  k_BMHK = _rotated(k_BMHK, turn)
  dq_BNHK, dk_BMHK, dv_BMHK = chunked.backward(
    q_BNHK, k_BMHK, v_BMHK, mask, kernel.block, *rest
  )
  return dq_BNHK, _rotated(dk_BMHK, turn and turn.back()), dv_BMHK


def delta(out_BNHK: jax.Array, dout_BNHK: jax.Array) -> jax.Array:
  """Inner products of outputs and their gradients, [B, H, N] float32."""
  product_BNHK = out_BNHK.astype(jnp.float32) * dout_BNHK
  return product_BNHK.sum(-1).transpose(0, 2, 1)


def named(x: jax.Array) -> jax.Array:
  """What rematerialisation by the policy 'attention' keeps."""
  return checkpoint_name(x, 'attention')


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
) -> jax.Array:
  return forward(q_BNHK, k_BMHK, v_BMHK, mask, turn, kernel)[0]


def _attend_forward(
  q_BNHK: jax.Array,
  k_BMHK: jax.Array,
  v_BMHK: jax.Array,
  mask: Mask,
  turn: Turn | None,
  kernel: Kernel,
) -> tuple[jax.Array, tuple[Any, ...]]:
  out_BNHK, lse_BHN = forward(q_BNHK, k_BMHK, v_BMHK, mask, turn, kernel)
  out_BNHK, lse_BHN = named(out_BNHK), named(lse_BHN)
  return out_BNHK, (q_BNHK, k_BMHK, v_BMHK, mask, turn, out_BNHK, lse_BHN)


def _attend_backward(
  kernel: Kernel, kept: tuple[Any, ...], dout_BNHK: jax.Array
) -> tuple[Any, ...]:
  q_BNHK, k_BMHK, v_BMHK, mask, turn, out_BNHK, lse_BHN = kept
  delta_BHN = delta(out_BNHK, dout_BNHK)
  dq_BNHK, dk_BMHK, dv_BMHK = backward(
    q_BNHK, k_BMHK, v_BMHK, mask, turn, kernel, lse_BHN, delta_BHN, dout_BNHK
  )
  return dq_BNHK, dk_BMHK, dv_BMHK, None, None


_attend.defvjp(_attend_forward, _attend_backward)


def reference(
  q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, mask: Mask
) -> jax.Array:
  """Einsum, softmax, einsum: what every other implementation is held to."""
  scores_BHNM = jnp.einsum(
    'bnhk,bmhk->bhnm', q_BNHK, k_BMHK, preferred_element_type=jnp.float32
  )
  seen = visible(mask, q_BNHK.shape[1], 0, k_BMHK.shape[1])
  assert seen is not None
  probs_BHNM = jax.nn.softmax(jnp.where(seen, scores_BHNM, -1e30), axis=-1)
  probs_BHNM = jnp.where(seen, probs_BHNM, 0.0)
  return jnp.einsum('bhnm,bmhk->bnhk', probs_BHNM.astype(v_BMHK.dtype), v_BMHK)


def _cudnn(
  q_BNHK: jax.Array, k_BMHK: jax.Array, v_BMHK: jax.Array, mask: Mask
) -> jax.Array:
  """cuDNN's flash attention; its own causal masks are aligned to the left.

  So the mask is dense, [B, 1, N, M], once for all heads.
  """
  seen = visible(mask, q_BNHK.shape[1], 0, k_BMHK.shape[1])
  assert seen is not None
  seen_B1NM = jnp.broadcast_to(
    seen, (len(q_BNHK), 1, q_BNHK.shape[1], k_BMHK.shape[1])
  )
  out_BNHK = jax.nn.dot_product_attention(
    q_BNHK,
    k_BMHK,
    v_BMHK,
    mask=seen_B1NM,
    scale=1.0,
    implementation='cudnn',
  )
  sees_BN11 = seen_B1NM.any(-1)[:, 0, :, None, None]
  return jnp.where(sees_BN11, out_BNHK, 0)
