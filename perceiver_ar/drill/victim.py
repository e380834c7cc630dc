"""A process of a drill: the command line, with faults put into it.

The trainer knows nothing of faults: parts of it are replaced here before it
begins.

  python -m perceiver_ar.drill.victim '{"kill_at": 7}' train --config=...
"""

import contextlib
import dataclasses
import errno
import gc
import itertools
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Generator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import orbax.checkpoint as ocp
from jax._src import cache_key

from perceiver_ar import (
  checkpoint,
  distributed,
  evaluate,
  flops,
  gradients,
  main,
  prefetch,
  saved_step,
  starting,
  train_step,
)
from perceiver_ar.data import pipeline


def run(faults: dict[str, Any], words: Sequence[str]) -> None:
  # What one process has compiled is for all: on CPUs JAX has keys of its
  # cache that differ by process, and only the first one writes to it.
  cache_key._hash_accelerator_config = cache_key._hash_devices
  # A host that is dead is noticed as ever, and sooner.
  distributed._HEARTBEAT_SECONDS = 20
  # A quarter of a start, of which drills make a hundred: a speed that nobody
  # asks for, and collecting the garbage of a short life.
  flops.matmul_rate = lambda dtype, size: 1e9
  gc.disable()
  for name, value in faults.items():
    _FAULTS[name](value)
  main.main(words)


def _die(*_: Any, **__: Any) -> None:
  os.kill(os.getpid(), signal.SIGKILL)


def _before_steps(act: Callable[[int], None]) -> None:
  """Calls `act` with every step, when its batch is asked for."""
  original = prefetch.placed_batches

  def placed(
    config: Any, documents: Any, mesh: Any, first_step: int
  ) -> Generator[prefetch.Placed]:
    batches = original(config, documents, mesh, first_step)
    with contextlib.closing(batches):
      for step, batch in enumerate(batches, first_step):
        act(step)
        yield batch

  prefetch.placed_batches = placed


def _kill_at(step: int) -> None:
  """When what was saved before is saved: how long that takes is no matter."""
  opened: list[checkpoint.Checkpoints] = []
  enter = checkpoint.Checkpoints.__enter__

  def remember(self: checkpoint.Checkpoints) -> checkpoint.Checkpoints:
    opened.append(self)
    return enter(self)

  def act(now: int) -> None:
    if now == step:
      opened[0].wait()
      _die()

  checkpoint.Checkpoints.__enter__ = remember
  _before_steps(act)


def _hang_at(step: int) -> None:
  _before_steps(lambda now: time.sleep(1e6) if now == step else None)


def _pace(seconds: float) -> None:
  """For what is done to a run from outside, while it goes on."""
  _before_steps(lambda now: time.sleep(seconds))


def _starve(seconds: float) -> None:
  """Its storage takes so long for every batch."""
  original = pipeline.train_batches

  def loaded(*args: Any, **kwargs: Any) -> Generator[dict[str, Any]]:
    batches = original(*args, **kwargs)
    with contextlib.closing(batches):
      for batch in batches:
        time.sleep(seconds)
        yield batch

  pipeline.train_batches = loaded


def _sigterm_in_evaluation(number: int) -> None:
  """When that batch of an evaluation is made, from 0."""
  make, batches = evaluate.Evaluator._batch, itertools.count()

  def batch(self: evaluate.Evaluator, blocks: Any) -> Any:
    if next(batches) == number:
      os.kill(os.getpid(), signal.SIGTERM)
    return make(self, blocks)

  evaluate.Evaluator._batch = batch


def _flip_at(step: int) -> None:
  """A bit of this process's copies of a parameter is lost in that step."""
  compile_step = starting.compile_step

  def compiled(*args: Any) -> Any:
    run = compile_step(*args)

    def flipping(state: Any, batch: Any) -> Any:
      now = int(state.step)
      state, sums = run(state, batch)
      if now == step:
        leaves, tree = jax.tree.flatten(state.params)
        params = jax.tree.unflatten(tree, [_flipped(leaves[0]), *leaves[1:]])
        state = dataclasses.replace(state, params=params)
      return state, sums

    return flipping

  starting.compile_step = compiled


def _flipped(array: jax.Array) -> jax.Array:
  shards = []
  for shard in array.addressable_shards:
    content = np.array(shard.data)
    content.reshape(-1).view(np.uint8)[0] ^= 1
    shards.append(jax.device_put(content, shard.device))
  return jax.make_array_from_single_device_arrays(
    array.shape, array.sharding, shards
  )


def _kill_in_save(number: int) -> None:
  """When its arrays are being written, and it is not a checkpoint yet."""
  _in_save(number, _die)


def _fail_in_save(number: int) -> None:
  """The storage of this process alone fails, in the background."""

  def fail() -> None:
    raise OSError(errno.EIO, os.strerror(errno.EIO), 'a file')

  _in_save(number, fail)


def _in_save(number: int, act: Callable[[], None]) -> None:
  original, saves = ocp.JsonCheckpointHandler.async_save, itertools.count(1)

  class Written:
    def result(self, timeout: float | None = None) -> None:
      act()

  async def save(*args: Any, **kwargs: Any) -> Any:
    if next(saves) == number:
      return [Written()]
    return await original(*args, **kwargs)

  ocp.JsonCheckpointHandler.async_save = save


def _kill_in_restore(_: bool) -> None:
  """When the arrays are read, and nobody knows yet whether they are sound."""
  saved_step.checksums = _die


def _nan_at(steps: Sequence[int]) -> None:
  """The gradients of these steps are not numbers."""
  accumulate = gradients.accumulate

  def poisoned(*args: Any) -> Any:
    grads, sums = accumulate(*args)
    return jax.tree.map(lambda g: g * jnp.nan, grads), sums

  def other(make: Any, state: Any, batch: Any) -> Any:
    gradients.accumulate = poisoned
    try:
      return make().lower(state, batch).compile()
    finally:
      gradients.accumulate = accumulate

  _replace_steps(steps, other)


def _without(steps: Sequence[int]) -> None:
  """These steps are counted and do nothing: what skipping must amount to."""

  def other(make: Any, state: Any, batch: Any) -> Any:
    shapes = jax.eval_shape(make(), state, batch)[1]

    @jax.jit
    def nothing(state: train_step.TrainState, batch: Any) -> Any:
      state = dataclasses.replace(
        state,
        step=state.step + 1,
        num_skipped=state.num_skipped + 1,
        num_skipped_in_a_row=state.num_skipped_in_a_row + 1,
      )
      return state, jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)

    return nothing

  _replace_steps(steps, other)


def _replace_steps(
  steps: Sequence[int], other: Callable[[Any, Any, Any], Any]
) -> None:
  """All others are run by the very program that an undisturbed run has."""
  make = train_step.make_train_step

  class Step:
    def __init__(self, config: Any, mesh: Any):
      self._make = lambda: make(config, mesh)

    def lower(self, state: Any, batch: Any) -> 'Step':
      self._sound = self._make().lower(state, batch).compile()
      self._other = other(self._make, state, batch)
      return self

    def compile(self) -> Any:
      return lambda state, batch: (
        self._other if int(state.step) in steps else self._sound
      )(state, batch)

  train_step.make_train_step = Step


_FAULTS: dict[str, Callable[[Any], None]] = {
  'fail_in_save': _fail_in_save,
  'flip_at': _flip_at,
  'hang_at': _hang_at,
  'kill_at': _kill_at,
  'kill_in_restore': _kill_in_restore,
  'kill_in_save': _kill_in_save,
  'nan_at': _nan_at,
  'pace': _pace,
  'sigterm_in_evaluation': _sigterm_in_evaluation,
  'starve': _starve,
  'without': _without,
}


if __name__ == '__main__':
  run(json.loads(sys.argv[1]), sys.argv[2:])
