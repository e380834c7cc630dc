"""What a sampler draws is what full forward passes would draw."""

import dataclasses
import functools
import resource
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import POSITIONS, make_config, make_params, score

from perceiver_ar import partitioning, sample
from perceiver_ar.data import layouts, tokens
from perceiver_ar.errors import UserError

FORBIDDEN = (0, 2)
M, N = 24, 8  # of the tiny model


@functools.cache
def make_sampler(changes=(), **how):
  """Kept, so that tests share what was compiled."""
  flat = {f'sample.{name}': value for name, value in how.items()}
  few = {'sample.num_samples': 2, 'sample.refill_latents': 4}
  config = make_config({'model.num_layers': 1, **few, **flat, **dict(changes)})
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  return config, sample.Sampler(
    config,
    make_params(config.model),
    mesh,
    layout=layouts.INDEX,
    forbidden=FORBIDDEN,
  )


def model_changes(positions):
  return tuple((f'model.{k}', v) for k, v in POSITIONS[positions].items())


def draw(sampler, prompt, length):
  parts = list(sampler.run(np.array(prompt, np.int32), length))
  return np.concatenate(parts, axis=1)


def make_prompt(length):
  rng = np.random.default_rng(length)
  return np.concatenate([[tokens.SOS], rng.integers(3, 31, length - 1)])


@functools.cache
def next_logits(config, tokens, num_latents):
  """Logits for the token after these, from a full forward pass."""
  model = dataclasses.replace(config.model, attention='reference')
  first, P = max(0, len(tokens) - M), len(model.position_sizes)
  inputs_M = np.zeros(M, np.int32)
  positions_MP = np.zeros((M, P), np.int32)
  inputs_M[M - len(tokens) + first :] = tokens[first:]
  positions_MP[M - len(tokens) + first :] = np.arange(first, len(tokens))[
    :, None
  ] + np.ones(P, np.int32)
  logits_BNV = score(model)(
    make_params(config.model),
    inputs_M[None],
    positions_MP[None],
    num_latents=num_latents,
  )
  return logits_BNV[:, -1].at[:, FORBIDDEN].set(-jnp.inf)


def choose(config, logits_BV, index, row):
  key = jax.random.fold_in(jax.random.key(config.sample.seed), index)
  keys_B = jax.random.fold_in(key, row)[None]
  return int(sample.choose_tokens(logits_BV, keys_B, config.sample)[0])


def num_latents_at(index, start, refill):
  """How many latents the schedule has when it draws the token at `index`."""
  at = start
  while True:
    first = min(refill, at)
    room = N - first + 1
    if index < at + room:
      return first + index - at
    at += room


def expected(config, prompt, length, row):
  """Token by token, with as many latents as the sampler has at that point."""
  tokens = tuple(int(t) for t in prompt)
  refill = config.sample.refill_latents
  for index in range(len(prompt), len(prompt) + length):
    num = num_latents_at(index, len(prompt), refill)
    logits_BV = next_logits(config, tokens, num)
    tokens += (choose(config, logits_BV, index, row),)
  return list(tokens[len(prompt) :])


# From SOS alone, and from prompts below R, below N and above N, as far as M.
@pytest.mark.parametrize(
  'prompt_length',
  [*(pytest.param(n, marks=pytest.mark.slow) for n in (1, 3)), 6, 12],
)
def test_samples_are_those_of_full_forward_passes(prompt_length):
  config, sampler = make_sampler()
  prompt = make_prompt(prompt_length)
  length = M + 1 - prompt_length
  found = draw(sampler, prompt, length)
  assert found.shape == (2, length)
  for row in range(2):
    wanted = expected(config, prompt, length, row)
    assert found[row].tolist() == wanted
  assert found[0].tolist() != found[1].tolist()


@pytest.mark.slow
@pytest.mark.parametrize('positions', ['rotary_from_end', 'sinusoidal'])
def test_so_they_are_with_other_positions(positions):
  config, sampler = make_sampler(
    model_changes(positions), top_k=9, refill_latents=7
  )
  prompt = make_prompt(10)
  assert draw(sampler, prompt, 15)[0].tolist() == expected(
    config, prompt, 15, 0
  )


def test_so_are_the_likeliest_tokens():
  config, sampler = make_sampler(temperature=0.0)
  prompt = make_prompt(10)
  assert draw(sampler, prompt, 15)[0].tolist() == expected(
    config, prompt, 15, 0
  )


@pytest.mark.parametrize('prompt_length', [M - 3, M + 1, 2 * M + 5])
def test_after_every_refill_past_m_nothing_older_than_m_counts(prompt_length):
  config, sampler = make_sampler()
  prompt = make_prompt(prompt_length)
  found = draw(sampler, prompt, 23)[0]
  text_T = tuple(int(t) for t in np.concatenate([prompt, found]))
  room = N - 4 + 1
  for index in range(prompt_length, len(text_T), room):
    logits_BV = next_logits(config, text_T[:index], 4)
    assert choose(config, logits_BV, index, 0) == text_T[index]


def test_refilling_all_latents_at_every_token_is_no_cache_at_all():
  config, sampler = make_sampler(refill_latents=N)
  prompt = make_prompt(M - 4)
  found = draw(sampler, prompt, 12)[0].tolist()
  assert found == expected(config, prompt, 12, 0)


def test_positions_that_move_with_the_end_are_sampled_without_a_cache():
  config, sampler = make_sampler(model_changes('sinusoidal_from_end'))
  prompt = make_prompt(5)
  found = draw(sampler, prompt, 70)[0].tolist()  # past M, and 64 at a time
  tokens = tuple(int(t) for t in prompt)
  for index, token in enumerate(found, 5):
    if index < 12 or index > 65:
      logits_BV = next_logits(config, tokens, N)
      assert choose(config, logits_BV, index, 0) == token
    tokens += (token,)
  assert len(found) == 70


@pytest.mark.slow
def test_a_sample_depends_on_its_row_and_seed_and_not_on_the_others():
  prompt = make_prompt(4)
  few = draw(make_sampler()[1], prompt, 3 * M)
  many = draw(make_sampler(num_samples=3)[1], prompt, 3 * M)
  np.testing.assert_array_equal(many[:2], few)
  assert len({tuple(row) for row in many.tolist()}) == 3
  again = draw(make_sampler()[1], prompt, 2 * M)
  np.testing.assert_array_equal(again, few[:, : 2 * M])
  other = draw(make_sampler(seed=1)[1], prompt, 2 * M)
  assert (other != again).any()
  assert not np.isin(many, FORBIDDEN).any()


def test_samples_that_run_off_the_positions_are_refused():
  changes = (
    ('model.position_encoding', 'learned'),
    ('model.position_sizes', (40,)),
  )
  _, sampler = make_sampler(changes)
  assert draw(sampler, make_prompt(20), 20).shape == (2, 20)
  with pytest.raises(UserError, match=r'41 tokens.*reach 40.*up to 39'):
    draw(sampler, make_prompt(20), 21)


@pytest.mark.slow
def test_what_a_sampler_holds_does_not_grow():
  _, sampler = make_sampler()
  segment: Any = sampler._segment
  before = segment._cache_size()
  held, drawn = [], 0
  for new_BT in sampler.run(make_prompt(1).astype(np.int32), 5000):
    drawn += new_BT.shape[1]
    if drawn > 500:
      held.append(sum(array.nbytes for array in jax.live_arrays()))
  assert drawn == 5000
  assert max(held[-10:]) <= max(held[:10])
  # At most one program more, for the first refill from SOS alone.
  assert segment._cache_size() <= max(before, 1) + 1


@pytest.mark.slow
def test_a_hundred_thousand_tokens_take_no_more_memory_than_a_thousand():
  _, sampler = make_sampler()
  peak = lambda: resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
  drawn, early = 0, 0.0
  for new_BT in sampler.run(make_prompt(1).astype(np.int32), 100_000):
    drawn += new_BT.shape[1]
    early = peak() if drawn < 1000 else early
  assert drawn == 100_000
  assert peak() - early < 50


def make_how(**how):
  flat = {f'sample.{name}': value for name, value in how.items()}
  return make_config(flat).sample


def frequencies(logits_V, num=4000, **how: Any):
  keys_B = jax.random.split(jax.random.key(0), num)
  logits_BV = jnp.broadcast_to(logits_V, (num, len(logits_V)))
  tokens_B = sample.choose_tokens(logits_BV, keys_B, make_how(**how))
  return np.bincount(np.asarray(tokens_B), minlength=len(logits_V)) / num


def nucleus(logits_V, top_p):
  """As published: sort, and keep from where the mass passes 1 - top_p."""
  ascending = np.sort(logits_V)
  mass = np.cumsum(np.exp(ascending) / np.exp(ascending).sum())
  return logits_V >= ascending[np.argmax(mass >= 1 - top_p)]


@pytest.mark.parametrize('top_p', [0.1, 0.5, 0.77, 0.95, 1.0])
@pytest.mark.parametrize('temperature', [0.5, 2.0])
def test_the_nucleus_is_taken_before_the_temperature(top_p, temperature):
  logits_V = np.random.default_rng(3).normal(size=12) * 2
  kept_V = nucleus(logits_V, top_p)
  weights_V = np.exp(logits_V / temperature) * kept_V
  found_V = frequencies(
    jnp.asarray(logits_V, jnp.float32), top_p=top_p, temperature=temperature
  )
  assert not found_V[~kept_V].any()
  np.testing.assert_allclose(found_V, weights_V / weights_V.sum(), atol=0.03)


def test_the_k_likeliest_are_kept():
  logits_V = jnp.array([0.0, 1.0, 0.5, -1.0, 0.9])
  found_V = frequencies(logits_V, top_k=3)
  assert (found_V > 0).tolist() == [False, True, True, False, True]
  assert (frequencies(logits_V, top_k=99) > 0).all()
  # Of the nucleus {1, 4, 2} and the two likeliest, the smaller counts.
  found_V = frequencies(logits_V, top_k=2, top_p=0.7)
  assert (found_V > 0).tolist() == [False, True, False, False, True]


@pytest.mark.parametrize(
  'how', [{'temperature': 0.0}, {'top_p': 0.0}, {'top_k': 1}, {'top_p': 1e-7}]
)
def test_the_likeliest_alone_is_drawn(how):
  logits_V = jax.random.normal(jax.random.key(5), (5000,))
  found_V = frequencies(logits_V, num=50, **how)
  assert found_V[int(logits_V.argmax())] == 1


def test_what_is_forbidden_is_never_drawn():
  logits_V = jnp.array([-jnp.inf, 0.0, -jnp.inf, -3.0])
  how: dict[str, Any]
  for how in ({}, {'top_k': 3}, {'top_p': 0.999}, {'temperature': 1e-3}):
    found_V = frequencies(logits_V, **how)
    assert not found_V[0] and not found_V[2]


@pytest.mark.parametrize('positions', ['rotary', 'rotary_from_end'])
@pytest.mark.parametrize('length', [7, 60])
def test_what_was_interrupted_goes_on_with_the_same_tokens(positions, length):
  """Wherever it was, before and after the context is full."""
  _, sampler = make_sampler(model_changes(positions))
  prompt_T = np.array(make_prompt(5), np.int32)
  parts = list(sampler.run(prompt_T, length))
  for num in range(len(parts) + 1):
    before_BT = np.concatenate([parts[0][:, :0], *parts[:num]], axis=1)
    after = list(sampler.run(prompt_T, length, before_BT))
    assert len(after) == len(parts) - num
    for got, want in zip(after, parts[num:], strict=True):
      np.testing.assert_array_equal(got, want)
