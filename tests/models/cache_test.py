"""Cached decoding gives the logits of `__call__` with as many latents."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import POSITIONS, make_batch, make_model, make_params, score

from perceiver_ar.models import cache as cache_lib
from perceiver_ar.models.perceiver_ar import PerceiverAR, can_cache

# A ring of M inputs; N latents; refilled with R; a first prompt of T.
_M, _N, _R, _T = 10, 4, 2, 3
_CACHED = [
  'rotary_half_heads',
  'rotary',
  'rotary_from_end',
  'rotary_from_end_negated',
  'sinusoidal',
  'learned_3d',
]


@functools.cache
def _method(model, name):
  method = getattr(PerceiverAR, name)

  @jax.jit
  def call(params, *args):
    return PerceiverAR(model).apply({'params': params}, *args, method=method)

  return call


def _decode_all(model, tokens, positions):
  """Yields (number of inputs, number of latents, logits) at every step."""
  params = make_params(model)
  cache = cache_lib.empty(model, len(tokens), _M, _N)
  at, num_new = 0, _T
  while at < tokens.shape[1]:
    new = slice(at, at + num_new)
    cache = _method(model, 'write_inputs')(
      params, tokens[:, new], positions[:, new], cache
    )
    at += num_new
    count = int(cache.num_latents)
    if count == 0 or count == _N:
      cache = dataclasses.replace(cache, num_latents=jnp.int32(0))
      last = slice(at - _R, at)
    else:
      last = slice(at - 1, at)
    logits, cache = _method(model, 'decode')(
      params, tokens[:, last], positions[:, last], cache
    )
    num_new = 1
    assert int(cache.num_inputs) == at
    yield at, int(cache.num_latents), np.asarray(logits)


def _call(model, tokens, positions, at, num_latents):
  """Logits of the last of the last M inputs, padded to M of them."""
  pad = max(0, _M - at)
  window = slice(max(0, at - _M), at)
  wide = lambda x: np.pad(x[:, window], [(0, 0), (pad, 0), (0, 0)][: x.ndim])
  logits = score(model)(
    make_params(model), wide(tokens), wide(positions), num_latents=num_latents
  )
  return np.asarray(logits)[:, -1]


@pytest.mark.parametrize(
  'name',
  [
    name
    if name in ('rotary_from_end', 'sinusoidal')
    else pytest.param(name, marks=pytest.mark.slow)
    for name in _CACHED
  ],
)
def test_every_step_equals_a_call_with_as_many_latents(name):
  model = make_model(**POSITIONS[name], attention='reference')
  batch = make_batch(model, [24, 24])
  tokens, positions = batch['tokens'][:, :16], batch['positions'][:, :16]
  num_refills = num_wrapped = 0
  for at, count, logits in _decode_all(model, tokens, positions):
    num_refills += count == _R
    num_wrapped += at > _M and count == _R
    # Behind a full ring older latents have seen older inputs, but none do
    # right after a refill.
    if at <= _M or count == _R:
      want = _call(model, tokens, positions, at, count)
      np.testing.assert_allclose(logits, want, rtol=2e-4, atol=2e-5)
  assert num_refills > 3 and num_wrapped > 1


@pytest.mark.slow
def test_chunked_attention_decodes_the_same():
  batch = make_batch(make_model(), [24, 24])
  tokens, positions = batch['tokens'][:, :14], batch['positions'][:, :14]
  steps = [
    [x for *_, x in _decode_all(make_model(attention=a), tokens, positions)]
    for a in ('chunked', 'reference')
  ]
  np.testing.assert_allclose(*steps, rtol=2e-4, atol=2e-5)


def test_what_stands_in_rows_not_yet_written_is_never_seen():
  # The compiled functions of the test above.
  model = make_model(**POSITIONS['sinusoidal'], attention='reference')
  batch = make_batch(model, [24, 24])
  tokens, positions = batch['tokens'][:, :_T], batch['positions'][:, :_T]
  empty = cache_lib.empty(model, 2, _M, _N)
  full = jax.tree.map(lambda x: x + 1e3 if x.ndim else x, empty)
  results = []
  for cache in (empty, full):
    params = make_params(model)
    cache = _method(model, 'write_inputs')(params, tokens, positions, cache)
    logits, _ = _method(model, 'decode')(
      params, tokens[:, -2:], positions[:, -2:], cache
    )
    results.append(logits)
  np.testing.assert_array_equal(*results)


def test_a_ring_keeps_the_last_inputs_in_their_rows():
  model = make_model()
  cache = cache_lib.empty(model, 1, 4, 2)
  rows = cache.inputs.key.shape[1]
  for num_inputs in range(1, 11):
    for num_queries in (1, min(2, num_inputs)):
      at = dataclasses.replace(cache, num_inputs=jnp.int32(num_inputs))
      mask = cache_lib.inputs_mask(at, num_queries)
      assert mask.slots_BM is not None and mask.kept_BM is not None
      for row in range(rows):
        index = max(
          (i for i in range(num_inputs) if i % rows == row), default=None
        )
        assert bool(mask.kept_BM[0, row]) == (index is not None)
        if index is not None:
          # Query 0 is the input of slot 0.
          assert mask.slots_BM[0, row] == index - (num_inputs - num_queries)


def test_a_cache_has_the_type_of_compute():
  cache = cache_lib.empty(make_model(dtype='bfloat16'), 2, _M, _N)
  assert cache.inputs.key.dtype == cache.latents.value.dtype == jnp.bfloat16
  assert cache.inputs.key.shape == (2, _M, 16)
  assert cache.latents.key.shape == (2, 2, _N, 16)


@pytest.mark.parametrize('name', POSITIONS)
def test_only_positions_that_do_not_move_can_be_cached(name):
  assert can_cache(make_model(**POSITIONS[name])) == (name in _CACHED)


def test_decoding_with_positions_that_move_is_refused():
  model = make_model(**POSITIONS['learned_from_end'])
  cache = cache_lib.empty(model, 1, _M, _N)
  ones = np.ones((1, 1), np.int32)
  with pytest.raises(AssertionError, match='move at every step'):
    _method(model, 'write_inputs')(
      make_params(model), ones, ones[..., None], cache
    )
