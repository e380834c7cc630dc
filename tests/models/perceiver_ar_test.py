"""The model is causal, blind to padding, and computes one function."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import (
  POSITIONS,
  default_config,
  make_batch,
  make_model,
  make_params,
  score,
)

from perceiver_ar import config as config_lib
from perceiver_ar.models.perceiver_ar import Embed, PerceiverAR
from perceiver_ar.ops.masks import Mask

_M, _N = 24, 8


def _score(model, batch, num_latents=None):
  num_rows = len(batch['tokens'])
  # Always as many rows, so that a model is compiled once.
  rows = {k: np.resize(v, (_M, *v.shape[1:])) for k, v in batch.items()}
  logits = score(model)(
    make_params(model),
    rows['tokens'][:, :-1],
    rows['positions'],
    num_latents=num_latents or model.num_latents,
  )
  return np.asarray(logits)[:num_rows]


def _changed_at_every_input(model, batch, name, start):
  """Logits without and with a change: row j has it in input j."""
  rows = {k: np.repeat(v, _M, 0) for k, v in batch.items()}
  changed = rows | {name: rows[name].copy()}
  at = np.arange(start, _M)
  if name == 'tokens':
    changed['tokens'][at, at] = 1 + rows['tokens'][at, at] % 30
  else:
    sizes = np.array([size or 2**20 for size in model.position_sizes])
    changed['positions'][at, at] = 1 + changed['positions'][at, at] % (
      sizes - 1
    )
  return _score(model, rows), _score(model, changed)


@pytest.mark.parametrize('attention', ['chunked', 'reference'])
def test_no_latent_has_a_gradient_from_its_future(attention):
  # Every input has a token of its own, so the gradient of a row of the token
  # table is that of one input.
  model = make_model(attention=attention, attention_block=5)
  tokens_1M = np.arange(3, 3 + _M, dtype=np.int32)[None]
  positions_1MP = np.arange(1, 1 + _M, dtype=np.int32)[None, :, None]
  params = make_params(model)
  weights_V = np.random.default_rng(0).normal(size=model.vocab_size)

  def latents(table: jax.Array) -> jax.Array:
    embed = params['embed'] | {'token': table}
    logits_1NV: Any = PerceiverAR(model).apply(
      {'params': params | {'embed': embed}},
      tokens_1M,
      positions_1MP,
      num_latents=_N,
    )
    return logits_1NV[0] @ jnp.asarray(weights_V, jnp.float32)

  grads_NVE = jax.jit(jax.jacrev(latents))(params['embed']['token'])
  grads_NME = np.asarray(grads_NVE)[:, 3 : 3 + _M]
  for n in range(_N):
    own = n + _M - _N
    assert (grads_NME[n, own + 1 :] == 0).all()
    assert (grads_NME[n, : own + 1] != 0).any(axis=-1).all()


@pytest.mark.parametrize(
  ('name', 'attention'),
  [
    ('rotary', 'chunked'),
    ('rotary_from_end', 'chunked'),
    ('learned_from_end', 'chunked'),
    ('rotary', 'reference'),
    pytest.param('rotary_from_end_negated', 'chunked', marks=pytest.mark.slow),
    pytest.param('sinusoidal', 'chunked', marks=pytest.mark.slow),
    pytest.param('sinusoidal_from_end', 'chunked', marks=pytest.mark.slow),
    pytest.param('learned_3d', 'chunked', marks=pytest.mark.slow),
    ('learned_3d', 'reference'),
    ('sinusoidal', 'reference'),
  ],
)
def test_a_latent_sees_its_own_input_and_exactly_none_after_it(name, attention):
  model = make_model(**POSITIONS[name], attention=attention)
  # Without padding, with padding, and with padding into the latents.
  for length in (_M, 11, 5):
    batch = make_batch(model, [length])
    start = _M - length
    before, after = _changed_at_every_input(model, batch, 'tokens', start)
    for j in range(start, _M):
      for n in range(_N):
        same = np.array_equal(before[j, n], after[j, n])
        assert same == (n + _M - _N < j), (length, j, n)
    if model.position_source == 'data':
      before, after = _changed_at_every_input(model, batch, 'positions', start)
      for j in range(start, _M):
        first = max(0, j - (_M - _N))
        np.testing.assert_array_equal(before[j, :first], after[j, :first])
        # A shift of all that a lone latent sees is no change to rotations.
        if j > start:
          assert not np.array_equal(before[j, first], after[j, first])


@pytest.mark.parametrize('name', ['rotary_from_end', 'learned_from_end'])
def test_more_padding_and_what_stands_in_it_change_nothing(name):
  model = make_model(**POSITIONS[name])
  batch = make_batch(model, [_M, 13, 5, 0])
  want = _score(model, batch)
  pad = lambda x: np.pad(x, [(0, 0), (7, 0), (0, 0)][: x.ndim])
  more = {k: pad(v) for k, v in batch.items()}
  is_padding = more['tokens'][:, :-1] == 0
  more['positions'][is_padding] = 3
  got = _score(model, more)
  assert np.isfinite(got).all()
  for row, length in enumerate((_M, 13, 5)):
    last = min(length, _N)
    np.testing.assert_allclose(
      got[row, -last:], want[row, -last:], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize(
  ('source', 'positions'),
  [('from_end', np.arange(_M, 0, -1)), ('from_end_negated', np.arange(_M) + 7)],
)
def test_positions_from_the_end_are_these_positions_of_data(source, positions):
  """Zero at the last input and up going back, or down if negated."""
  batch = make_batch(make_model(), [_M, 11])
  batch['positions'][:] = positions[None, :, None]
  want = _score(make_model(attention='reference'), batch)
  got = _score(make_model(attention='reference', position_source=source), batch)
  np.testing.assert_allclose(got[:, -5:], want[:, -5:], rtol=1e-4, atol=1e-5)


def test_a_lone_latent_is_the_last_input():
  model = make_model(attention='reference')
  batch = make_batch(model, [_M, 9, 1])
  logits = _score(model, batch, 1)
  assert logits.shape == (3, 1, model.vocab_size)
  # A document of one token: its only latent sees no other either.
  np.testing.assert_allclose(
    logits[2], _score(model, batch)[2, -1:], rtol=1e-4, atol=1e-5
  )


def test_more_latents_than_inputs_are_refused():
  model = make_model()
  with pytest.raises(AssertionError):
    _score(model, make_batch(model, [_M]), _M + 1)


def test_with_as_many_latents_as_inputs_every_input_predicts():
  """N = M with a causal mask: the first latent sees one input, and so on."""
  model = make_model(attention='reference')
  batch = make_batch(model, [_M])
  logits = _score(model, batch, _M)
  cut = {k: v[:, : _M // 2 + (k == 'tokens')] for k, v in batch.items()}
  np.testing.assert_allclose(
    logits[:, : _M // 2], _score(model, cut, _M // 2), rtol=1e-4, atol=1e-5
  )


@functools.cache
def _with_dropout(model):
  @functools.partial(jax.jit, static_argnames='num_latents')
  def apply(params, tokens, positions, key, *, num_latents):
    return PerceiverAR(model).apply(
      {'params': params},
      tokens,
      positions,
      num_latents=num_latents,
      rngs={'dropout': key},
    )

  return lambda batch, seed: np.asarray(
    apply(
      make_params(model),
      batch['tokens'][:, :-1],
      batch['positions'],
      jax.random.key(seed),
      num_latents=model.num_latents,
    )
  )


def test_dropout_acts_only_with_a_key_and_follows_it():
  model = make_model(dropout_rate=0.3, attention='reference')
  batch = make_batch(model, [_M])
  plain = _score(make_model(attention='reference'), batch)
  np.testing.assert_array_equal(_score(model, batch), plain)
  first, again, other = (_with_dropout(model)(batch, s) for s in (0, 0, 1))
  np.testing.assert_array_equal(first, again)
  assert not np.allclose(first, plain) and not np.allclose(first, other)


@pytest.mark.parametrize(
  'drop', [{'input_dropout_rate': 1e-30}, {'num_kept_inputs': _M}]
)
def test_dropping_no_inputs_is_not_dropping(drop):
  model = make_model(**drop, attention='reference')
  batch = make_batch(model, [_M, 11, 5, 0])
  want = _score(make_model(attention='reference'), batch)
  np.testing.assert_array_equal(_score(model, batch), want)
  got = _with_dropout(model)(batch, 0)
  np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
  'drop', [{'input_dropout_rate': 0.5}, {'num_kept_inputs': 7}]
)
def test_a_dropped_input_has_exactly_no_influence_but_by_its_latent(drop):
  model = make_model(**drop)
  length = 20
  batch = make_batch(model, [length])
  rows = {k: np.repeat(v, _M, 0) for k, v in batch.items()}
  # Every row is changed at another place, and draws the same both times.
  changed = {k: v.copy() for k, v in rows.items()}
  at = np.arange(_M - length, _M)
  changed['tokens'][at, at] = 1 + rows['tokens'][at, at] % 30
  run = _with_dropout(model)
  before, after = run(rows, 3), run(changed, 3)
  # Inputs before the latents matter by the cross-attend alone.
  context = range(_M - length, _M - _N)
  moved = np.array([not np.array_equal(before[j], after[j]) for j in context])
  assert 0 < moved.sum() < len(moved)
  for j in range(_M - _N, _M):
    n = j - (_M - _N)
    np.testing.assert_array_equal(before[j, :n], after[j, :n])
    assert not np.array_equal(before[j, n], after[j, n])


@pytest.mark.parametrize('num_kept', [1, 6, 20])
def test_exactly_so_many_inputs_are_kept_and_padding_last(num_kept):
  model = make_model(num_kept_inputs=num_kept)
  lengths = [_M, 13, 3, 0]
  batch = make_batch(model, lengths)

  def kept(module, tokens):
    M = tokens.shape[1]
    has_token = tokens != 0
    start = jnp.where(has_token.any(1), has_token.argmax(1), M)
    slots = jnp.broadcast_to(jnp.arange(M)[None], tokens.shape)
    return module._drop_inputs(
      Mask(offset=0, start_B=start),
      *(tokens, slots[..., None], slots),
      jnp.arange(len(tokens)),
    )

  for seed in range(5):
    result: Any = PerceiverAR(model).apply(
      {},
      batch['tokens'][:, :-1],
      rngs={'dropout': jax.random.key(seed)},
      method=kept,
    )
    mask, tokens, ids, angles = result
    slots = np.asarray(mask.slots_BM)
    assert slots.shape == (4, num_kept)
    np.testing.assert_array_equal(slots, np.asarray(ids)[..., 0])
    np.testing.assert_array_equal(slots, angles)
    for row, length in enumerate(lengths):
      assert len(set(slots[row])) == num_kept
      real = slots[row] >= _M - length
      assert real.sum() == min(num_kept, length)
      np.testing.assert_array_equal(
        tokens[row], batch['tokens'][row, slots[row]]
      )


def test_every_input_is_equally_likely_to_be_kept():
  model = make_model(num_kept_inputs=6)
  tokens = np.ones((4000, _M), np.int32)

  @jax.jit
  def slots(tokens, key):
    def kept(module, tokens):
      mask = Mask(offset=0, start_B=jnp.zeros(len(tokens), jnp.int32))
      at = jnp.zeros_like(tokens)
      mask, *_ = module._drop_inputs(
        mask, tokens, at[..., None], at, jnp.arange(len(tokens))
      )
      return mask.slots_BM

    return PerceiverAR(model).apply(
      {}, tokens, method=kept, rngs={'dropout': key}
    )

  counts = np.bincount(np.ravel(slots(tokens, jax.random.key(0))), minlength=_M)
  # 1,000 expected with a standard deviation of 27.
  assert np.abs(counts - 1000).max() < 150


def test_inputs_that_are_not_kept_are_not_computed():
  def flops(num_kept):
    model = make_model(
      num_kept_inputs=num_kept,
      attention='reference',
      context_length=256,
      position_encoding='sinusoidal',
    )
    shape = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)

    def run(params, tokens, positions, key):
      return PerceiverAR(model).apply(
        {'params': params},
        tokens,
        positions,
        num_latents=_N,
        rngs={'dropout': key},
      )

    lowered = jax.jit(run).lower(
      make_params(model), shape((2, 256)), shape((2, 256, 1)), jax.random.key(0)
    )
    cost: Any = lowered.compile().cost_analysis()
    return cost['flops']

  # Keys, values and scores of 256 inputs, against those of 32.
  assert flops(32) < 0.5 * flops(0)


def test_bfloat16_keeps_parameters_and_logits_in_float32():
  model = make_model(dtype='bfloat16')
  batch = make_batch(model, [_M, 11])
  boxed = jax.eval_shape(
    functools.partial(PerceiverAR(model).init, num_latents=_N),
    jax.random.key(0),
    batch['tokens'][:, :-1],
    batch['positions'],
  )
  assert {x.dtype for x in jax.tree.leaves(boxed)} == {jnp.dtype('float32')}
  got = _score(model, batch)
  want = _score(make_model(), batch)
  assert got.dtype == np.float32
  assert not np.array_equal(got, want)
  # Not just float32 values that bfloat16 could hold.
  assert (got != np.asarray(jnp.asarray(got, jnp.bfloat16), 'f4')).mean() > 0.5
  error = np.abs(got - want)[:, -5:]
  assert error.mean() < 0.05 * np.abs(want).mean()


@functools.cache
def _gradients(model):
  """Of a loss by all parameters, for a whole and for a padded row."""
  batch = make_batch(model, [_M, 11])

  def loss(params):
    logits = score(model)(
      params, batch['tokens'][:, :-1], batch['positions'], num_latents=_N
    )
    return jnp.square(logits).mean()

  return jax.jit(jax.value_and_grad(loss))(make_params(model))


@pytest.mark.parametrize(
  'how',
  [
    pytest.param({'remat': 'dots', 'scan_unroll': 2}, marks=pytest.mark.slow),
    {'remat': 'full', 'attention': 'reference'},
  ],
)
def test_how_it_is_computed_changes_no_value_and_no_gradient(how):
  want, got = _gradients(make_model()), _gradients(make_model(**how))
  jax.tree.map(
    lambda a, b: np.testing.assert_allclose(a, b, rtol=2e-4, atol=1e-5),
    got,
    want,
  )


@pytest.mark.parametrize('token', [31, 1000, -1])
def test_a_token_outside_of_the_vocabulary_gives_nan(token):
  model = make_model()
  batch = make_batch(model, [_M, _M])
  batch['tokens'][0, 10] = token
  logits = _score(model, batch)
  assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


@pytest.mark.parametrize(
  ('name', 'position'),
  [
    ('learned_3d', 90),
    ('learned_3d', -1),
    ('rotary', -1),
    ('sinusoidal', -1),
  ],
)
def test_a_position_outside_of_its_range_gives_nan(name, position):
  model = make_model(**POSITIONS[name], attention='reference')
  batch = make_batch(model, [_M, _M])
  batch['positions'][0, 10, 0] = position
  logits = _score(model, batch)
  assert np.isnan(logits[0]).all() and np.isfinite(logits[1]).all()


@functools.cache
def _fresh_params():
  model = make_model(width=64, embed_width=48, vocab_size=200)
  init = jax.jit(PerceiverAR(model).init, static_argnames='num_latents')
  params = init(
    jax.random.key(0),
    jnp.ones((1, _M), jnp.int32),
    jnp.ones((1, _M, 1), jnp.int32),
    num_latents=_N,
  )['params']
  flat = jax.tree_util.tree_leaves_with_path(params)
  return {
    '/'.join(str(k.key) for k in path if hasattr(k, 'key')): np.asarray(x)
    for path, x in flat
  }


def test_fresh_parameters_have_the_published_spread():
  fan_in = {
    'to_latents': 1,
    'query': 1,
    'key': 1,
    'value': 1,
    'up': 1,
    'down': 1,
    'out': 2,
  }
  checked = 0
  for name, x in _fresh_params().items():
    *_, layer, kind = name.split('/')
    stacked = name.startswith('layers/')
    if kind == 'kernel' and layer != 'logits':
      first = int(stacked)
      inputs = np.prod(x.shape[first : first + fan_in[layer]])
      np.testing.assert_allclose(x.std() * inputs**0.5, 1, atol=0.06)
      if stacked:
        assert not np.array_equal(x[0], x[1])
      checked += 1
    elif kind == 'token':
      np.testing.assert_allclose(x.std(), 0.88, atol=0.02)
      assert np.abs(x).max() <= 2
    else:
      assert (x == (kind == 'scale')).all(), name
  assert checked == 1 + 2 * 6


def _published(**changes):
  raw = default_config()
  raw.update_from_flattened_dict(
    {
      'model.width': 1024,
      'model.num_cross_heads': 16,
      'model.num_self_heads': 16,
      'model.num_latents': 1024,
      'data.min_crop': 1,
    }
    | {f'model.{k}': v for k, v in changes.items()}
  )
  return config_lib.resolve(raw).model


def _num_parameters(model):
  M, P = model.context_length, len(model.position_sizes)
  ids = functools.partial(jax.ShapeDtypeStruct, dtype=jnp.int32)
  params = jax.eval_shape(
    functools.partial(PerceiverAR(model).init, num_latents=model.num_latents),
    jax.random.key(0),
    ids((1, M)),
    ids((1, M, P)),
  )
  return sum(x.size for x in jax.tree.leaves(params))


def test_parameter_counts_are_those_of_the_published_configs():
  count = lambda **changes: _num_parameters(_published(**changes))
  sinusoidal = {'position_encoding': 'sinusoidal'}
  # The published tables of sines are parameters; ours are not.
  assert (
    count(context_length=32, num_latents=16, num_layers=1, **sinusoidal)
    == 26_810_627 - 33 * 1024
  )
  assert (
    count(context_length=131_072, num_layers=6, **sinusoidal)
    == 223_976_707 - 134_218_752
  )
  assert (
    count(
      context_length=12_416,
      num_layers=60,
      position_encoding='learned',
      position_sizes=(66, 66, 5),
    )
    == 770_094_339
  )


@pytest.mark.parametrize(
  ('millions', 'changes'),
  [
    (
      974.2,
      {
        'vocab_size': 32_000,
        'embed_width': 4096,
        'num_cross_heads': 128,
        'num_layers': 60,
      },
    ),
    (165.6, {'vocab_size': 391, 'num_layers': 12}),
    (316.8, {'vocab_size': 391, 'num_layers': 24}),
    (215.2, {'vocab_size': 24_579, 'num_layers': 12}),
    (408.3, {'vocab_size': 45_059, 'num_layers': 24}),
  ],
)
def test_parameter_counts_of_the_paper(millions, changes):
  assert round(_num_parameters(_published(**changes)) / 1e6, 1) == millions


def test_the_parameters_do_not_depend_on_the_lengths():
  sizes = [
    _num_parameters(make_model(context_length=M, num_latents=N))
    for M, N in ((24, 8), (48, 24))
  ]
  assert sizes[0] == sizes[1]
  scanned = make_params(make_model())['layers']
  assert all(x.shape[0] == 2 for x in jax.tree.leaves(scanned))


def test_sinusoidal_positions_from_a_table_are_the_same():
  """Where there are fewer positions than inputs."""
  at = jnp.asarray(np.random.default_rng(0).integers(0, 30, (8, 16)))
  at = at.at[3, 5].set(30).at[2, 0].set(-1)
  embed = Embed(make_model(position_encoding='sinusoidal'))
  found = [
    np.asarray(embed.apply({}, rows_BM, 30, method=Embed._sinusoidal))
    for rows_BM in (at, at[:1])
  ]
  np.testing.assert_array_equal(found[0][:1], found[1])
  assert np.isnan(found[0][3, 5]).all() and np.isnan(found[0][2, 0]).all()
  assert np.isnan(found[0]).any(axis=-1).sum() == 2
