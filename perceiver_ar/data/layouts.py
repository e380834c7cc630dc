"""Position ids of a document's own tokens, before any crop.

A layout is a small JSON object in the manifest of a data set: where a text
has one axis that counts tokens, an image has rows, columns and channels.
Ids start at 1; 0 is left for padding.
"""

from typing import Any

import numpy as np

from perceiver_ar.errors import UserError

INDEX: dict[str, Any] = {'kind': 'index'}


def validated(layout: dict[str, Any]) -> dict[str, Any]:
  """The same layout, a table of rows as an array, or a UserError."""
  kind = layout.get('kind')
  if kind == 'index':
    return layout
  if kind != 'table':
    raise UserError(
      f'position layout {kind!r} is unknown; it must be index or table'
    )
  try:
    rows_TP = np.asarray(layout['rows'], np.int32)
  except (KeyError, ValueError):
    rows_TP = np.zeros((0,), np.int32)
  if rows_TP.ndim != 2 or not rows_TP.size or rows_TP.min() < 1:
    raise UserError(
      'position layout table needs rows of equally many ids, all at least 1; '
      'prepare the data set again'
    )
  return {'kind': 'table', 'rows': rows_TP}


def positions(layout: dict[str, Any], indices_T: np.ndarray) -> np.ndarray:
  """Position ids [T, P] of the tokens at these indices of a document."""
  if layout['kind'] == 'index':
    return (indices_T[:, None] + 1).astype(np.int32)
  rows_TP = np.asarray(layout['rows'], np.int32)
  if indices_T.size and indices_T.max() >= len(rows_TP):
    raise UserError(
      f'position layout table has {len(rows_TP)} rows and a document reaches '
      f'token {indices_T.max()}; its documents must be shorter'
    )
  return rows_TP[indices_T]


def num_axes(layout: dict[str, Any]) -> int:
  return 1 if layout['kind'] == 'index' else len(layout['rows'][0])


def largest(layout: dict[str, Any], num_positions: int) -> tuple[int, ...]:
  """The largest id on every axis among a document's first tokens."""
  if layout['kind'] == 'index':
    return (num_positions,)
  rows_TP = positions(layout, np.arange(num_positions))
  return tuple(int(size) for size in rows_TP.max(axis=0))
