"""Sampling: cached, of any length, in constant memory.

In training a latent never sees more than N - 1 others, so the latents' cache
is not rolled: when it holds N, the newest `refill_latents` inputs are made
latents anew and it fills up from there (published appendix E.3). Keys and
values of the inputs stay valid and are never computed twice; past M the
oldest make room for the newest. What is drawn is what full forward passes with
as many latents would give; past M only right after a refill, because older
latents saw inputs that have left since (as published).

Letters: B samples, M inputs, N latents, R latents after a refill, T tokens,
P position axes, V vocabulary.
"""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from perceiver_ar import distributed, logical, mesh_checks, partitioning
from perceiver_ar.config import Config, SampleConfig
from perceiver_ar.data import layouts
from perceiver_ar.errors import UserError
from perceiver_ar.models import cache as cache_lib
from perceiver_ar.models.cache import Cache
from perceiver_ar.models.perceiver_ar import PerceiverAR, can_cache
from perceiver_ar.parameters import Params

_PROMPT_CHUNK = 1024  # prompt tokens whose keys are computed together
_UNCACHED_STEPS = 64  # between looks at the host, without a cache


def choose_tokens(
  logits_BV: jax.Array, keys_B: jax.Array, how: SampleConfig
) -> jax.Array:
  """One token for each row, [B] int32.

  The nucleus and the k likeliest are taken before the temperature is applied,
  as published. Temperature 0 or top_p 0 is the likeliest token.

  Args:
    logits_BV: float32; -inf for tokens that must not be chosen.
    keys_B: a random key per row.
    how: temperature, top_p, top_k.
  """
  if how.temperature == 0 or how.top_p == 0:
    return logits_BV.argmax(-1).astype(jnp.int32)
  ascending_BV = jnp.sort(logits_BV, axis=-1)
  lowest_B1 = ascending_BV[:, :1]
  if how.top_k:
    kth = max(logits_BV.shape[-1] - how.top_k, 0)
    lowest_B1 = ascending_BV[:, kth : kth + 1]
  if how.top_p < 1:
    mass_BV = jnp.cumsum(jax.nn.softmax(ascending_BV, axis=-1), axis=-1)
    # Rounding may leave the whole mass below 1 - top_p.
    first_B = (mass_BV[:, :-1] < 1 - how.top_p).sum(axis=-1)
    nucleus_B1 = jnp.take_along_axis(ascending_BV, first_B[:, None], axis=-1)
    lowest_B1 = jnp.maximum(lowest_B1, nucleus_B1)
  kept_BV = jnp.where(logits_BV >= lowest_B1, logits_BV, -jnp.inf)
  draw = jax.vmap(jax.random.categorical)
  return draw(keys_B, kept_BV / how.temperature).astype(jnp.int32)


class Sampler:
  """Continues one prompt, B times over.

  A sample is a function of (seed, its row, the prompt): how many others are
  drawn with it does not matter.
  """

  def __init__(
    self,
    config: Config,
    params: Params,
    mesh: Mesh,
    *,
    layout: dict[str, Any],
    forbidden: Sequence[int],
  ):
    self._config = config
    self._params = params
    self._layout = layout
    how = config.sample
    mesh_checks.check_sample(config, mesh)
    self._N, self._R = how.num_latents, how.refill_latents
    self._M = config.model.context_length
    step = _Step(config, mesh, tuple(forbidden))
    self._empty = make_empty(config, mesh)
    self._write = jax.jit(
      functools.partial(step.apply, method=PerceiverAR.write_inputs),
      donate_argnums=3,
    )
    self._segment = make_segment(config, mesh, forbidden)
    whole = partitioning.replicated(mesh)  # every process reads what is drawn
    self._uncached = jax.jit(step.uncached_segment, out_shardings=(None, whole))

  def run(
    self, prompt_T: np.ndarray, length: int, drawn_BT: np.ndarray | None = None
  ) -> Iterator[np.ndarray]:
    """Yields [B, some] new tokens at a time, `length` of them in all.

    Args:
      prompt_T: at least one token (SOS), any length.
      length: tokens to draw.
      drawn_BT: what another call has yielded of them, to go on from there.
    """
    self.check_length(len(prompt_T) + length)
    known_BT = np.tile(prompt_T, (self._config.sample.num_samples, 1))
    if drawn_BT is not None:
      known_BT = np.concatenate([known_BT, drawn_BT], axis=1)
    left = len(prompt_T) + length - known_BT.shape[1]
    if can_cache(self._config.model):
      yield from self._run_cached(known_BT, left)
    else:
      yield from self._run_uncached(known_BT, left)

  def _run_cached(
    self, known_BT: np.ndarray, left: int
  ) -> Iterator[np.ndarray]:
    cache = self._prime(known_BT[:, :-1], self._empty())
    recent_BT = known_BT[:, -max(self._R, 1) :]
    index = known_BT.shape[1]
    while left:
      T = min(self._R, index)
      distributed.collective(f'tokens from {index}')
      new_BT, num, cache = self._segment(
        self._params,
        recent_BT[:, -T:],
        self._positions(index - T, index + self._N - T + 1),
        cache,
        np.int32(index),
        np.int32(left),
      )
      new_BT = np.asarray(new_BT)[:, : int(num)]
      recent_BT = np.concatenate([recent_BT, new_BT], axis=1)[:, -self._R :]
      index, left = index + new_BT.shape[1], left - new_BT.shape[1]
      yield new_BT

  def _prime(self, known_BT: np.ndarray, cache: Cache) -> Cache:
    """Keys and values of inputs; what is further back than M is skipped."""
    num, chunk = known_BT.shape[1], min(_PROMPT_CHUNK, self._M)
    first = max(0, num + 1 - self._M)
    cache = dataclasses.replace(cache, num_inputs=np.int32(first))
    # Whole chunks come last, so that only the first may need a compile more.
    for end in list(range(num, first, -chunk))[::-1]:
      begin = max(first, end - chunk)
      distributed.collective(f'keys and values from {begin}')
      cache = self._write(
        self._params,
        known_BT[:, begin:end],
        self._positions(begin, end),
        cache,
      )
    return cache

  def _run_uncached(
    self, known_BT: np.ndarray, left: int
  ) -> Iterator[np.ndarray]:
    """Every token from a full forward pass: all positions move with it."""
    B, index = known_BT.shape
    window_BM = np.zeros((B, self._M), np.int32)
    tail_BT = known_BT[:, -self._M :]
    window_BM[:, self._M - tail_BT.shape[1] :] = tail_BT
    while left:
      num = min(left, _UNCACHED_STEPS)
      distributed.collective(f'tokens from {index}')
      window_BM, new_BT = self._uncached(
        self._params, window_BM, np.int32(index)
      )
      # The last turn draws more than is asked for.
      yield np.asarray(new_BT)[:, :num]
      index, left = index + num, left - num

  def _positions(self, begin: int, end: int) -> np.ndarray:
    """Position ids [B, T, P] of these tokens of the document."""
    indices = np.minimum(np.arange(begin, end), self._last_index)
    ids_TP = layouts.positions(self._layout, indices)
    B = self._config.sample.num_samples
    return np.broadcast_to(ids_TP[None], (B, *ids_TP.shape))

  def room(self, num_prompt: int, length: int) -> int:
    """How many of `length` tokens fit after a prompt, SOS not counted.

    Raises:
      UserError: none, or more than the model's positions reach.
    """
    if most := layouts.max_tokens(self._layout):
      if num_prompt + 1 >= most:
        raise UserError(
          f'the prompt has {num_prompt} tokens, and a document has '
          f'{most - 1}: there is nothing left to draw; cut it with '
          '--prompt_length'
        )
      length = min(length, most - 1 - num_prompt)
    self.check_length(1 + num_prompt + length)
    return length

  def check_length(self, total: int) -> None:
    """Refuses samples that would run off the model's positions."""
    # The last token drawn is never an input. Segments ask for positions past
    # it, which are not used.
    self._last_index = total - 2
    model = self._config.model
    if model.position_source != 'data':
      return
    largest = layouts.largest(self._layout, total - 1)
    for size, last in zip(model.position_sizes, largest, strict=True):
      if size and last >= size:
        raise UserError(
          f'prompt and samples come to {total} tokens, whose positions reach '
          f'{last}, and the model knows them up to {size - 1}; lower --length '
          'or shorten the prompt'
        )


def make_segment(config: Config, mesh: Mesh, forbidden: Sequence[int]) -> Any:
  """The compiled `_Step.segment`; it takes over the buffers of the cache."""
  step = _Step(config, mesh, tuple(forbidden))
  whole = partitioning.replicated(mesh)  # every process reads what is drawn
  return jax.jit(
    step.segment, donate_argnums=3, out_shardings=(whole, whole, None)
  )


def make_empty(config: Config, mesh: Mesh) -> Any:
  """The compiled `cache.empty`, whose rows lie where they are decoded."""
  how, M = config.sample, config.model.context_length
  empty = functools.partial(
    cache_lib.empty, config.model, how.num_samples, M, how.num_latents
  )
  inputs, latents = (logical.decoding_sharding(mesh, i) for i in (0, 1))

  def sharding(path: Any, leaf: Any) -> Any:
    if not leaf.shape:
      return partitioning.replicated(mesh)
    return inputs if path[0].name == 'inputs' else latents

  shardings = jax.tree_util.tree_map_with_path(sharding, jax.eval_shape(empty))
  return jax.jit(empty, out_shardings=shardings)


class _Step:
  """The compiled parts, pure functions of (params, tokens, cache, counts)."""

  def __init__(self, config: Config, mesh: Mesh, forbidden: tuple[int, ...]):
    self._how = config.sample
    self._model = PerceiverAR(config.model)
    self._forbidden = forbidden
    self._pin = functools.partial(logical.decoding, mesh, config.mesh.rules)

  def apply(
    self,
    params: Params,
    tokens_BT: jax.Array,
    positions_BTP: jax.Array,
    cache: Cache,
    method: Any,
  ) -> Any:
    """Runs a method of the model that takes inputs and a cache."""
    with self._pin():
      return self._model.apply(
        {'params': params}, tokens_BT, positions_BTP, cache, method=method
      )

  def segment(
    self,
    params: Params,
    recent_BT: jax.Array,
    positions_BSP: jax.Array,
    cache: Cache,
    index: jax.Array,
    limit: jax.Array,
  ) -> tuple[jax.Array, jax.Array, Cache]:
    """Refills the latents with T inputs, then draws until N are in use.

    Args:
      params: of the model.
      recent_BT: the last T tokens; the very last is not in the cache yet.
      positions_BSP: of these T, and of the tokens that will be drawn.
      cache: holds all inputs but the last.
      index: of the first token to draw, in its document.
      limit: draws at most so many.

    Returns:
      Tokens [B, N - T + 1], how many of them are drawn, and the cache.
    """
    B, T = recent_BT.shape
    room = cache.latents.key.shape[2] - T + 1
    write = functools.partial(self.apply, method=PerceiverAR.write_inputs)
    decode = functools.partial(self.apply, method=PerceiverAR.decode)
    cache = write(params, recent_BT[:, -1:], positions_BSP[:, T - 1 : T], cache)
    cache = dataclasses.replace(cache, num_latents=jnp.int32(0))
    logits_BV, cache = decode(params, recent_BT, positions_BSP[:, :T], cache)
    new_BT = jnp.zeros((B, room), jnp.int32)
    new_BT = new_BT.at[:, 0].set(self._choose(logits_BV, index))

    def body(carry: Any) -> Any:
      new_BT, num, cache = carry
      token_B1 = jax.lax.dynamic_slice_in_dim(new_BT, num - 1, 1, 1)
      position_B1P = jax.lax.dynamic_slice_in_dim(
        positions_BSP, T + num - 1, 1, 1
      )
      cache = write(params, token_B1, position_B1P, cache)
      logits_BV, cache = decode(params, token_B1, position_B1P, cache)
      drawn_B = self._choose(logits_BV, index + num)
      return new_BT.at[:, num].set(drawn_B), num + 1, cache

    return jax.lax.while_loop(
      lambda carry: carry[1] < jnp.minimum(room, limit),
      body,
      (new_BT, jnp.int32(1), cache),
    )

  def uncached_segment(
    self, params: Params, window_BM: jax.Array, index: jax.Array
  ) -> tuple[jax.Array, jax.Array]:
    """Draws some tokens, each from a full forward pass over the window."""
    N = self._how.num_latents
    positions_BMP = jnp.zeros((*window_BM.shape, 1), jnp.int32)

    def body(window_BM: jax.Array, i: jax.Array) -> Any:
      with self._pin():
        logits_BNV = self._model.apply(
          {'params': params}, window_BM, positions_BMP, num_latents=N
        )
      assert isinstance(logits_BNV, jax.Array)
      drawn_B = self._choose(logits_BNV[:, -1], index + i)
      window_BM = jnp.concatenate([window_BM[:, 1:], drawn_B[:, None]], 1)
      return window_BM, drawn_B

    window_BM, new_TB = jax.lax.scan(
      body, window_BM, jnp.arange(_UNCACHED_STEPS)
    )
    return window_BM, new_TB.T

  def _choose(self, logits_BV: jax.Array, index: jax.Array) -> jax.Array:
    key = jax.random.fold_in(jax.random.key(self._how.seed), index)
    rows_B = jnp.arange(logits_BV.shape[0])
    keys_B = jax.vmap(functools.partial(jax.random.fold_in, key))(rows_B)
    banned = jnp.asarray(self._forbidden, jnp.int32)
    logits_BV = logits_BV.at[:, banned].set(-jnp.inf)
    return choose_tokens(logits_BV, keys_B, self._how)
