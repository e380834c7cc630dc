"""The blocks of Perceiver AR: pre-norm attention and MLP, with residuals.

Parameters are float32 and carry logical axis names; compute is of the
configured type. Dropout is on exactly when a 'dropout' key is given.

Letters: B batch, N queries, M keys, D width, E embedding width, H heads,
K head size.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from flax.linen import spmd

from perceiver_ar.config import ModelConfig
from perceiver_ar.models import positions
from perceiver_ar.models.cache import KeyValue
from perceiver_ar.ops import attention
from perceiver_ar.ops.masks import Mask

Circle = tuple[jax.Array, jax.Array] | None
"""Sines and cosines of the rotary angles; None without rotary positions."""


def constrain(x: jax.Array, axes: tuple[str, ...]) -> jax.Array:
  """Pins the sharding of `x` by its logical axes, each of which has a rule."""
  return spmd.with_logical_constraint(
    x, axes, fallback=spmd.RulesFallback.RAISE_ERROR
  )


def gather(weight: Any, axes: tuple[str, ...], dtype: str) -> jax.Array:
  """A parameter as compute wants it: cast, and whole along FSDP's axis.

  Asking for it here, where the weight is used, keeps the all-gather inside the
  scan over layers. Left to itself XLA may carry the weights' sharding into the
  activations, and then computed wrong sums (jaxlib 0.10.2, CPU) with FSDP,
  tensor parallelism and microbatches together.
  """
  return constrain(weight.astype(dtype), axes)


class Linear(nn.Module):
  """A projection with bias over the last axes; weights of variance 1/fan-in."""

  config: ModelConfig
  features: tuple[int, ...]
  kernel_axes: tuple[str, ...]

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    rank, dtype = len(self.features), self.config.dtype
    num_contracted = len(self.kernel_axes) - rank
    contracted = x.shape[x.ndim - num_contracted :]
    init = nn.initializers.variance_scaling(
      1.0,
      'fan_in',
      'truncated_normal',
      in_axis=range(num_contracted),
      out_axis=range(num_contracted, num_contracted + rank),
    )
    box, bias_axes = nn.with_logical_partitioning, self.kernel_axes[-rank:]
    kernel = self.param(
      'kernel', box(init, self.kernel_axes), (*contracted, *self.features)
    )
    bias = self.param(
      'bias', box(nn.initializers.zeros, bias_axes), self.features
    )
    kernel = gather(kernel, self.kernel_axes, dtype)
    bias = gather(bias, bias_axes, dtype)
    y = jnp.tensordot(x, kernel, num_contracted)
    return y + jnp.expand_dims(bias, range(y.ndim - rank))


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
  """With scale and offset; moments in float32."""
  box = nn.with_logical_partitioning
  return nn.LayerNorm(
    epsilon=1e-5,
    dtype=config.dtype,
    scale_init=box(nn.initializers.ones, ('norm',)),
    bias_init=box(nn.initializers.zeros, ('norm',)),
  )


def activation(name: str) -> Any:
  if name == 'sq_relu':  # So et al. 2021
    return lambda x: jnp.square(jax.nn.relu(x))
  return getattr(jax.nn, name)


def latents(z_BND: jax.Array) -> jax.Array:
  """The residual stream has its rows over `batch` and is whole otherwise."""
  return constrain(z_BND, ('batch', 'latents', 'embed'))


class Dropout(nn.Module):
  rate: float

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    return nn.Dropout(self.rate, deterministic=not self.has_rng('dropout'))(x)


class Attention(nn.Module):
  """Multi-head attention; queries come first, keys may come from a cache."""

  config: ModelConfig
  num_heads: int
  head_size: int
  out_width: int

  def setup(self) -> None:
    heads, axes = (self.num_heads, self.head_size), ('embed', 'heads', 'kv')
    self.query = Linear(self.config, heads, axes)
    self.key = Linear(self.config, heads, axes)
    self.value = Linear(self.config, heads, axes)
    self.out = Linear(self.config, (self.out_width,), ('heads', 'kv', 'embed'))

  def keys_values(self, x_BME: jax.Array, circle: Circle) -> KeyValue:
    axes = ('batch', 'context', 'heads', 'kv')
    key_BMHK = self._rotate(self.key(x_BME), circle)
    return KeyValue(
      constrain(key_BMHK, axes),
      constrain(self.value(x_BME), axes),
    )

  def __call__(
    self, x_BND: jax.Array, circle: Circle, kv: KeyValue, mask: Mask
  ) -> jax.Array:
    q_BNHK = self._rotate(self.query(x_BND), circle)
    with jax.named_scope('attend'):
      o_BNHK = attention.attend(
        q_BNHK,
        kv.key,
        kv.value,
        mask,
        implementation=self.config.attention,
        block=self.config.attention_block,
      )
    return self.out(o_BNHK)

  def _rotate(self, x_BTHK: jax.Array, circle: Circle) -> jax.Array:
    if circle is None:
      return x_BTHK
    num_heads = int(self.config.rotary_head_fraction * self.num_heads)
    return positions.rotate(x_BTHK, circle, num_heads)


class Mlp(nn.Module):
  config: ModelConfig
  hidden: int

  def setup(self) -> None:
    c = self.config
    self.up = Linear(c, (self.hidden,), ('embed', 'mlp'))
    self.down = Linear(c, (c.width,), ('mlp', 'embed'))

  def __call__(self, x_BND: jax.Array) -> jax.Array:
    return self.down(activation(self.config.activation)(self.up(x_BND)))


class CrossBlock(nn.Module):
  """The latents attend to all inputs, once."""

  config: ModelConfig

  def setup(self) -> None:
    c = self.config
    self.query_norm, self.input_norm = layer_norm(c), layer_norm(c)
    self.attention = Attention(
      c, c.num_cross_heads, c.embed_width // c.num_cross_heads, c.width
    )
    self.mlp_norm, self.mlp = layer_norm(c), Mlp(c, c.cross_mlp_width)
    self.dropout = Dropout(c.dropout_rate)

  def keys_values(self, x_BME: jax.Array, circle: Circle) -> KeyValue:
    return self.attention.keys_values(self.input_norm(x_BME), circle)

  def __call__(
    self, z_BND: jax.Array, circle: Circle, kv: KeyValue, mask: Mask
  ) -> jax.Array:
    u_BND = self.query_norm(z_BND)
    z_BND += self.dropout(latents(self.attention(u_BND, circle, kv, mask)))
    return z_BND + self.dropout(latents(self.mlp(self.mlp_norm(z_BND))))


class SelfBlock(nn.Module):
  """The latents attend to each other; a scan runs L of these."""

  config: ModelConfig

  def setup(self) -> None:
    c = self.config
    self.norm = layer_norm(c)
    self.attention = Attention(
      c, c.num_self_heads, c.width // c.num_self_heads, c.width
    )
    self.mlp_norm, self.mlp = layer_norm(c), Mlp(c, c.mlp_width)
    self.dropout = Dropout(c.dropout_rate)

  def __call__(
    self,
    z_BND: jax.Array,
    circle: Circle,
    mask: Mask,
    rows_N: jax.Array | None,
    cache: KeyValue | None,
  ) -> tuple[jax.Array, KeyValue | None]:
    """One layer; with a cache, new keys and values go to its rows `rows_N`."""
    u_BND = self.norm(z_BND)
    kv = self.attention.keys_values(u_BND, circle)
    if cache is not None:
      assert rows_N is not None
      kv = cache = cache.write(rows_N, kv)
    z_BND += self.dropout(latents(self.attention(u_BND, circle, kv, mask)))
    return z_BND + self.dropout(latents(self.mlp(self.mlp_norm(z_BND)))), cache
