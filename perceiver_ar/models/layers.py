"""The blocks of Perceiver AR: pre-norm attention and MLP, with residuals.

Parameters carry logical axis names; compute is of the configured type. Dropout
is on exactly when a 'dropout' key is given.

Letters: B batch, N queries, M keys, D width, E embedding width, F channels of
all heads, H heads, K head size, V rows of a table, T positions.
"""

from typing import Any

import jax
import jax.numpy as jnp
from flax import linen as nn
from jax.ad_checkpoint import checkpoint_name

from perceiver_ar import logical, sharded_attention
from perceiver_ar.config import ModelConfig
from perceiver_ar.models import tables
from perceiver_ar.models.cache import KeyValue
from perceiver_ar.ops import norm, rotation
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn, Turns

Circle = Turn | None
"""The rotary angles of queries or keys; None without rotary positions."""

_EPSILON = 1e-5  # of variances


def gather(weight: Any, axes: tuple[str, ...], dtype: str) -> jax.Array:
  """A parameter as compute wants it: cast, and whole along FSDP's axis.

  Asking for it here, where the weight is used, keeps the all-gather inside the
  scan over layers. Left to itself XLA may carry the weights' sharding into the
  activations, and then computed wrong sums (jaxlib 0.10.2, CPU) with FSDP,
  tensor parallelism and microbatches together.
  """
  return logical.constrain(weight.astype(dtype), axes)


class Linear(nn.Module):
  """A projection of the last axis, with bias; weights of variance 1/fan-in.

  Its parameters have heads apart from channels. Activations never do: XLA would
  lay them out otherwise than attention on TPU reads them, and copy them.

  Attributes:
    config: of the model.
    features: of the result; their product is its last axis.
    kernel_axes: logical names.
    contracted: what the last axis of `x` is a product of, if it is one.
  """

  config: ModelConfig
  features: tuple[int, ...]
  kernel_axes: tuple[str, ...]
  contracted: tuple[int, ...] | None = None

  @nn.compact
  def __call__(self, x: jax.Array) -> jax.Array:
    contracted, dtype = self.contracted or x.shape[-1:], self.config.dtype
    num_contracted, rank = len(contracted), len(self.features)
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
    return add_bias(x @ kernel.reshape(x.shape[-1], -1), bias.ravel())


@jax.custom_vjp
def add_bias(y_BTF: jax.Array, bias_F: jax.Array) -> jax.Array:
  return y_BTF + bias_F[None, None]


def _add_bias_forward(
  y_BTF: jax.Array, bias_F: jax.Array
) -> tuple[jax.Array, None]:
  return add_bias(y_BTF, bias_F), None


def _add_bias_backward(
  _: None, d_BTF: jax.Array
) -> tuple[jax.Array, jax.Array]:
  # By a matmul, as exact as a sum: alone behind a kernel a sum over rows takes
  # a TPU far longer. Of fewer rows than 8, XLA would make a sum again.
  ones_8BT = jnp.ones((8, *d_BTF.shape[:2]), d_BTF.dtype)
  d_8F = jnp.einsum(
    'nbt,btf->nf',
    ones_8BT,
    d_BTF,
    precision=jax.lax.Precision.HIGHEST,
    preferred_element_type=jnp.float32,
  )
  return d_BTF, d_8F[0].astype(d_BTF.dtype)


add_bias.defvjp(_add_bias_forward, _add_bias_backward)


def layer_norm(config: ModelConfig) -> nn.LayerNorm:
  """With scale and offset; moments in float32."""
  box = nn.with_logical_partitioning
  return nn.LayerNorm(
    epsilon=_EPSILON,
    dtype=config.dtype,
    scale_init=box(nn.initializers.ones, ('norm',)),
    bias_init=box(nn.initializers.zeros, ('norm',)),
  )


class InputNorm(nn.Module):
  """The same, for many inputs; for latents XLA sums in the matmuls around."""

  config: ModelConfig

  @nn.compact
  def __call__(self, x_BME: jax.Array) -> jax.Array:
    box, shape = nn.with_logical_partitioning, x_BME.shape[-1:]
    ones, zeros = nn.initializers.ones, nn.initializers.zeros
    scale_E = self.param('scale', box(ones, ('norm',)), shape)
    offset_E = self.param('bias', box(zeros, ('norm',)), shape)
    dtype = self.config.dtype
    return norm.layer_norm(x_BME, scale_E, offset_E, _EPSILON, dtype)


def activation(name: str) -> Any:
  return squared_relu if name == 'sq_relu' else getattr(jax.nn, name)


@jax.custom_jvp
def squared_relu(x: jax.Array) -> jax.Array:
  """So et al. 2021."""
  return jnp.square(jax.nn.relu(x))


@squared_relu.defjvp
def _squared_relu_jvp(
  primals: tuple[jax.Array], tangents: tuple[jax.Array]
) -> tuple[jax.Array, jax.Array]:
  # The same as without this, but with no mask of signs for XLA to keep.
  relu = jax.nn.relu(primals[0])
  return jnp.square(relu), 2 * relu * tangents[0]


def latents(z_BND: jax.Array) -> jax.Array:
  """The residual stream is whole but for its rows, or its latents."""
  axes = ('rows', 'latents', 'embed')
  return sharded_attention.row_major(logical.constrain(z_BND, axes), axes)


def row_keys(key: jax.Array, row_B: jax.Array) -> jax.Array:
  """What is random of a row is its own, whatever else is in its batch."""
  return jax.vmap(jax.random.fold_in, (None, 0))(key, row_B)


class Dropout(nn.Module):
  rate: float

  @nn.compact
  def __call__(self, x_BND: jax.Array, row_B: jax.Array | None) -> jax.Array:
    if not self.rate or not self.has_rng('dropout'):
      return x_BND
    assert row_B is not None
    keys_B = row_keys(self.make_rng('dropout'), row_B)
    keep, shape = 1 - self.rate, x_BND.shape[1:]
    kept_BND = jax.vmap(lambda key: jax.random.bernoulli(key, keep, shape))(
      keys_B
    )
    return jnp.where(kept_BND, x_BND / keep, 0)


class Attention(nn.Module):
  """Multi-head attention; keys and values are projected apart."""

  config: ModelConfig
  num_heads: int
  head_size: int
  out_width: int

  def setup(self) -> None:
    heads, axes = (self.num_heads, self.head_size), ('embed', 'heads', 'kv')
    self.query = Linear(self.config, heads, axes)
    self.key = Linear(self.config, heads, axes)
    self.value = Linear(self.config, heads, axes)
    self.out = Linear(
      self.config,
      (self.out_width,),
      ('heads', 'kv', 'embed'),
      contracted=heads,
    )

  def keys_values(self, x_BME: jax.Array, axes: logical.Axes) -> KeyValue:
    """Not yet rotated."""
    kv = KeyValue(self.key(x_BME), self.value(x_BME))
    return jax.tree.map(lambda x: logical.constrain(x, axes), kv)

  def rotated(self, kv: KeyValue, circle: Circle) -> KeyValue:
    return KeyValue(self._rotate(kv.key, circle), kv.value)

  def __call__(
    self,
    u_BND: jax.Array,
    circle: Circle,
    kv: KeyValue,
    key_circle: Circle,
    mask: Mask,
    over: str,
  ) -> jax.Array:
    """Attends over 'latents', 'inputs', or a 'cache' of rotated keys."""
    q_BNF = logical.constrain(self.query(u_BND), sharded_attention.LATENTS)
    turns = Turns(circle, key_circle)
    if self._num_rotated < self.num_heads:
      # Attention would rotate them all.
      q_BNF, kv = self._rotate(q_BNF, circle), self.rotated(kv, key_circle)
      turns = Turns()
    qkv = q_BNF, kv.key, kv.value
    how = self.config, self.head_size
    with jax.named_scope('attend'):
      if over == 'cache':
        o_BNF = sharded_attention.attend_cache(*how, *qkv, mask, turns)
      else:
        axes = {
          'inputs': sharded_attention.INPUTS,
          'latents': sharded_attention.LATENTS,
        }
        o_BNF = sharded_attention.attend(*how, *qkv, mask, turns, axes[over])
    return latents(self.out(o_BNF))

  @property
  def _num_rotated(self) -> int:
    return int(self.config.rotary_head_fraction * self.num_heads)

  def _rotate(self, x_BTF: jax.Array, circle: Circle) -> jax.Array:
    x_BTHK = x_BTF.reshape(*x_BTF.shape[:2], self.num_heads, self.head_size)
    x_BTHK = rotation.rotate(x_BTHK, circle, self._num_rotated)
    return x_BTHK.reshape(x_BTF.shape)


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
    self.query_norm, self.input_norm = layer_norm(c), InputNorm(c)
    self.attention = Attention(
      c, c.num_cross_heads, c.embed_width // c.num_cross_heads, c.width
    )
    self.mlp_norm, self.mlp = layer_norm(c), Mlp(c, c.cross_mlp_width)
    self.dropout = Dropout(c.dropout_rate)

  def keys_values(self, x_BME: jax.Array) -> KeyValue:
    """Of the inputs, not yet rotated."""
    return self.attention.keys_values(
      self.input_norm(x_BME), sharded_attention.INPUTS
    )

  def look_up(self, x_VE: jax.Array, tokens_BM: jax.Array) -> KeyValue:
    """`keys_values` of inputs that are rows of a table and nothing else.

    Exact: before its rotation, an input's projections are its token's. The
    gradient is a scatter-add into the table and one small matmul.
    """
    x_1VE = self.input_norm(x_VE[None])
    kv = self.attention.keys_values(x_1VE, (None, None, 'heads'))
    V = x_VE.shape[0]
    ids_BM = jnp.where(tables.inside(tokens_BM, V), tokens_BM, V)

    def take(x_1VF: jax.Array) -> jax.Array:
      # A row more costs less than to go over all that is found.
      table_VF = jnp.pad(x_1VF[0], ((0, 1), (0, 0)), constant_values=jnp.nan)
      found_BMF = tables.input_rows(table_VF, ids_BM)
      return logical.constrain(found_BMF, sharded_attention.INPUTS)

    return jax.tree.map(take, kv)

  def rotated(self, kv: KeyValue, circle: Circle) -> KeyValue:
    return self.attention.rotated(kv, circle)

  def __call__(
    self,
    z_BND: jax.Array,
    circle: Circle,
    kv: KeyValue,
    key_circle: Circle,
    mask: Mask,
    over: str,
    row_B: jax.Array | None,
  ) -> jax.Array:
    u_BND = self.query_norm(z_BND)
    u_BND = self.attention(u_BND, circle, kv, key_circle, mask, over)
    z_BND += self.dropout(u_BND, row_B)
    u_BND = latents(self.mlp(self.mlp_norm(z_BND)))
    return z_BND + self.dropout(u_BND, row_B)


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
    row_B: jax.Array | None,
  ) -> tuple[jax.Array, KeyValue | None]:
    """One layer; with a cache, new keys and values go to its rows `rows_N`."""
    z_BND = checkpoint_name(z_BND, 'layer_input')
    u_BND = self.norm(z_BND)
    kv = self.attention.keys_values(u_BND, sharded_attention.LATENTS)
    over, key_circle = 'latents', circle
    if cache is not None:
      assert rows_N is not None
      kv = cache = cache.write(rows_N, self.attention.rotated(kv, circle))
      over, key_circle = 'cache', None
    u_BND = self.attention(u_BND, circle, kv, key_circle, mask, over)
    z_BND += self.dropout(u_BND, row_B)
    u_BND = latents(self.mlp(self.mlp_norm(z_BND)))
    return z_BND + self.dropout(u_BND, row_B), cache
