"""Metrics on disk: metrics.jsonl for programs, TensorBoard for people.

A line of metrics.jsonl is one JSON object: a training step's (`step` s is the
update from state s to state s + 1) or, with a `split`, an evaluation's (of
state `step`). When a run resumes, what it will compute again is dropped, so
that the file ends as if nothing had happened. JSON knows no NaN: such numbers
are the strings NaN, Infinity and -Infinity, which `float` understands.
"""

import contextlib
import json
import logging
import math
import sys
import tempfile
import time
import types
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, Self, TypeAlias, cast

from etils import epath

from perceiver_ar import journal, lines, paths
from perceiver_ar.errors import SaveError, UserError

Row: TypeAlias = lines.Row

_log = logging.getLogger(__name__)
_FLUSH_SECONDS = 60.0  # so much later people see a step
_NONFINITE = {x: float(x) for x in ('NaN', 'Infinity', '-Infinity')}


class Writer:
  """Writes metrics on process 0, and nothing on the others.

  A bucket (gs://...) knows no appending: there the files are written as a whole
  by `sync`, and the last by `close`. A TensorBoard that cannot be written is
  given up, with a warning.
  """

  def __init__(
    self, workdir: epath.PathLike, *, first_step: int, process_index: int
  ):
    """Drops what the steps from `first_step` on had written before."""
    self._file = self._tensorboard = None
    if process_index:
      return
    path = _path(workdir)
    rows = lines.read(path, 'step')
    kept = _kept(rows, first_step)
    self._file = lines.Appender(path, [line for line, _ in kept])
    self._is_bucket = paths.is_bucket(path)
    _tell_lost(rows, first_step)
    self._tensorboard = _tensorboard(path.parent / 'tensorboard', first_step)
    for _, row in kept:
      # TensorBoard hides everything from `first_step` on, these too.
      if row['step'] == first_step:
        self._write_tensorboard(first_step, row)

  def __enter__(self) -> Self:
    return self

  def __exit__(
    self, kind: type[BaseException] | None, *exception: object
  ) -> None:
    # What ended the run is told, not that this disk is full as well.
    with contextlib.suppress(*([SaveError] if kind else [])):
      self.close()

  def write(self, step: int, values: Mapping[str, Any]) -> None:
    """Numbers, lists of them, and strings; `split` if it is an evaluation."""
    if self._file is None:
      return
    row = lines.plain(values)
    self._file.write({'step': step} | row)
    self._write_tensorboard(step, row)

  def sync(self) -> None:
    """Before a save, whose steps must be in the file already."""
    if self._file is None or self._tensorboard is None:
      return
    self._file.sync()
    if self._is_bucket:
      self._tensorboard.flush()

  def close(self) -> None:
    if self._file is None or self._tensorboard is None:
      return
    with (
      contextlib.closing(self._tensorboard),
      contextlib.closing(self._file),
    ):
      self._file.sync()

  def _write_tensorboard(self, step: int, row: Mapping[str, Any]) -> None:
    prefix = row.get('split', 'train')
    numbers = {
      f'{prefix}/{name}': float(value)
      for name, value in row.items()
      if name != 'step' and (isinstance(value, int | float) or _is_nan(value))
    }
    assert self._tensorboard is not None
    self._tensorboard.write_scalars(step, numbers)


def scalars(report: Mapping[str, Any]) -> dict[str, Any]:
  """What has a place in a table: no lists of buckets, nothing unknown."""
  return {k: v for k, v in report.items() if isinstance(v, int | float | str)}


def evaluated(workdir: epath.PathLike, step: int) -> dict[int, float]:
  """The losses of evaluations up to `step`, as process 0 knows them, on all."""
  # Only here: whoever reads what is written does without JAX.
  import jax

  from perceiver_ar import distributed

  path, known = _path(workdir), {}
  if jax.process_index() == 0 and path.exists():
    rows = read(workdir)[1]
    known = {row['step']: row['nats_per_token'] for row in rows}
  said = distributed.exchange('evaluations', json.dumps(list(known.items())))
  return {at: loss for at, loss in json.loads(said[0]) if at <= step}


def read(workdir: epath.PathLike) -> tuple[list[Row], list[Row]]:
  """The rows of the training steps, and those of the evaluations.

  Raises:
    UserError: there is no metrics.jsonl, or a line before the last is broken.
  """
  path = _path(workdir)
  if not path.exists():
    raise UserError(f'{path} does not exist; train first, or name another run')
  rows = [
    {k: _NONFINITE[v] if _is_nan(v) else v for k, v in row.items()}
    for _, row in lines.read(path, 'step')
  ]
  return (
    [row for row in rows if 'split' not in row],
    [row for row in rows if 'split' in row],
  )


def summarise(rows: Sequence[Mapping[str, Any]]) -> dict[str, float]:
  """What a few training steps, the last ones, come to in one line.

  Losses are summed over targets and then divided, so that a step with few
  targets counts for little.
  """
  num_targets = sum(row['num_targets'] for row in rows)
  total = sum(row['loss'] * row['num_targets'] for row in rows)
  seconds = sum(row['seconds'] for row in rows)
  return {
    'loss': total / num_targets if num_targets else math.nan,
    'grad_norm': sum(row['grad_norm'] for row in rows) / len(rows),
    'learning_rate': rows[-1]['learning_rate'],
    'seconds_per_step': seconds / len(rows),
    'targets_per_second': num_targets / seconds if seconds else math.nan,
  }


def step_row(values: Mapping[str, float], data_digest: str) -> dict[str, Any]:
  """What the results of a training step, and of nothing else, have in a row.

  Args:
    values: the metrics of `train_step`.
    data_digest: of its batch.
  """
  targets = max(values['num_targets'], 1.0)
  return {
    'loss': values['loss'] / targets,
    'num_targets': int(values['num_targets']),
    'z_loss': values['z_loss'] / targets,
    'accuracy': values['correct'] / targets,
    'grad_norm': values['grad_norm'],
    'learning_rate': values['learning_rate'],
    'skipped': int(values['skipped']),
    'data_digest': data_digest,
  }


def _path(workdir: epath.PathLike) -> epath.Path:
  return epath.Path(workdir) / 'metrics.jsonl'


def _is_nan(value: Any) -> bool:
  return isinstance(value, str) and value in _NONFINITE


def _tell_lost(rows: Sequence[tuple[bytes, Row]], first_step: int) -> None:
  """In the journal: steps that were done, and are to be done again."""
  lost = [r for _, r in rows if 'split' not in r and r['step'] >= first_step]
  if lost:
    seconds = sum(row.get('seconds', 0.0) for row in lost)
    journal.event('lost', steps=len(lost), seconds=seconds)


def _kept(
  rows: Sequence[tuple[bytes, Row]], first_step: int
) -> list[tuple[bytes, Row]]:
  """The lines, without what will be computed again."""
  return [
    (line, row)
    for line, row in rows
    if row['step'] < first_step
    # The evaluation of the state that the run resumes from; a run that starts
    # from nothing will repeat that, too.
    or ('split' in row and row['step'] == first_step > 0)
  ]


class _TensorBoardWriter:
  """The part of clu's MetricWriter that numbers need: a file of events.

  metrics.jsonl has the numbers too, so that nothing here raises because of
  storage. tensorboardX's own writer does not raise, and blocks for ever: an
  error ends its thread, and nobody empties its queue.
  """

  def __init__(self, folder: epath.Path, first_step: int):
    self._folder, self._step = folder, first_step
    self._file: Any = None  # or it is given up
    self._scratch: tempfile.TemporaryDirectory[str] | None = None
    self._flushed = time.monotonic()
    with self._or_none():
      self._open()

  def _open(self) -> None:
    import tensorboardX
    from tensorboardX.proto import event_pb2

    local = self._folder
    if paths.is_bucket(local):
      self._scratch = tempfile.TemporaryDirectory(ignore_cleanup_errors=True)
      local = epath.Path(self._scratch.name)
    local.mkdir(parents=True, exist_ok=True)
    # Seconds would not do: a quick restart would overwrite its own file.
    name = f'events.out.tfevents.{time.time_ns()}'
    self._file = tensorboardX.RecordWriter(str(local / name))
    start = cast(Any, event_pb2).SessionLog.START
    self._add(file_version='brain.Event:2')
    self._add(step=self._step, session_log={'status': start})

  def write_scalars(self, step: int, scalars: Mapping[str, float]) -> None:
    if self._file is None:
      return
    with self._or_none():
      self._step = step
      values = [{'tag': k, 'simple_value': x} for k, x in scalars.items()]
      self._add(step=step, summary={'value': values})
      if time.monotonic() - self._flushed > _FLUSH_SECONDS:
        self._file.flush()
        self._flushed = time.monotonic()

  def flush(self) -> None:
    if self._file is None:
      return
    with self._or_none():
      self._file.flush()
      if self._scratch is not None:
        events = epath.Path(self._file.path)
        self._folder.mkdir(parents=True, exist_ok=True)
        (self._folder / events.name).write_bytes(events.read_bytes())

  def close(self) -> None:
    if self._file is not None:
      with self._or_none():
        self._file.close()
    if self._scratch is not None:
      self._scratch.cleanup()

  def _add(self, **content: Any) -> None:
    from tensorboardX.proto import event_pb2

    event = cast(Any, event_pb2).Event(wall_time=time.time(), **content)
    self._file.write(event.SerializeToString())

  @contextlib.contextmanager
  def _or_none(self) -> Iterator[None]:
    """Gives the charts up where they cannot be written."""
    try:
      yield
    except Exception as error:  # buckets have more kinds than OSError
      _log.warning(
        '%s cannot be written (%s): its charts end about step %d; '
        'metrics.jsonl goes on',
        *(self._folder, error, self._step),
      )
      file, self._file = self._file, None
      if file is not None:
        with contextlib.suppress(Exception):  # it is said
          file.close()


def _tensorboard(folder: epath.Path, first_step: int) -> Any:
  """A clu writer that works in the background."""
  # clu imports TensorFlow for its own summary writer, which we do not use.
  name = 'clu.metric_writers.summary_writer'
  if name not in sys.modules:
    module = types.ModuleType(name)
    cast(Any, module).SummaryWriter = _TensorBoardWriter
    sys.modules[name] = module
  from clu import metric_writers

  writer = cast(Any, _TensorBoardWriter(folder, first_step))
  return metric_writers.AsyncMultiWriter([writer])
