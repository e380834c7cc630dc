"""Training from the first step, or from wherever the run was left, to the end.

The order within a step makes a run that was interrupted anywhere, and goes on,
the same run bit for bit: a step's metrics are on disk before the checkpoint
that contains it, and an evaluation before the checkpoint of the state that it
saw.
"""

import contextlib
import logging
import signal
import time
from typing import Any

import jax
from etils import epath
from jax.sharding import Mesh

from perceiver_ar import (
  checkpoint,
  distributed,
  flops,
  host_reports,
  journal,
  mesh_checks,
  metrics,
  partitioning,
  prefetch,
  replicas,
  skipping,
  starting,
  workdir,
)
from perceiver_ar import train_step as train_step_lib
from perceiver_ar.config import Config
from perceiver_ar.data import pipeline
from perceiver_ar.errors import RESTART, UserError
from perceiver_ar.evaluate import Evaluator
from perceiver_ar.progress import Progress
from perceiver_ar.stopping import Interrupted, Stop
from perceiver_ar.train_step import TrainState
from perceiver_ar.watchdog import WRITE, Watchdog

_log = logging.getLogger(__name__)


def train_and_evaluate(config: Config, folder: epath.PathLike) -> int:
  """Trains to `train.num_steps` and returns the exit status.

  Run again, it goes on from the newest sound checkpoint.

  Returns:
    0 at the end; RESTART if it was asked to end by SIGTERM, and saved; 130 if
    by Ctrl-C, and saved.

  Raises:
    UserError: the config, the data, the mesh or the workdir do not fit, or
      too many steps in a row were skipped; or one process of the job has
      another config, code or data than the others.
    HostsError: a process did not come to a barrier in time, or has left.
    CorruptionError: a device holds other parameters than its like.
    SaveError: a checkpoint could not be written.
  """
  documents = pipeline.open_documents(
    config.data, 'train', seed=config.train.seed
  )
  pipeline.check_compatible(config.model, documents)
  workdir.agree(config, documents)
  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  mesh_checks.check_train(config, mesh)
  workdir.keep_compiled(folder, mesh.devices.flat[0].platform)
  evaluator = _evaluator(config, mesh)
  abstract = train_step_lib.abstract_state(config, mesh)
  workdir.check(folder, config, documents)
  workdir.check_shared(folder)
  distributed.barrier('restore')
  doing = 'restore', 'going on from a checkpoint'
  with (
    Watchdog(config.train.hang_seconds, *doing) as watchdog,
    journal.kept(folder, jax.process_index()),
    checkpoint.Checkpoints(folder, config.checkpoint) as checkpoints,
    watchdog.until_saved(),
  ):
    watchdog.watch_writing(checkpoints.writing)
    restored = checkpoints.restore_newest(abstract)
    first_step = restored[0] if restored else 0
    if restored:
      saved = checkpoint.load_config(folder, first_step)
      workdir.check_config(folder, saved, config)
      trained_on = checkpoint.load_fingerprint(folder, first_step)
      where = checkpoint.step_folder(folder, first_step)
      workdir.check_data(where, trained_on, documents)
    loop = _Loop(config, mesh, checkpoints, evaluator, watchdog)
    is_owed = loop.owes_evaluation(folder, first_step)
    starting.announce(config, mesh, abstract, documents, first_step, is_owed)
    status = 0
    if first_step < config.train.num_steps or is_owed:
      with distributed.first_process_first() as is_first:
        if is_first:
          workdir.begin(folder, config, documents)
          journal.start(config, mesh, first_step)
      state = restored[1] if restored else None
      if state is None:
        state = starting.first_state(config, mesh, documents)
      status = loop.run(state, documents, first_step, folder)
  distributed.barrier('exit')
  return status


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
    watchdog: Watchdog,
  ):
    self._config, self._mesh = config, mesh
    self._watchdog = watchdog
    self._checkpoints = checkpoints
    self._evaluator = evaluator
    self._stop = Stop()
    self._exchange = host_reports.Exchange(mesh)
    self._stopping = 0  # the signal that ends all processes at this step
    self._save_soon = False  # as process 0's clock says
    self._saved = 0, time.monotonic()  # the last time, or the start
    self._rows: list[dict[str, Any]] = []
    self._reports: list[list[host_reports.Report]] = []
    self._pending: tuple[int, Any, Any] | None = None
    self._skips = skipping.Skips()
    self._data_error: UserError | None = None
    self._is_owed = False  # an evaluation, which a signal has ended

  def owes_evaluation(self, folder: epath.PathLike, step: int) -> bool:
    """Whether a signal had ended that of this step, saved without its loss."""
    if self._evaluator is None or not step:
      return False
    known = metrics.evaluated(folder, step)
    self._checkpoints.learn(known)
    self._is_owed = self._is_evaluation(step) and step not in known
    return self._is_owed

  def _is_evaluation(self, step: int) -> bool:
    every, last = self._config.evaluate.every, self._config.train.num_steps
    return self._evaluator is not None and (step % every == 0 or step == last)

  def run(
    self,
    state: TrainState,
    documents: pipeline.DocumentSource,
    first_step: int,
    folder: epath.PathLike,
  ) -> int:
    num_steps, process = self._config.train.num_steps, jax.process_index()
    self._fingerprint = documents.fingerprint
    with (
      metrics.Writer(
        folder, first_step=first_step, process_index=process
      ) as self._writer,
      contextlib.closing(
        prefetch.placed_batches(self._config, documents, self._mesh, first_step)
      ) as batches,
      Progress(
        'train', num_steps, 'steps', first_step, visible=process == 0
      ) as self._progress,
      contextlib.ExitStack() as listening,
    ):
      if self._is_owed:
        with self._stop.on_signals():
          loss = self._evaluate(first_step, state)
        self._checkpoints.learn({first_step: loss})
      step = first_step - 1
      self._clock = self._began = time.monotonic()
      self._blocked = 0.0  # seconds of this step that it waited for devices
      for step in () if self._stopping else range(first_step, num_steps):
        kind = 'start' if step == first_step else 'step'
        self._watchdog.begin(kind, f'step {step}')
        batch = next(batches)
        if step == first_step:
          distributed.barrier('first batch')
          self._watchdog.begin('compile', 'compiling the step')
          train_step = starting.compile_step(
            self._config, self._mesh, state, batch.arrays
          )
          self._replicas = replicas.Replicas(
            state,
            self._mesh,
            every=self._config.train.check_replicas_every,
            step=step,
          )
          distributed.barrier('compile')
          # Before, a signal ends it at once: there is nothing to save.
          listening.enter_context(self._stop.on_signals())
          # As if it had not been compiled in between.
          self._clock = self._began = time.monotonic() - batch.seconds
          self._watchdog.begin('step', f'step {step}')
        distributed.collective(f'step {step}')
        state, sums = train_step(state, batch.arrays)
        sent = self._exchange.send(self._report(batch), f'step {step}')
        self._record()
        self._checkpoints.check()
        self._pending = step, sums, sent
        self._replicas.send(step + 1, state)
        if self._after(step + 1, state):
          break
      self._finish_save()
      self._watchdog.begin('end', 'the end')
    return self._end(step + 1)

  def _report(self, batch: prefetch.Placed) -> host_reports.Report:
    """Of this step, as far as it went; its work after this is the next's."""
    now = time.monotonic()
    own, self._blocked = now - self._began - self._blocked, 0.0
    self._began = now
    minutes = self._config.checkpoint.save_minutes
    self._data_error = batch.error
    return host_reports.Report(
      stop=self._stop.signal or 0,
      save=0 < minutes * 60 < now - self._saved[1],
      failed=batch.error is not None,
      digest=batch.digest,
      bad_records=batch.bad_records,
      data_seconds=batch.seconds,
      own_seconds=own,
    )

  def _after(self, step: int, state: TrainState) -> bool:
    """Evaluates and saves if it is time; True if the run must end here."""
    config = self._config
    is_last = step == config.train.num_steps or self._stopping != 0
    is_regular = step % config.checkpoint.save_every == 0
    is_save = is_regular or is_last or self._save_soon
    is_evaluation = self._is_evaluation(step)
    if not (is_save or is_evaluation):
      return False
    self._record()
    loss = None
    if is_evaluation:
      loss = self._evaluate(step, state)
    # What was pending may have brought a signal, or the evaluation.
    is_last = is_last or self._stopping != 0
    if is_save or is_last:
      journal.begin('save')
      self._finish_save()
      self._watchdog.watch('save', f'the checkpoint of step {step}')
      self._replicas.check(step, state)
      distributed.barrier('save')
      self._writer.sync()
      journal.sync()
      self._checkpoints.save(
        step, state, config=config, loss=loss, data=self._fingerprint
      )
      journal.event('save', step=step, seconds=journal.taken())
      self._save_soon, self._saved = False, (step, time.monotonic())
    self._clock = self._began = time.monotonic()
    self._blocked = 0.0
    return is_last

  def _evaluate(self, step: int, state: TrainState) -> float | None:
    """The loss; None if a signal came: whoever goes on makes it again."""
    assert self._evaluator is not None
    doing = 'evaluation', f'the evaluation of step {step}'

    def asked() -> int:
      self._watchdog.watch(*doing)
      return self._stop.signal or 0

    self._watchdog.begin(*doing)
    distributed.barrier('evaluation')
    try:
      report = self._evaluator.run(state.params, visible=False, asked=asked)
    except Interrupted as interrupted:
      self._stopping, self._is_owed = interrupted.signal, True
      return None
    self._is_owed = False
    self._writer.write(step, metrics.scalars(report))
    journal.event('evaluation', step=step, seconds=journal.taken())
    return report['nats_per_token']

  def _finish_save(self) -> None:
    """Waits until the last one is written, which takes storage its time."""
    self._watchdog.watch(WRITE, 'writing the last checkpoint')
    self._checkpoints.wait()
    if self._checkpoints.last_seconds is not None:
      self._watchdog.learn(WRITE, self._checkpoints.last_seconds)

  def _record(self) -> None:
    """Writes the pending step's metrics; waits until the device has them."""
    if self._pending is None:
      return
    step, sums, sent = self._pending
    self._pending, start = None, time.monotonic()
    values = {name: float(value) for name, value in sums.items()}
    reports = self._exchange.read(sent)
    self._check_data(reports)
    now = time.monotonic()
    self._blocked += now - start
    seconds = now - self._clock
    self._stopping = max(report.stop for report in reports)
    # Unless it was wanted before the last one was made.
    self._save_soon = reports[0].save and step >= self._saved[0]
    digest = sum(report.digest for report in reports) % 2**64
    row = metrics.step_row(values, pipeline.format_digest(digest)) | {
      'bad_records': sum(report.bad_records for report in reports),
      'seconds': round(seconds, 6),
      # Of each process, the share of the step that it waited for data.
      'data_wait': [round(r.data_seconds / seconds, 4) for r in reports],
    }
    self._clock = now
    reason = skipping.reason(values)
    if reason:
      row['skipped_for'] = reason
    self._writer.write(step, row)
    if reason:
      names = ('data_digest', 'loss', 'grad_norm')
      facts = {name: row[name] for name in names}
      journal.event('skipped', step=step, reason=reason, **facts)
    self._skips.add(step, row, reason)
    log_every = self._config.train.log_every
    self._rows = [*self._rows, row][-log_every:]
    self._reports = [*self._reports, reports][-log_every:]
    self._show(step)
    self._replicas.read()
    self._check_skipped(step, int(values['num_skipped_in_a_row']))

  def _check_data(self, reports: list[host_reports.Report]) -> None:
    """Ends all processes together, before anything of this step is kept."""
    if any(report.failed for report in reports):
      if self._data_error is not None:
        raise self._data_error
      distributed.barrier('data')  # which says who has left

  def _show(self, step: int) -> None:
    note = ''
    if (step + 1) % self._config.train.log_every == 0:
      recent = metrics.summarise(self._rows)
      note = f'loss {recent["loss"]:.4f}'
      slow = host_reports.slowest(self._reports, recent['seconds_per_step'])
      if slow and jax.process_index() == 0:
        _log.warning('%s', slow)
        journal.event('slow', step=step, what=slow)
    self._progress.advance(1, note)

  def _check_skipped(self, step: int, in_a_row: int) -> None:
    if in_a_row < self._config.train.max_skipped_steps:
      return
    self._finish_save()
    good = self._checkpoints.latest()
    where = 'there is no checkpoint yet'
    if good is not None:
      where = f'the last good checkpoint is step {good}'
    raise UserError(
      f'{self._skips.story(in_a_row)}; the last of them is step {step}, '
      f'{where}; {self._skips.remedy()}, or look at the batches whose digests '
      'metrics.jsonl has for these steps'
    )

  def _end(self, step: int) -> int:
    is_over = step == self._config.train.num_steps and not self._is_owed
    if self._stopping and not is_over:
      name = signal.Signals(self._stopping).name
      _say(f'{name}: step {step} is saved; run again to go on')
      asked = self._stopping == signal.SIGINT  # by a person, who restarts it
      status = 128 + signal.SIGINT if asked else RESTART
      journal.end(name, status)
      return status
    if self._rows:
      self._tell_speed(step)
    journal.end('done', 0)
    return 0

  def _tell_speed(self, step: int) -> None:
    rows = [row for row in self._rows if row['seconds']]
    speed = metrics.summarise(rows)['seconds_per_step']
    rate = flops.matmul_rate(self._config.model.dtype, 2048)
    used = flops.train_flops(self._config.model) * self._config.train.batch_size
    used -= train_step_lib.saved_flops(self._config, self._mesh)
    share = used / speed / rate / self._mesh.size
    _say(
      f'trained to step {step}; the last steps took {speed:.3g} s each, '
      f'{share:.0%} of the matmul rate ({rate / 1e9:,.0f} GFLOP/s a device)'
    )


def _say(line: str) -> None:
  if jax.process_index() == 0:
    print(line)
