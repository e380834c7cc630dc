"""Position ids of a document's own tokens, before any crop.

A layout is a small JSON object in the manifest of a data set: where a text
has one axis that counts tokens, an image has columns, rows and channels.
Ids start at 1; 0 is left for padding.

    {'kind': 'index'}               counts from 1, or from 'first'
    {'kind': 'table', 'rows': ...}  the ids of every token, in a list
    {'kind': 'raster', 'height': 64, 'width': 64, 'channels': 3,
     'order': 'rgb', 'seed': 0}     SOS, then every sub-pixel of an image

A raster's orders are `rgb` (row by row, the channels of a pixel together),
`planes` (one whole channel after the other) and `permuted` (one order for all
images, shuffled with the seed).
"""

import functools
from typing import Any

import numpy as np

from perceiver_ar.errors import UserError

INDEX: dict[str, Any] = {'kind': 'index'}
ORDERS = ('rgb', 'planes', 'permuted')
_RASTER_KEYS = ('height', 'width', 'channels', 'order', 'seed')
_MOST_FIRST = 2**30  # so that ids are int32 where it has a billion tokens
_MOST_SUBPIXELS = 2**26  # a larger one is a mistake, and would fill the memory


def validated(layout: dict[str, Any]) -> dict[str, Any]:
  """The same layout, a table of rows as an array, or a UserError."""
  kind = layout.get('kind')
  if kind == 'index':
    return _checked_index(layout)
  if kind == 'raster':
    return _checked_raster(layout)
  if kind != 'table':
    raise UserError(
      f'position layout {kind!r} is unknown; it must be index, table or raster'
    )
  try:
    rows_TP = np.asarray(layout['rows'])
  except (KeyError, ValueError, TypeError, OverflowError):
    rows_TP = np.zeros((0,), np.int32)
  if (
    rows_TP.ndim != 2
    or not rows_TP.size
    or rows_TP.dtype.kind not in 'iu'
    or rows_TP.min() < 1
    or rows_TP.max() >= 2**31
  ):
    raise UserError(
      'position layout table needs rows of equally many ids, all at least 1; '
      'prepare the data set again'
    )
  return {'kind': 'table', 'rows': rows_TP.astype(np.int32)}


def positions(layout: dict[str, Any], indices_T: np.ndarray) -> np.ndarray:
  """Position ids [T, P] of the tokens at these indices of a document."""
  if layout['kind'] == 'index':
    return (indices_T[:, None] + _first(layout)).astype(np.int32)
  rows_TP = _rows(layout)
  if indices_T.size and indices_T.max() >= len(rows_TP):
    raise UserError(
      f'position layout {layout["kind"]} has {len(rows_TP)} rows and a '
      f'document reaches token {indices_T.max()}; its documents must be shorter'
    )
  return rows_TP[indices_T]


def num_axes(layout: dict[str, Any]) -> int:
  return 1 if layout['kind'] == 'index' else _rows(layout).shape[1]


def largest(layout: dict[str, Any], num_positions: int) -> tuple[int, ...]:
  """The largest id on every axis among a document's first tokens."""
  if layout['kind'] == 'index':
    return (num_positions - 1 + _first(layout),)
  rows_TP = positions(layout, np.arange(num_positions))
  return tuple(int(size) for size in rows_TP.max(axis=0))


def max_tokens(layout: dict[str, Any]) -> int | None:
  """How many tokens a document can have, SOS included; None: any number."""
  return None if layout['kind'] == 'index' else len(_rows(layout))


def raster_order(layout: dict[str, Any]) -> np.ndarray:
  """The sub-pixels [H * W * C] in the order of the tokens that follow SOS.

  A sub-pixel is its place in an array [H, W, C] made flat. The array is
  shared and read-only.
  """
  return _raster_order(*(layout[key] for key in _RASTER_KEYS))


def _first(layout: dict[str, Any]) -> int:
  return layout.get('first', 1)


def _rows(layout: dict[str, Any]) -> np.ndarray:
  if layout['kind'] == 'raster':
    return _raster_rows(*(layout[key] for key in _RASTER_KEYS))
  return np.asarray(layout['rows'], np.int32)


@functools.lru_cache(maxsize=8)
def _raster_order(
  height: int, width: int, channels: int, order: str, seed: int
) -> np.ndarray:
  indices = np.arange(height * width * channels)
  if order == 'planes':
    indices_CHW = indices.reshape(height, width, channels).transpose(2, 0, 1)
    indices = np.ascontiguousarray(indices_CHW).reshape(-1)
  elif order == 'permuted':
    # Raw words and a stable sort, because they are the same in every version
    # of NumPy, and the data set does not store the order.
    words = np.random.Philox(key=seed).random_raw(len(indices))
    indices = np.argsort(words, kind='stable')
  indices.setflags(write=False)
  return indices


@functools.lru_cache(maxsize=8)
def _raster_rows(
  height: int, width: int, channels: int, order: str, seed: int
) -> np.ndarray:
  """Ids (column, row, channel) of SOS, (1, 1, 1), and then from 2 on."""
  order_T = _raster_order(height, width, channels, order, seed)
  row_T, column_T, channel_T = np.unravel_index(
    order_T, (height, width, channels)
  )
  rows_TP = np.ones((1 + len(order_T), 3), np.int32)
  rows_TP[1:] = np.stack([column_T, row_T, channel_T], axis=1) + 2
  rows_TP.setflags(write=False)
  return rows_TP


def _checked_index(layout: dict[str, Any]) -> dict[str, Any]:
  first = _first(layout)
  if type(first) is not int or not 1 <= first < _MOST_FIRST:
    raise UserError(
      f"position layout index has 'first': {first!r}, which must be from 1 to "
      f'{_MOST_FIRST - 1}; prepare the data set again'
    )
  return layout


def _checked_raster(layout: dict[str, Any]) -> dict[str, Any]:
  raster: dict[str, Any] = {key: layout.get(key) for key in _RASTER_KEYS}
  sizes = [raster[key] for key in ('height', 'width', 'channels')]
  if not (
    all(type(size) is int and size > 0 for size in sizes)
    and np.prod(sizes, dtype=object) <= _MOST_SUBPIXELS
    and raster['order'] in ORDERS
    and type(raster['seed']) is int
    and 0 <= raster['seed'] < 2**64
  ):
    raise UserError(
      f'position layout raster {raster} needs a height, a width and a number '
      f'of channels that come to {_MOST_SUBPIXELS} sub-pixels at most, an '
      f'order ({", ".join(ORDERS)}) and a seed from 0 on; prepare the data set '
      'again'
    )
  return {'kind': 'raster'} | raster
