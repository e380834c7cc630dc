"""Timings of attention, the train step and sampling, on this machine.

    python tools/benchmark.py [--quick] [--output=FILE.json]

Everything is timed in rounds that take turns, with a large matmul in every
round: shared machines change their speed by the minute, so each time is also
given as a share of the matmul rate of its own round. `make bench` runs it.

Letters: B batch, N queries or latents, M keys or inputs, H heads, K head size.
"""

import argparse
import json
import runpy
import statistics
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from perceiver_ar import config as config_lib
from perceiver_ar import flops, partitioning, sample, train_step
from perceiver_ar.config import Config
from perceiver_ar.data import layouts
from perceiver_ar.ops import attention
from perceiver_ar.ops.masks import Mask

_CONFIGS = Path(__file__).parents[1] / 'configs'
_MATMUL = 2048
# M, N, L, D, H, as in the table of the published model's timings.
_STEPS = (
  (2048, 256, 6, 256, 8),
  (8192, 512, 6, 512, 8),
  (32768, 256, 4, 256, 8),
)
# N, M, H, K: a cross-attend over a long context, and a self-attend.
_ATTENTION = ((256, 32768, 8, 32), (1024, 1024, 8, 64))
_NUM_SAMPLED = 256


def main() -> None:
  parser = argparse.ArgumentParser(description=__doc__.split('\n')[0])
  parser.add_argument('--quick', action='store_true', help='small sizes only')
  parser.add_argument('--rounds', type=int, default=7, help='of all timings')
  parser.add_argument('--output', type=Path, help='write the JSON here')
  args = parser.parse_args()
  device = jax.devices()[0]
  print(f'{jax.device_count()} x {device.device_kind}, float32, one device')
  rows = []
  for size in _ATTENTION[1:] if args.quick else _ATTENTION:
    rows += show(compare(*attention_cases(*size), rounds=args.rounds))
  for size in _STEPS[:1] if args.quick else _STEPS:
    case, about = step_case(*size)
    name = f'train step M={size[0]} N={size[1]} L={size[2]} D={size[3]}'
    rows += show(compare({name: case}, {name: about}, rounds=args.rounds))
  rows += show(compare(*sampling_cases(), rounds=min(args.rounds, 3)))
  if args.output:
    args.output.write_text(json.dumps(rows, indent=2) + '\n')


def compare(
  cases: Mapping[str, Callable[[], Any]],
  about: Mapping[str, dict[str, Any]],
  *,
  rounds: int,
) -> list[dict[str, Any]]:
  """Times the cases in turn; medians, spreads, shares of the matmul rate."""
  x = jnp.ones((_MATMUL, _MATMUL))
  product = jax.jit(lambda a: a @ a)
  functions = {'matmul': lambda: product(x), **cases}
  seconds: dict[str, list[float]] = {name: [] for name in functions}
  for round_ in range(rounds + 1):
    for name, function in functions.items():
      start = time.perf_counter()
      jax.block_until_ready(function())
      if round_:  # the first one warms up
        seconds[name].append(time.perf_counter() - start)
  rates = [2 * _MATMUL**3 / s for s in seconds.pop('matmul')]
  rows = []
  for name, times in seconds.items():
    row = {'name': name, 'seconds': statistics.median(times)}
    row |= {'fastest': min(times), 'slowest': max(times)} | about[name]
    if work := row.get('flops'):
      shares = [work / s / r for s, r in zip(times, rates, strict=True)]
      row['matmul_share'] = statistics.median(shares)
    if tokens := row.get('tokens'):
      row['tokens_per_second'] = tokens / row['seconds']
    rows.append(row | {'gflops_matmul': statistics.median(rates) / 1e9})
  return rows


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
  for row in rows:
    parts = [f'{row["name"]:<46} {row["seconds"] * 1e3:9.1f} ms']
    parts += [f'{row["fastest"] * 1e3:.1f}-{row["slowest"] * 1e3:.1f}']
    if 'matmul_share' in row:
      parts += [f'{row["matmul_share"]:.0%} of {row["gflops_matmul"]:.0f} GF/s']
    if 'temporaries_mib' in row:
      parts += [f'{row["temporaries_mib"]:,.0f} MiB']
    if 'compile_seconds' in row:
      parts += [f'compiled in {row["compile_seconds"]:.1f} s']
    if 'tokens_per_second' in row:
      parts += [f'{row["tokens_per_second"]:,.0f} tokens/s']
    print('  '.join(parts), flush=True)
  return rows


def compiled(function: Any, *args: Any) -> tuple[Any, dict[str, Any]]:
  """A program for these arguments, its memory and how long it took to make."""
  start = time.perf_counter()
  program = jax.jit(function).lower(*args).compile()
  memory = program.memory_analysis()
  return program, {
    'compile_seconds': time.perf_counter() - start,
    'temporaries_mib': memory.temp_size_in_bytes / 2**20,
  }


def attention_cases(N: int, M: int, H: int, K: int) -> tuple[Any, Any]:
  """Chunked against reference, forward and forward + backward."""
  keys = jax.random.split(jax.random.key(0), 3)
  shapes = ((1, N, H, K), (1, M, H, K), (1, M, H, K))
  qkv = [
    jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)
  ]
  mask = Mask(offset=M - N, start_B=jnp.zeros((1,), jnp.int32))
  cases, about = {}, {}
  for implementation in ('chunked', 'reference'):

    def forward(q: Any, k: Any, v: Any, how: str = implementation) -> Any:
      return attention.attend(q, k, v, mask, implementation=how, block=512)

    def both(q: Any, k: Any, v: Any, run: Any = forward) -> Any:
      return jax.grad(lambda *x: jnp.square(run(*x)).sum(), (0, 1, 2))(q, k, v)

    for kind, function, factor in (
      ('forward', forward, 1),
      ('forward+backward', both, 3),
    ):
      name = f'{implementation} {kind} N={N} M={M} H={H} K={K}'
      program, about[name] = compiled(function, *qkv)
      about[name]['flops'] = factor * 4 * N * M * H * K
      cases[name] = lambda program=program: program(*qkv)
  return cases, about


def make_config(M: int, N: int, L: int, D: int, H: int) -> Config:
  raw = runpy.run_path(str(_CONFIGS / 'default.py'))['get_config']()
  raw.model.context_length, raw.model.num_latents = M, N
  raw.model.num_layers, raw.model.width = L, D
  raw.model.num_cross_heads = raw.model.num_self_heads = H
  raw.model.dropout_rate = 0.0
  raw.train.batch_size = raw.sample.num_samples = 1
  return config_lib.resolve(raw)


def step_case(*size: int) -> tuple[Callable[[], Any], dict[str, Any]]:
  """The whole train step, optimizer included, batch 1."""
  config, M = make_config(*size), size[0]
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  state = train_step.init_state(config, mesh)
  batch = partitioning.global_batch(
    {
      'tokens': np.random.default_rng(0).integers(3, 259, (1, M + 1), np.int32),
      'positions': np.arange(1, M + 1, dtype=np.int32)[None, :, None],
    },
    mesh,
  )
  start = time.perf_counter()
  program = train_step.make_train_step(config, mesh).lower(state, batch)  # pyright: ignore[reportFunctionMemberAccess]
  program = program.compile()
  about = {
    'compile_seconds': time.perf_counter() - start,
    'temporaries_mib': program.memory_analysis().temp_size_in_bytes / 2**20,
    'flops': flops.train_flops(config.model),
  }
  states = [state]

  def step() -> Any:
    states[0], sums = program(states[0], batch)
    return states[0], sums

  return step, about


def sampling_cases() -> tuple[Any, Any]:
  """The cache against a full forward pass for every token, 2,048 of context."""
  config = make_config(*_STEPS[0])
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  params = train_step.init_state(config, mesh).params
  prompt = np.random.default_rng(0).integers(3, 259, 2048, np.int32)
  cases, about = {}, {}
  for name, source, num in (
    ('sampling, cached', 'data', _NUM_SAMPLED),
    # Positions from the end move with every token, so nothing can be kept.
    ('sampling, full recomputation', 'uncached', 64),
  ):
    sampler = sample.Sampler(
      config, params, mesh, layout=layouts.INDEX, forbidden=(0, 2)
    )
    about[name] = {'tokens': num}
    draw = sampler.run if source == 'data' else sampler._run_uncached

    def run(draw: Any = draw, num: int = num, sampler: Any = sampler) -> Any:
      sampler._check_length(len(prompt) + num)
      return [jnp.asarray(new) for new in draw(prompt, num)]

    cases[name] = run
  return cases, about


if __name__ == '__main__':
  main()
