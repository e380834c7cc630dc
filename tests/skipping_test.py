"""What is usual, what is a spike, and what is said of it."""

import logging

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from perceiver_ar import skipping
from perceiver_ar.skipping import UsualLoss


def _losses(num, seed=0):
  """Falling, noisy."""
  noise_S = np.random.default_rng(seed).normal(size=num)
  return 3 + 3 * np.exp(-np.arange(num) / 80) + 0.1 * noise_S


def _after(losses):
  add = jax.jit(lambda usual, loss: usual.including(loss))
  usual = UsualLoss.empty()
  for loss in losses:
    usual = add(usual, jnp.float32(loss))
  return usual


@pytest.mark.parametrize('num', [1, 2, 37, 100])
def test_the_first_losses_count_alike(num):
  losses = _losses(num)
  usual = _after(losses)
  assert usual.num_steps == num
  np.testing.assert_allclose(usual.mean, losses.mean(), rtol=1e-5)
  np.testing.assert_allclose(usual.variance, losses.var(), rtol=1e-3, atol=1e-6)


def test_later_ones_count_more_than_those_before():
  losses = _losses(400)
  # The first hundred alike, then each takes a hundredth from those before.
  weights_S = np.full(400, 0.01)
  weights_S[100:] *= 0.99 ** np.arange(300)[::-1]
  weights_S[:100] *= 0.99**300
  np.testing.assert_allclose(weights_S.sum(), 1)
  mean = (weights_S * losses).sum()
  usual = _after(losses)
  np.testing.assert_allclose(usual.mean, mean, rtol=1e-5)
  np.testing.assert_allclose(
    usual.variance, (weights_S * (losses - mean) ** 2).sum(), rtol=1e-4
  )


def test_only_what_is_far_above_is_a_spike():
  usual = _after(_losses(200))
  mean, deviation = float(usual.mean), float(usual.variance) ** 0.5
  found = [
    bool(usual.is_exceeded(jnp.float32(mean + n * deviation), 4.0))
    for n in (-9.0, 0.0, 3.9, 4.1)
  ]
  assert found == [False, False, False, True]
  assert not usual.is_exceeded(jnp.float32(np.inf), 0.0)


def test_nothing_is_judged_before_much_is_known():
  num = skipping.USUAL_STEPS
  losses = _losses(num)
  spike = jnp.float32(1e3)
  assert not _after(losses[:-1]).is_exceeded(spike, 4.0)
  assert _after(losses).is_exceeded(spike, 4.0)


def _row(loss):
  return {'loss': loss, 'grad_norm': 2.5, 'data_digest': 'abc'}


def test_warnings_say_all_and_become_rare(caplog):
  skips = skipping.Skips()
  with caplog.at_level(logging.WARNING):
    for step in range(100):
      skips.add(step, _row(7.0), skipping.SPIKE if step % 2 else '')
  told = [record.getMessage() for record in caplog.records]
  assert told[0] == (
    'step 1 is skipped (spike): loss 7, gradient norm 2.5, batch abc; '
    'skipped since the start: 1'
  )
  counts = [int(line.rpartition(' ')[2]) for line in told]
  assert counts == [1, 2, 3, 4, 8, 16, 32]


def test_the_end_names_causes_and_a_remedy():
  skips = skipping.Skips()
  for step, why in enumerate(['spike', '', 'nonfinite', 'spike', 'spike']):
    skips.add(step, _row(np.nan), why)
  assert skips.story(3) == (
    '3 steps in a row were skipped, 1 whose loss or gradient was not finite '
    'and 2 whose loss was a spike'
  )
  assert 'raise train.spike_deviations' in skips.remedy()
  skips.add(5, _row(np.nan), 'nonfinite')
  assert 'spike' not in skips.remedy()
