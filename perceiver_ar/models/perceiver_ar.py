"""Perceiver AR (Hawthorne et al. 2022, arXiv 2202.07765).

The last N of M embedded inputs become latents. They attend to all inputs once,
causally, then to each other in L layers, and each predicts the token after its
own. Sequences are right-aligned: padding (id 0) is on the left, so the latents
are always the last N columns and the causal offset is always M - N.

Letters: B batch, M inputs, N latents, T new tokens, P position axes,
D width, E embedding width, V vocabulary, L layers.
"""

import dataclasses
from typing import Any, cast

import jax
import jax.numpy as jnp
from flax import linen as nn

from perceiver_ar import logical, sharded_attention
from perceiver_ar.config import ModelConfig
from perceiver_ar.models import cache as cache_lib
from perceiver_ar.models import layers, positions, tables
from perceiver_ar.models.cache import Cache, KeyValue
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turn

_REMAT_POLICIES = {
  'dots': jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
  'attention': jax.checkpoint_policies.save_only_these_names('attention'),
  'full': jax.checkpoint_policies.nothing_saveable,
  'offload': jax.checkpoint_policies.save_and_offload_only_these_names(
    names_which_can_be_saved=[],
    names_which_can_be_offloaded=['layer_input'],
    offload_src='device',
    offload_dst='pinned_host',
  ),
}


class Embed(nn.Module):
  """Token embeddings plus absolute positions, if the model has them."""

  config: ModelConfig

  @nn.compact
  def __call__(
    self,
    tokens_BM: jax.Array,
    positions_BMP: jax.Array,
    axes: logical.Axes,
  ) -> jax.Array:
    c = self.config
    x_BME = self._look_up('token', c.vocab_size, tokens_BM)
    for axis, size in enumerate(c.position_sizes):
      if c.position_encoding == 'learned':
        x_BME += self._look_up(
          f'position_{axis}', size, positions_BMP[..., axis]
        )
      elif c.position_encoding == 'sinusoidal':
        x_BME += self._sinusoidal(positions_BMP[..., axis], size)
    x_BME = x_BME.astype(c.dtype)
    return logical.constrain(x_BME, (*axes, 'embed'))

  def _sinusoidal(self, at_BM: jax.Array, size: int) -> jax.Array:
    """Of every input; from a table if there are fewer positions than inputs."""
    width = self.config.embed_width
    if not 0 < size < at_BM.size // sharded_attention.num_input_shards():
      return positions.sinusoidal(at_BM, width, size)
    table_TE = positions.sinusoidal(jnp.arange(size), width, size)
    found_BME = tables.rows(table_TE, at_BM)
    return jnp.where(tables.inside(at_BM, size)[..., None], found_BME, jnp.nan)

  def _look_up(self, name: str, rows: int, ids_BM: jax.Array) -> jax.Array:
    axes = ('vocab' if name == 'token' else 'positions', 'embed')
    init = nn.initializers.truncated_normal(1.0)
    table = self.param(
      name,
      nn.with_logical_partitioning(init, axes),
      (rows, self.config.embed_width),
    )
    table = layers.gather(table, axes, 'float32')
    found_BME = tables.rows(table, ids_BM)
    # A table with a row of NaN would not divide over `vocab`.
    is_inside_BM1 = tables.inside(ids_BM, rows)[..., None]
    return jnp.where(is_inside_BM1, found_BME, jnp.nan)


class Logits(nn.Module):
  """The output projection, zero at the start; float32 out of any type in."""

  config: ModelConfig

  @nn.compact
  def __call__(self, z_BND: jax.Array) -> jax.Array:
    c, zeros = self.config, nn.initializers.zeros
    box, axes = nn.with_logical_partitioning, ('embed', 'vocab')
    kernel = self.param('kernel', box(zeros, axes), (c.width, c.vocab_size))
    bias = self.param('bias', box(zeros, ('vocab',)), (c.vocab_size,))
    logits_BNV = jnp.einsum(
      '...d,dv->...v',
      z_BND,
      layers.gather(kernel, axes, c.dtype),
      preferred_element_type=jnp.float32,
    )
    bias_V = layers.gather(bias, ('vocab',), 'float32')
    logits_BNV += jnp.expand_dims(bias_V, range(z_BND.ndim - 1))
    return logits_BNV


class PerceiverAR(nn.Module):
  """The model. `__call__` scores; `write_inputs` and `decode` sample.

  Dropout, and the dropping of inputs, are on exactly when `apply` is given a
  'dropout' key.
  """

  config: ModelConfig

  def setup(self) -> None:
    c = self.config
    self.embed = Embed(c)
    self.to_latents = layers.Linear(c, (c.width,), ('embed', 'latent_embed'))
    self.cross = layers.CrossBlock(c)
    block = layers.SelfBlock
    if c.remat != 'none':
      block = nn.remat(
        block, prevent_cse=False, policy=_REMAT_POLICIES[c.remat]
      )
    self.layers = nn.scan(
      block,
      variable_axes={'params': 0},
      split_rngs={'params': True, 'dropout': True},
      in_axes=cast(Any, (*[nn.broadcast] * 3, 0, nn.broadcast)),
      length=c.num_layers,
      unroll=c.scan_unroll,
      # No output is the same for all layers: Flax need not trace one to see it.
      check_constancy_invariants=False,
      metadata_params={nn.PARTITION_NAME: 'layers'},
    )(c)
    self.norm = layers.layer_norm(c)
    self.logits = Logits(c)

  def __call__(
    self, tokens_BM: jax.Array, positions_BMP: jax.Array, *, num_latents: int
  ) -> jax.Array:
    """Logits for the token after each of the last N inputs, [B, N, V] float32.

    Arguments as for `encode`.
    """
    z_BND = self.encode(tokens_BM, positions_BMP, num_latents=num_latents)
    return self.predict(z_BND)

  def predict(self, z_BND: jax.Array) -> jax.Array:
    """Logits of some latents out of the last layer, [B, N, V] float32."""
    logits_BNV = self.logits(self.norm(z_BND))
    return logical.constrain(logits_BNV, ('rows', 'latents', 'vocab'))

  def encode(
    self,
    tokens_BM: jax.Array,
    positions_BMP: jax.Array,
    *,
    num_latents: int,
    row_B: jax.Array | None = None,
  ) -> jax.Array:
    """The last N inputs as latents, out of the last layer, [B, N, D].

    Args:
      tokens_BM: ids, padded with 0 on the left; padding never attends.
      positions_BMP: position ids of the inputs in their document; read only
        if the config takes positions from the data.
      num_latents: N, static; may differ from training's.
      row_B: numbers that the randomness of a row is drawn by, if there is
        any; None: its place in the batch.
    """
    (B, M), N = tokens_BM.shape, num_latents
    assert 1 <= N <= M, (N, M)
    row_B = jnp.arange(B) if row_B is None else row_B
    # Ids are small: every device of `context` has all of its rows'.
    tokens_BM = logical.constrain(tokens_BM, ('batch', None))
    positions_BMP = logical.constrain(positions_BMP, ('batch', None, None))
    has_token_BM = tokens_BM != 0
    start_B = jnp.where(has_token_BM.any(1), has_token_BM.argmax(1), M)
    slots_BM = jnp.broadcast_to(jnp.arange(M)[None], tokens_BM.shape)
    ids_BMP, angles_BM = self._positions(positions_BMP, slots_BM, M)
    latents, inputs = ('rows', 'latents'), ('batch', 'context')
    angles_BN = logical.split(angles_BM[:, -N:], latents)
    z_BND = self._first_latents(
      logical.split(tokens_BM[:, -N:], latents),
      logical.split(ids_BMP[:, -N:], (*latents, None)),
    )

    mask = Mask(offset=M - N, start_B=start_B)
    if self.has_rng('dropout'):
      mask, tokens_BM, ids_BMP, angles_BM = self._drop_inputs(
        mask, tokens_BM, ids_BMP, angles_BM, row_B
      )
    # Where they are looked up, or XLA would move what it finds there.
    tokens_BM = logical.split(tokens_BM, inputs)
    ids_BMP = logical.split(ids_BMP, (*inputs, None))
    angles_BM = logical.split(angles_BM, inputs)
    mask = jax.tree.map(lambda x: logical.split(x, inputs[: x.ndim]), mask)
    row_B, first_B = (
      logical.split(x, ('rows',)) for x in (row_B, start_B - (M - N))
    )

    z_BND = self.cross(
      z_BND,
      self._cross_circle(angles_BN),
      self._inputs(tokens_BM, ids_BMP),
      self._cross_circle(angles_BM),
      mask,
      'inputs',
      row_B,
    )
    mask = Mask(offset=0, start_B=first_B)
    z_BND, _ = self.layers(
      z_BND, self._self_circle(angles_BN), mask, None, None, row_B
    )
    return z_BND

  def write_inputs(
    self, tokens_BT: jax.Array, positions_BTP: jax.Array, cache: Cache
  ) -> Cache:
    """Adds the keys and values of the next T <= M inputs to the cache."""
    T, M = tokens_BT.shape[1], cache.inputs.key.shape[1]
    assert T <= M, (T, M)
    index_T = cache.num_inputs + jnp.arange(T)
    ids_BTP, angles_BT = self._cached_positions(positions_BTP, index_T)
    kv = self.cross.rotated(
      self._inputs(tokens_BT, ids_BTP), self._cross_circle(angles_BT)
    )
    return dataclasses.replace(
      cache,
      inputs=cache.inputs.write(index_T % M, kv),
      num_inputs=cache.num_inputs + T,
    )

  def decode(
    self, tokens_BT: jax.Array, positions_BTP: jax.Array, cache: Cache
  ) -> tuple[jax.Array, Cache]:
    """Adds the last T inputs written as latents; logits after the last of them.

    With T = 1 this is one step; with `num_latents` set back to 0 and T > 1 it
    fills the latents anew. The two agree with `__call__` for as many latents.

    Args:
      tokens_BT: the last T inputs that `write_inputs` has seen.
      positions_BTP: their position ids.
      cache: has room for T more latents.

    Returns:
      Logits [B, V] float32 and the cache.
    """
    T = tokens_BT.shape[1]
    index_T = cache.num_inputs - T + jnp.arange(T)
    ids_BTP, angles_BT = self._cached_positions(positions_BTP, index_T)
    z_BTD = self._first_latents(tokens_BT, ids_BTP)
    z_BTD = self.cross(
      z_BTD,
      self._cross_circle(angles_BT),
      cache.inputs,
      None,
      cache_lib.inputs_mask(cache, T),
      'cache',
      None,
    )
    z_BTD, latents = self.layers(
      z_BTD,
      self._self_circle(angles_BT),
      cache_lib.latents_mask(cache),
      cache.num_latents + jnp.arange(T),
      cache.latents,
      None,
    )
    logits_BV = self.logits(self.norm(z_BTD[:, -1]))
    num_latents = cache.num_latents + T
    return logits_BV, dataclasses.replace(
      cache, latents=latents, num_latents=num_latents
    )

  def _first_latents(
    self, tokens_BN: jax.Array, ids_BNP: jax.Array
  ) -> jax.Array:
    x_BNE = self.embed(tokens_BN, ids_BNP, ('rows', 'latents'))
    return layers.latents(self.to_latents(x_BNE))

  def _inputs(self, tokens_BM: jax.Array, ids_BMP: jax.Array) -> KeyValue:
    """Keys and values, not yet rotated."""
    num_local = tokens_BM.size // sharded_attention.num_input_shards()
    if tables.has_keys_and_values(self.config, num_local):
      ids_1V = jnp.arange(self.config.vocab_size)[None]
      x_1VE = self.embed(
        ids_1V, jnp.zeros_like(ids_1V)[..., None], (None, None)
      )
      return self.cross.look_up(x_1VE[0], tokens_BM)
    x_BME = self.embed(tokens_BM, ids_BMP, ('batch', 'context'))
    return self.cross.keys_values(x_BME)

  def _positions(
    self, positions_BMP: jax.Array, slots_BM: jax.Array, num_slots: int
  ) -> tuple[jax.Array, jax.Array]:
    """Ids for the absolute tables, and positions for the rotary angles.

    Only differences of rotary positions count, so slots serve for positions
    counted from the end: their sign is `_circle`'s.
    """
    if self.config.position_source == 'data':
      return positions_BMP, positions_BMP[..., 0]
    return (num_slots - 1 - slots_BM)[..., None], slots_BM

  def _cached_positions(
    self, positions_BTP: jax.Array, index_T: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    c = self.config
    assert can_cache(c), 'absolute positions from the end move at every step'
    slots_BT = jnp.broadcast_to(index_T[None], positions_BTP.shape[:2])
    return self._positions(positions_BTP, slots_BT, 0)

  def _cross_circle(self, angles_BT: jax.Array) -> layers.Circle:
    c = self.config
    return self._circle(angles_BT, c.embed_width // c.num_cross_heads)

  def _self_circle(self, angles_BT: jax.Array) -> layers.Circle:
    c = self.config
    return self._circle(angles_BT, c.width // c.num_self_heads)

  def _circle(self, angles_BT: jax.Array, head_size: int) -> layers.Circle:
    c = self.config
    if c.position_encoding != 'rotary':
      return None
    num = int(head_size * c.rotary_fraction / 2)
    frequencies = positions.rotary_frequencies(num, c.rotary_max_wavelength)
    sin, cos = positions.unit_circle(angles_BT, frequencies, 0)
    return Turn(-sin if c.position_source == 'from_end' else sin, cos)

  def _drop_inputs(
    self,
    mask: Mask,
    tokens_BM: jax.Array,
    ids_BMP: jax.Array,
    angles_BM: jax.Array,
    row_B: jax.Array,
  ) -> tuple[Mask, jax.Array, jax.Array, jax.Array]:
    """Hides random inputs from the cross-attend, by a mask or by not computing.

    Both may drop a latent's own input; it still arrives by the residual. The
    second keeps `num_kept_inputs` of each row, padding last, and saves the
    projections and scores of the others.
    """
    c = self.config
    M, P = ids_BMP.shape[1:]
    unchanged = tokens_BM, ids_BMP, angles_BM
    if not (c.input_dropout_rate or c.num_kept_inputs):
      return mask, *unchanged
    assert mask.start_B is not None
    keys_B = layers.row_keys(self.make_rng('dropout'), row_B)
    random_BM = jax.vmap(lambda key: jax.random.uniform(key, (M,)))(keys_B)
    if c.input_dropout_rate:
      kept_BM = random_BM >= c.input_dropout_rate
      return dataclasses.replace(mask, kept_BM=kept_BM), *unchanged
    is_padding_BM = jnp.arange(M)[None] < mask.start_B[:, None]
    order_BM = jnp.where(is_padding_BM, 1.0, random_BM)
    # A shorter context than training's has no more inputs than M to keep.
    _, slots_BK = jax.lax.top_k(-order_BM, min(c.num_kept_inputs, M))
    slots_BK = jnp.sort(slots_BK, axis=1)
    # Of whole rows: XLA (jaxlib 0.10.2) fails to split this one over `context`.
    whole = lambda x: logical.constrain(x, ('batch', None))
    take = lambda x_BM: jnp.take_along_axis(whole(x_BM), slots_BK, axis=1)
    ids_BKP = jnp.stack([take(ids_BMP[..., p]) for p in range(P)], -1)
    mask = dataclasses.replace(mask, slots_BM=slots_BK)
    return mask, take(tokens_BM), ids_BKP, take(angles_BM)


def can_cache(config: ModelConfig) -> bool:
  """False where positions of inputs that are written already would change."""
  return (
    config.position_source == 'data' or config.position_encoding == 'rotary'
  )
