"""The one seam of attention, and its plain implementation.

Every implementation computes the same function: softmax over the visible keys
in float32, and zero for a query that sees none. Two of them, `chunked` and
`flash`, are pairs of a forward pass that gives log-sum-exps and a backward
pass that takes them, so that keys may be split over devices
(`context_parallel`); the gradient of the pair is defined here.

Heads share the last axis, as projections make them. Letters: B batch,
N queries, M keys, H heads, K head size, F = H*K.
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar.errors import UserError
from perceiver_ar.ops import chunked, flash, flash_delta, rotation
from perceiver_ar.ops.masks import Mask, visible
from perceiver_ar.ops.rotation import Turn, Turns

_PAIRS = ('chunked', 'flash')


@dataclasses.dataclass(frozen=True)
class Kernel:
  """An implementation, chosen.

  Attributes:
    name: 'reference', 'chunked', 'flash' or 'cudnn'.
    block: keys per block of 'chunked'; any size, M need not divide by it.
    head_size: K.
    interpret: run 'flash' without a TPU, slowly.
  """

  name: str
  block: int
  head_size: int
  interpret: bool

  @property
  def scale(self) -> float:
    """Of the scores."""
    return self.head_size**-0.5

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
  return Kernel(name, block, head_size, interpret=platform != 'tpu')


def attend(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
) -> jax.Array:
  """Multi-head attention, [B, N, F] of the queries' type.

  Args:
    q_BNF: queries, neither rotated nor scaled.
    k_BMF: keys, not rotated.
    v_BMF: values.
    mask: which keys a query sees.
    turns: the rotations, of all heads.
    kernel: how it is computed.
  """
  if kernel.name in _PAIRS:
    return _attend(q_BNF, k_BMF, v_BMF, mask, turns, kernel)
  q_BNF, k_BMF = _rotated(q_BNF, k_BMF, turns, kernel)
  q_BNHK, k_BMHK, v_BMHK = (_heads(x, kernel) for x in (q_BNF, k_BMF, v_BMF))
  if kernel.name == 'cudnn':
    return _flat(_cudnn(q_BNHK, k_BMHK, v_BMHK, mask))
  assert kernel.name == 'reference', kernel
  return _flat(reference(q_BNHK, k_BMHK, v_BMHK, mask))


def _rotated(
  q_BNF: jax.Array, k_BMF: jax.Array, turns: Turns, kernel: Kernel
) -> tuple[jax.Array, jax.Array]:
  """Queries, also scaled, and keys."""
  q_BNF = _turned(q_BNF, turns.queries, kernel) * kernel.scale
  return q_BNF, _turned(k_BMF, turns.keys, kernel)


def _turned(x_BTF: jax.Array, turn: Turn | None, kernel: Kernel) -> jax.Array:
  x_BTHK = _heads(x_BTF, kernel)
  return _flat(rotation.rotate(x_BTHK, turn, x_BTHK.shape[2]))


def _heads(x_BTF: jax.Array, kernel: Kernel) -> jax.Array:
  return x_BTF.reshape(*x_BTF.shape[:2], -1, kernel.head_size)


def _flat(x_BTHK: jax.Array) -> jax.Array:
  return x_BTHK.reshape(*x_BTHK.shape[:2], -1)


def forward(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
) -> tuple[jax.Array, jax.Array]:
  """Outputs [B, N, F], and log-sum-exps [B, H, N] float32."""
  if kernel.name == 'flash':
    return flash.forward(
      *(q_BNF, k_BMF, v_BMF, mask, turns, kernel.head_size),
      interpret=kernel.interpret,
    )
  assert kernel.name == 'chunked', kernel
  q_BNF, k_BMF = _rotated(q_BNF, k_BMF, turns, kernel)
  out_BNHK, lse_BHN = chunked.forward(
    _heads(q_BNF, kernel), k_BMF, v_BMF, mask, kernel.block
  )
  return _flat(out_BNHK), lse_BHN


def backward(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
  lse_BHN: jax.Array,
  delta_BHN: jax.Array,
  dout_BNF: jax.Array,
) -> tuple[jax.Array, jax.Array, jax.Array]:
  """Gradients of queries, keys and values, as `attend` takes them.

  Probabilities are taken from `lse_BHN` and their mean gradients from
  `delta_BHN`, which may be of more keys than are here.
  """
  if kernel.name == 'flash':
    return flash.backward(
      *(q_BNF, k_BMF, v_BMF, mask, turns, kernel.head_size),
      *(lse_BHN, delta_BHN, dout_BNF),
      interpret=kernel.interpret,
    )
  assert kernel.name == 'chunked', kernel
  q_BNF, k_BMF = _rotated(q_BNF, k_BMF, turns, kernel)
  q_BNHK, dout_BNHK = (_heads(x, kernel) for x in (q_BNF, dout_BNF))
  dq_BNHK, dk_BMF, dv_BMF = chunked.backward(
    *(q_BNHK, k_BMF, v_BMF, mask, kernel.block),
    *(lse_BHN, delta_BHN, dout_BNHK),
  )
  dq_BNF, dk_BMF = _rotated(_flat(dq_BNHK), dk_BMF, turns.back(), kernel)
  return dq_BNF, dk_BMF, dv_BMF


def delta(out_BNF: jax.Array, dout_BNF: jax.Array, kernel: Kernel) -> jax.Array:
  """Inner products of outputs and their gradients, [B, H, N] float32."""
  if kernel.name == 'flash':
    return flash_delta.delta(
      out_BNF, dout_BNF, kernel.head_size, interpret=kernel.interpret
    )
  product_BNF = out_BNF.astype(jnp.float32) * dout_BNF
  return _heads(product_BNF, kernel).sum(-1).transpose(0, 2, 1)


def named(x: jax.Array) -> jax.Array:
  """What rematerialisation by the policy 'attention' keeps."""
  return checkpoint_name(x, 'attention')


@functools.partial(jax.custom_vjp, nondiff_argnums=(5,))
def _attend(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
) -> jax.Array:
  return forward(q_BNF, k_BMF, v_BMF, mask, turns, kernel)[0]


def _attend_forward(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  v_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  kernel: Kernel,
) -> tuple[jax.Array, tuple[Any, ...]]:
  out_BNF, lse_BHN = forward(q_BNF, k_BMF, v_BMF, mask, turns, kernel)
  out_BNF, lse_BHN = named(out_BNF), named(lse_BHN)
  return out_BNF, (q_BNF, k_BMF, v_BMF, mask, turns, out_BNF, lse_BHN)


def _attend_backward(
  kernel: Kernel, kept: tuple[Any, ...], dout_BNF: jax.Array
) -> tuple[Any, ...]:
  q_BNF, k_BMF, v_BMF, mask, turns, out_BNF, lse_BHN = kept
  delta_BHN = delta(out_BNF, dout_BNF, kernel)
  dq_BNF, dk_BMF, dv_BMF = backward(
    q_BNF, k_BMF, v_BMF, mask, turns, kernel, lse_BHN, delta_BHN, dout_BNF
  )
  return dq_BNF, dk_BMF, dv_BMF, None, None


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

  So the mask is dense, [B, 1, N, M], once for all heads. Its backward pass
  takes even lengths only: one more query, and a key that nobody sees.
  """
  B, N, M = *q_BNHK.shape[:2], k_BMHK.shape[1]
  seen = visible(mask, N, 0, M)
  assert seen is not None
  seen_B1NM = jnp.broadcast_to(seen, (B, 1, N, M))
  out_BNHK = jax.nn.dot_product_attention(
    *(_even(x, 1) for x in (q_BNHK, k_BMHK, v_BMHK)),
    mask=_even(_even(seen_B1NM, 2), 3),
    scale=1.0,
    implementation='cudnn',
  )[:, :N]
  sees_BN11 = seen_B1NM.any(-1)[:, 0, :, None, None]
  return jnp.where(sees_BN11, out_BNHK, 0)


def _even(x: jax.Array, axis: int) -> jax.Array:
  """With a zero at the end of an axis of odd length."""
  padding = [(0, 0)] * x.ndim
  padding[axis] = 0, x.shape[axis] % 2
  return jnp.pad(x, padding)
