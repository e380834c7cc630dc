"""Training from the first step, or from wherever the run was left, to the end.

The order within a step makes a run that was interrupted anywhere, and goes on,
the same run bit for bit: a step's metrics are on disk before the checkpoint
that contains it, and an evaluation before the checkpoint of the state that it
saw.
"""

import contextlib
import dataclasses
import signal
import time
from collections.abc import Iterator, Mapping
from typing import Any

import jax
import numpy as np
from etils import epath
from jax.sharding import Mesh

from perceiver_ar import (
  checkpoint,
  flops,
  mesh_checks,
  metrics,
  partitioning,
  sharded_attention,
  workdir,
)
from perceiver_ar import train_step as train_step_lib
from perceiver_ar.config import Config
from perceiver_ar.data import pipeline
from perceiver_ar.errors import UserError
from perceiver_ar.evaluate import Evaluator
from perceiver_ar.plan import plans
from perceiver_ar.progress import Progress
from perceiver_ar.train_step import TrainState


class Stop:
  """Becomes true on Ctrl-C or SIGTERM, so that the loop can end its step."""

  def __init__(self) -> None:
    self.signal: int | None = None

  @contextlib.contextmanager
  def on_signals(self) -> Iterator[None]:
    handled = (signal.SIGINT, signal.SIGTERM)
    before = [signal.signal(number, self._note) for number in handled]
    try:
      yield
    finally:
      for number, handler in zip(handled, before, strict=True):
        signal.signal(number, handler)

  def _note(self, number: int, frame: Any) -> None:
    if self.signal is not None:  # asked twice: no more patience
      raise KeyboardInterrupt
    self.signal = number


def train_and_evaluate(config: Config, folder: epath.PathLike) -> int:
  """Trains to `train.num_steps` and returns the exit status.

  Run again, it goes on from the newest sound checkpoint.

  Returns:
    0 at the end; 128 + the signal's number if it was interrupted and saved.

  Raises:
    UserError: the config, the data, the mesh or the workdir do not fit, or
      too many steps in a row were not finite.
  """
  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  mesh_checks.check_train(config, mesh)
  documents = pipeline.open_documents(
    config.data, 'train', seed=config.train.seed
  )
  pipeline.check_compatible(config.model, documents)
  evaluator = _evaluator(config, mesh)
  abstract = train_step_lib.abstract_state(config, mesh)
  workdir.check(folder, config, documents)
  with checkpoint.Checkpoints(folder, config.checkpoint) as checkpoints:
    restored = checkpoints.restore_newest(abstract)
    first_step = restored[0] if restored else 0
    if restored:
      saved = checkpoint.load_config(folder, first_step)
      workdir.check_config(folder, saved, config)
    _announce(config, mesh, abstract, documents, first_step)
    if first_step >= config.train.num_steps:
      return 0
    workdir.begin(folder, config, documents)
    state = restored[1] if restored else _first_state(config, mesh, documents)
    loop = _Loop(config, mesh, checkpoints, evaluator)
    batches = pipeline.train_batches(
      config,
      documents,
      first_step=first_step,
      process_index=jax.process_index(),
      process_count=jax.process_count(),
    )
    with (
      metrics.Writer(
        folder, first_step=first_step, process_index=jax.process_index()
      ) as writer,
      contextlib.closing(batches),
    ):
      return loop.run(state, batches, first_step, writer)


def _first_state(
  config: Config, mesh: Mesh, documents: pipeline.DocumentSource
) -> TrainState:
  """Step 0: drawn from the seed, or with the parameters of another run."""
  state = train_step_lib.init_state(config, mesh)
  source = config.checkpoint.init_from
  if not source:
    return state
  workdir.check_vocabulary(source, documents)
  abstract = train_step_lib.abstract_params(config, mesh)
  step, params = checkpoint.restore_params(source, abstract, None)
  print(f'begins with the parameters of {source} at step {step:,}')
  return dataclasses.replace(state, params=params)


def _evaluator(config: Config, mesh: Mesh) -> Evaluator | None:
  if not config.evaluate.every:
    return None
  documents = pipeline.open_documents(
    config.data, config.evaluate.split, seed=config.train.seed
  )
  pipeline.check_compatible(config.model, documents)
  return Evaluator(config, documents, mesh)


class _Loop:
  """The loop; it dispatches step n, then reads the metrics of step n - 1."""

  def __init__(
    self,
    config: Config,
    mesh: Mesh,
    checkpoints: checkpoint.Checkpoints,
    evaluator: Evaluator | None,
  ):
    self._config = config
    self._mesh = mesh
    self._checkpoints = checkpoints
    self._evaluator = evaluator
    self._stop = Stop()
    self._rows: list[dict[str, Any]] = []
    self._pending: tuple[int, int, Any] | None = None

  def run(
    self,
    state: TrainState,
    batches: Iterator[Mapping[str, np.ndarray]],
    first_step: int,
    writer: metrics.Writer,
  ) -> int:
    num_steps = self._config.train.num_steps
    self._writer, self._clock = writer, time.monotonic()
    with (
      Progress(
        'train',
        num_steps,
        'steps',
        first_step,
        visible=jax.process_index() == 0,
      ) as self._progress,
      self._stop.on_signals(),
    ):
      for step in range(first_step, num_steps):
        batch = next(batches)
        placed = partitioning.global_batch(batch, self._mesh)
        if step == first_step:
          train_step = self._make_step(placed)
        state, sums = train_step(state, placed)
        self._record()
        self._pending = step, _digest(batch), sums
        if self._after(step + 1, state):
          break
    return self._end(step + 1)

  def _make_step(self, batch: dict[str, Any]) -> Any:
    is_tpu = self._mesh.devices.flat[0].platform == 'tpu'
    if is_tpu and self._config.train.check_memory:
      return plans.fitting_step(self._config, self._mesh, batch)
    return train_step_lib.make_train_step(self._config, self._mesh)

  def _after(self, step: int, state: TrainState) -> bool:
    """Evaluates and saves if it is time; True if the run must end here."""
    config = self._config
    is_last = step == config.train.num_steps or self._stop.signal is not None
    is_save = step % config.checkpoint.save_every == 0 or is_last
    every = config.evaluate.every
    is_evaluation = self._evaluator is not None and (
      step % every == 0 or step == config.train.num_steps
    )
    if not (is_save or is_evaluation):
      return False
    self._record()
    loss = None
    if is_evaluation and self._evaluator is not None:
      report = self._evaluator.run(state.params, visible=False)
      self._writer.write(step, _scalars(report))
      loss = report['nats_per_token']
    # A signal may have come during the evaluation.
    is_last = is_last or self._stop.signal is not None
    if is_save or is_last:
      self._checkpoints.save(step, state, config=config, loss=loss)
    self._clock = time.monotonic()
    return is_last

  def _record(self) -> None:
    """Writes the pending step's metrics; waits until the device has them."""
    if self._pending is None:
      return
    step, digest, sums = self._pending
    self._pending = None
    values = {name: float(value) for name, value in sums.items()}
    now = time.monotonic()
    targets = max(values['num_targets'], 1.0)
    row = {
      'loss': values['loss'] / targets,
      'num_targets': int(values['num_targets']),
      'z_loss': values['z_loss'] / targets,
      'accuracy': values['correct'] / targets,
      'grad_norm': values['grad_norm'],
      'learning_rate': values['learning_rate'],
      'skipped': int(values['skipped']),
      'data_digest': pipeline.format_digest(digest),
      'seconds': round(now - self._clock, 6),
    }
    self._clock = now
    self._writer.write(step, row)
    self._rows = [*self._rows, row][-self._config.train.log_every :]
    self._show(step)
    self._check_finite(step, int(values['num_skipped_in_a_row']))

  def _show(self, step: int) -> None:
    note = ''
    if (step + 1) % self._config.train.log_every == 0:
      note = f'loss {metrics.summarise(self._rows)["loss"]:.4f}'
    self._progress.advance(1, note)

  def _check_finite(self, step: int, in_a_row: int) -> None:
    if in_a_row < self._config.train.max_nonfinite_steps:
      return
    self._checkpoints.wait()
    good = self._checkpoints.latest()
    where = 'there is no checkpoint yet'
    if good is not None:
      where = f'the last good checkpoint is step {good}'
    raise UserError(
      f'the loss or its gradient was not finite in {in_a_row} steps in a row, '
      f'the last of them step {step}; {where}; train with a lower '
      'optimizer.learning_rate in another --workdir, or look at the batches '
      'whose digests metrics.jsonl has for these steps'
    )

  def _end(self, step: int) -> int:
    self._checkpoints.wait()
    if self._stop.signal is not None and step < self._config.train.num_steps:
      name = signal.Signals(self._stop.signal).name
      print(f'{name}: step {step} is saved; run again to go on')
      return 128 + self._stop.signal
    rows = [row for row in self._rows if row['seconds']]
    speed = metrics.summarise(rows)['seconds_per_step']
    rate = flops.matmul_rate(self._config.model.dtype, 2048)
    used = flops.train_flops(self._config.model) * self._config.train.batch_size
    share = used / speed / rate / self._mesh.size
    print(
      f'trained to step {step}; the last steps took {speed:.3g} s each, '
      f'{share:.0%} of the matmul rate ({rate / 1e9:,.0f} GFLOP/s a device)'
    )
    return 0


def _digest(batch: Mapping[str, np.ndarray]) -> int:
  """Of this host's rows; the hosts' digests add up to the batch's."""
  rows = len(batch['tokens'])
  return pipeline.digest(dict(batch), first_row=jax.process_index() * rows)


def _scalars(report: Mapping[str, Any]) -> dict[str, Any]:
  """What has a place in a table: no lists of buckets, nothing unknown."""
  return {k: v for k, v in report.items() if isinstance(v, int | float | str)}


def _announce(
  config: Config,
  mesh: Mesh,
  abstract: TrainState,
  documents: pipeline.DocumentSource,
  first_step: int,
) -> None:
  """What runs where, in a few lines."""
  if jax.process_index():
    return
  num = sum(x.size for x in jax.tree.leaves(abstract.params))
  device = mesh.devices.flat[0]
  axes = ', '.join(f'{n} {s}' for n, s in mesh.shape.items() if s > 1)
  model = config.model
  sizes = (
    model.embed_width // model.num_cross_heads,
    model.width // model.num_self_heads,
  )
  kernels = dict.fromkeys(
    sharded_attention.choose(model, mesh.abstract_mesh, size).name
    for size in sizes
  )
  print(
    f'{mesh.size} x {device.device_kind}'
    + (f' ({axes})' if axes else '')
    + f'; {num:,} parameters; {", ".join(kernels)} attention, {model.dtype}'
  )
  if config.data.kind != 'copy':  # whose documents have no end
    tokens = int(documents.num_tokens.sum())
    print(f'train data: {len(documents):,} documents, {tokens:,} tokens')
  num_steps = config.train.num_steps
  if first_step >= num_steps:
    print(f'nothing to do: step {first_step} of {num_steps} is reached')
  elif first_step:
    print(f'goes on from step {first_step} of {num_steps}')
