"""Costs from the config are those that XLA counts in the program."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from tiny import make_model

from perceiver_ar import flops
from perceiver_ar.models.perceiver_ar import PerceiverAR

# Large enough for matmuls to dominate, and no two sizes alike.
_WIDE = make_model(
  vocab_size=300,
  context_length=1024,
  num_latents=384,
  num_layers=3,
  width=256,
  embed_width=320,
  num_cross_heads=4,
  num_self_heads=4,
  cross_mlp_width=640,
  mlp_width=1152,
  scan_unroll=3,  # XLA counts the body of a loop once
  attention='reference',
  token_table='never',
)


def counted(model, of_gradient):
  """FLOPs that XLA finds in a forward pass, or in that and a backward one."""
  M, N = model.context_length, model.num_latents
  tokens_BM = jax.ShapeDtypeStruct((1, M), jnp.int32)
  positions_BMP = jax.ShapeDtypeStruct((1, M, 1), jnp.int32)
  module = PerceiverAR(model)
  params = jax.eval_shape(
    lambda *x: module.init(*x, num_latents=N)['params'],
    jax.random.key(0),
    tokens_BM,
    positions_BMP,
  )

  def forward(params, tokens_BM, positions_BMP):
    logits_BNV: Any = module.apply(
      {'params': params}, tokens_BM, positions_BMP, num_latents=N
    )
    return jnp.square(logits_BNV).sum() if of_gradient else logits_BNV

  function = jax.grad(forward) if of_gradient else forward
  compiled = jax.jit(function).lower(params, tokens_BM, positions_BMP).compile()
  analysis: Any = compiled.cost_analysis()
  return analysis['flops']


@pytest.mark.parametrize(
  'changes',
  [{}, {'num_latents': 1024, 'num_layers': 1, 'scan_unroll': 1}],
)
def test_a_forward_pass_costs_what_xla_counts(changes):
  model = dataclasses.replace(_WIDE, **changes)
  expected = flops.forward_flops(
    model, context_length=model.context_length, num_latents=model.num_latents
  )
  assert counted(model, of_gradient=False) == pytest.approx(expected, rel=0.03)


def test_a_training_step_costs_what_xla_counts():
  expected = flops.train_flops(_WIDE)
  assert counted(_WIDE, of_gradient=True) == pytest.approx(expected, rel=0.1)


def test_a_drawn_token_attends_to_whole_caches():
  M, L, D, E = 1024, 3, 256, 320
  step = functools.partial(flops.decode_flops, _WIDE, num_new=1)
  costs = [
    step(context_length=M + more, num_latents=384 + rows)
    for more, rows in ((0, 0), (1, 0), (0, 1))
  ]
  # Scores and weighted sums of a row more.
  assert costs[1] - costs[0] == 4 * E
  assert costs[2] - costs[0] == L * 4 * D


def test_latents_made_anew_are_a_forward_pass_without_its_inputs():
  M, N, D, V = 1024, 384, 256, 300
  refill = flops.decode_flops(_WIDE, context_length=M, num_latents=N, num_new=N)
  whole = flops.forward_flops(_WIDE, context_length=M, num_latents=N)
  inputs = flops.projection_flops(_WIDE, M - 1)
  assert whole - refill == inputs + 2 * (N - 1) * D * V


def test_inputs_that_are_not_kept_cost_nothing():
  kept = dataclasses.replace(_WIDE, num_kept_inputs=512)
  short = dataclasses.replace(_WIDE, context_length=512)
  assert flops.train_flops(kept) == flops.train_flops(short)


def test_the_matmul_rate_is_a_plausible_one():
  rate = flops.matmul_rate('float32', 256)
  assert 1e8 < rate < 1e16
