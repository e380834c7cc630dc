"""Training on the page: curves over steps, however many there are."""

import math
from collections.abc import Mapping, Sequence

import numpy as np

from perceiver_ar import metrics
from perceiver_ar.report import charts, page

# Where a token is one of these, a training loss is given in bits.
_BITS = {'bytes': 'bits per byte', 'pixels': 'bits per dimension'}
_MAX_POINTS = 1_000  # of a curve; beyond, a point is the mean of some steps
# Title, column and whether its scale is logarithmic.
_SMALL = (
  ('learning rate', 'learning_rate', False),
  ('gradient norm', 'grad_norm', True),
  ('seconds per step', 'seconds_per_step', False),
  ('targets per second', 'targets_per_second', False),
  ('waiting for data, %', 'data_percent', False),
)


def section(
  steps: Sequence[metrics.Row],
  evaluations: Sequence[metrics.Row],
  codec_kind: str,
) -> str:
  """The rows of metrics.jsonl as curves.

  Args:
    steps: of training.
    evaluations: during training.
    codec_kind: whose tokens are predicted.
  """
  if not steps:
    return page.section(
      'Training', page.missing('No training step is logged yet.')
    )
  unit, scale = 'nats per token', 1.0
  if codec_kind in _BITS:
    unit, scale = _BITS[codec_kind], 1 / math.log(2)
  raw, window, smooth = _loss_points(steps, scale)
  held_out = (
    np.array([row['step'] for row in evaluations]),
    np.array([row['nats_per_token'] * scale for row in evaluations]),
  )
  at, thinned = thin(steps)
  small = [
    charts.small_curve(title, (at, _column(thinned, key)), is_log)
    for title, key, is_log in _SMALL
    if key in thinned[0]
  ]
  num_targets = sum(row['num_targets'] for row in steps)
  return page.section(
    'Training',
    page.figure(charts.loss_curve(raw, smooth, held_out, unit)),
    f'<div class="small">{"".join(map(page.figure, small))}</div>',
    page.note(
      f'{num_targets:,} targets in {len(steps):,} steps. The thick line is '
      f'the mean of {window:,} steps; a steep beginning may run out of the '
      f'frame. The gradient norm is that before clipping. {_waiting(steps)}'
    ),
  )


def _waiting(steps: Sequence[metrics.Row]) -> str:
  """Which of several hosts waits most for its data."""
  num_hosts = len(steps[-1].get('data_wait', ()))
  if num_hosts < 2:
    return ''
  # Those of the last hosts: a run may have gone on with more or fewer.
  rows = [s for s in steps if len(s.get('data_wait', ())) == num_hosts]
  share_P = np.mean([row['data_wait'] for row in rows], axis=0)
  most = int(share_P.argmax())
  return (
    f'Of {num_hosts} processes, {most} waited most for data: '
    f'{share_P[most]:.1%} of its steps, all of them {share_P.mean():.1%}.'
  )


def _loss_points(
  rows: Sequence[metrics.Row], scale: float
) -> tuple[charts.Points, int, charts.Points]:
  """The loss as it is, how many steps are in a mean, and those means."""
  steps, thinned = thin(rows)
  loss = _column(thinned, 'loss') * scale
  weights = _column(thinned, 'num_targets') * np.isfinite(loss)
  total = np.cumsum(np.append(0, np.nan_to_num(loss) * weights))
  count = np.cumsum(np.append(0, weights))
  half = len(loss) // 80
  at = np.arange(len(loss))
  first, last = np.maximum(at - half, 0), np.minimum(at + half + 1, len(loss))
  counts = count[last] - count[first]
  smooth = (total[last] - total[first]) / np.where(counts > 0, counts, np.nan)
  num_steps = (2 * half + 1) * math.ceil(len(rows) / len(thinned))
  return (steps, loss), num_steps, (steps, smooth)


def thin(
  rows: Sequence[metrics.Row],
) -> tuple[np.ndarray, list[dict[str, float]]]:
  """At most so many rows as a curve can show, each the mean of a few steps."""
  size = math.ceil(len(rows) / _MAX_POINTS)
  groups = [rows[i : i + size] for i in range(0, len(rows), size)]
  steps = np.array([group[-1]['step'] for group in groups])
  return steps, [metrics.summarise(group) | _more(group) for group in groups]


def _more(rows: Sequence[metrics.Row]) -> dict[str, float]:
  more: dict[str, float] = {}
  more['num_targets'] = sum(row['num_targets'] for row in rows)
  if all('data_wait' in row for row in rows):
    more['data_percent'] = 100 * sum(map(waited, rows)) / len(rows)
  return more


def waited(row: metrics.Row) -> float:
  """The share of a step that the host which waited most did, for data."""
  return min(max(row.get('data_wait', (0.0,))), 1.0)


def _column(rows: Sequence[Mapping[str, float]], key: str) -> np.ndarray:
  values = np.array([row[key] for row in rows], np.float64)
  return np.where(np.isfinite(values), values, np.nan)
