"""Timings of attention, the train step and sampling, on this machine.

    python tools/benchmark.py [--quick] [--output=FILE.json]

Everything is timed in rounds that take turns, with a large matmul in every
round: shared machines change their speed by the minute, so each time is also
given as a share of the matmul rate of its own round. `make bench` runs it.

Letters: B batch, N queries or latents, M keys or inputs, H heads, K head size.
"""

import argparse
import dataclasses
import functools
import json
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar import config as config_lib
from perceiver_ar import flops, partitioning, sample, train_step
from perceiver_ar.config import Config
from perceiver_ar.data import layouts
from perceiver_ar.ops import attention
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns

Case: TypeAlias = tuple[Callable[[], Any], dict[str, Any]]

_DEFAULT = Path(__file__).parents[1] / 'configs' / 'default.py'
_MATMUL = 2048
# M, N, L, D, H, as in the table of the published model's timings.
_STEPS = (
  (2048, 256, 6, 256, 8),
  (8192, 512, 6, 512, 8),
  (32768, 256, 4, 256, 8),
)
# N, M, H, K: a cross-attend over a long context, and a self-attend.
_ATTENTION = ((256, 32768, 8, 32), (1024, 1024, 8, 64))


def main() -> None:
  parser = argparse.ArgumentParser(
    description='Times what training is made of.'
  )
  parser.add_argument('--quick', action='store_true', help='small sizes only')
  parser.add_argument('--rounds', type=int, default=7, help='of all timings')
  parser.add_argument('--output', type=Path, help='write the JSON here')
  args = parser.parse_args()
  groups = [
    *(attention_cases(*size) for size in _ATTENTION[args.quick :]),
    *(step_case(*size) for size in _STEPS[: 1 if args.quick else None]),
    sampling_cases(),
  ]
  rows = [row for group in groups for row in compare(group, args.rounds)]
  if args.output:
    args.output.write_text(json.dumps(rows, indent=2) + '\n')


def compare(cases: dict[str, Case], rounds: int) -> list[dict[str, Any]]:
  """Times cases in turn; medians, extremes, shares of the matmul rate."""
  product = functools.partial(jax.jit(jnp.dot), *[jnp.ones((_MATMUL,) * 2)] * 2)
  functions: dict[str, Any] = {'matmul': product}
  functions |= {name: function for name, (function, _) in cases.items()}
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for round_ in range(rounds + 1):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      if round_:  # the first one warms up
        seconds[name].append(time.perf_counter() - start)
  rates = [2 * _MATMUL**3 / s for s in seconds['matmul']]
  rows = []
  for name, (_, about) in cases.items():
    times = seconds[name]
    row = {'name': name, 'seconds': statistics.median(times)}
    row |= {'fastest': min(times), 'slowest': max(times)} | about
    if work := about.get('flops'):
      shares = [work / s / r for s, r in zip(times, rates, strict=True)]
      row['matmul_share'] = statistics.median(shares)
      row['matmul_gflops'] = statistics.median(rates) / 1e9
    if tokens := about.get('tokens'):
      row['tokens_per_second'] = tokens / row['seconds']
    show(row)
    rows.append(row)
  return rows


def show(row: dict[str, Any]) -> None:
  formats = {
    'seconds': '{:8.4f} s',
    'fastest': '({:.4f}',
    'slowest': 'to {:.4f})',
    'matmul_share': '{:.0%} of the matmul rate,',
    'matmul_gflops': '{:.0f} GFLOP/s;',
    'temporaries_mib': '{:,.0f} MiB,',
    'compile_seconds': 'compiled in {:.1f} s',
    'tokens_per_second': '{:,.1f} tokens/s',
  }
  parts = [f.format(row[key]) for key, f in formats.items() if key in row]
  print(f'{row["name"]:<42}', *parts, flush=True)


def compiled(jitted: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
  """A program for these arguments, its memory and how long it took to make."""
  start = time.perf_counter()
  program = jitted.lower(*args).compile()
  return program, {
    'compile_seconds': time.perf_counter() - start,
    'temporaries_mib': program.memory_analysis().temp_size_in_bytes / 2**20,
  }


def attention_cases(N: int, M: int, H: int, K: int) -> dict[str, Case]:
  """Chunked against reference, forward and forward + backward."""
  normal = lambda i, T: jax.random.normal(jax.random.key(i), (1, T, H * K))
  qkv = [normal(i, T) for i, T in enumerate((N, M, M))]
  mask = Mask(offset=M - N, start_B=jnp.zeros((1,), jnp.int32))
  cases = {}
  for kind in ('forward', 'both ways'):
    for implementation in ('chunked', 'reference'):
      kernel = attention.Kernel(implementation, 512, K, interpret=False)
      attend = functools.partial(
        attention.attend, mask=mask, turns=Turns(), kernel=kernel
      )
      function, factor = attend, 1
      if kind == 'both ways':
        loss = lambda *x, attend=attend: jnp.square(attend(*x)).sum()
        function, factor = jax.grad(loss, (0, 1, 2)), 3
      program, about = compiled(jax.jit(function), *qkv)
      about['flops'] = factor * 4 * N * M * H * K
      name = f'{implementation} {kind} N={N} M={M} H={H} K={K}'
      cases[name] = functools.partial(program, *qkv), about
  return cases


def make_config(M: int, N: int, L: int, D: int, H: int) -> Config:
  raw = runpy.run_path(str(_DEFAULT))['get_config']()
  raw.model.context_length, raw.model.num_latents = M, N
  raw.model.num_layers, raw.model.width = L, D
  raw.model.num_cross_heads = raw.model.num_self_heads = H
  raw.model.dropout_rate = 0.0
  raw.train.batch_size = raw.sample.num_samples = 1
  return config_lib.resolve(raw)


def step_case(M: int, N: int, L: int, D: int, H: int) -> dict[str, Case]:
  """The whole train step, optimizer included, batch 1."""
  config = make_config(M, N, L, D, H)
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  tokens = np.random.default_rng(0).integers(3, 259, (1, M + 1), np.int32)
  positions = np.arange(1, M + 1, dtype=np.int32)[None, :, None]
  batch = {'tokens': tokens, 'positions': positions}
  batch = partitioning.global_batch(batch, mesh, config.train.batch_size)
  states = [train_step.init_state(config, mesh)]
  program, about = compiled(
    train_step.make_train_step(config, mesh), states[0], batch
  )
  about['flops'] = flops.train_flops(config.model)

  def step() -> Any:
    states[0], sums = program(states[0], batch)
    return sums

  return {f'train step M={M} N={N} L={L} D={D}': (step, about)}


def sampling_cases() -> dict[str, Case]:
  """The cache against a full forward pass for every token, M of context.

  The latter for absolute positions from the end, which move with every token.
  """
  config = make_config(*_STEPS[0])
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  params = train_step.init_state(config, mesh).params
  prompt = np.random.default_rng(0).integers(3, 259, 2048, np.int32)
  moving = dataclasses.replace(
    config.model, position_encoding='sinusoidal', position_source='from_end'
  )
  cases = {}
  for name, model, num in (
    ('sampling, cached', config.model, 256),
    ('sampling, full recomputation', moving, 64),
  ):
    run = dataclasses.replace(config, model=model)
    sampler = sample.Sampler(
      run, params, mesh, layout=layouts.INDEX, forbidden=(0, 2)
    )
    draw = functools.partial(sampler.run, prompt, num)
    cases[name] = lambda draw=draw: list(draw()), {'tokens': num}
  return cases


if __name__ == '__main__':
  main()
