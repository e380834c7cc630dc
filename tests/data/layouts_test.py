import numpy as np
import pytest

from perceiver_ar.data import layouts
from perceiver_ar.errors import UserError

_TABLE = {'kind': 'table', 'rows': [[1, 1], [2, 1], [1, 2]]}


def test_index_positions_count_from_one():
  ids_TP = layouts.positions(layouts.INDEX, np.array([0, 1, 7]))
  assert ids_TP.dtype == np.int32
  assert ids_TP.tolist() == [[1], [2], [8]]
  assert layouts.num_axes(layouts.INDEX) == 1


def test_table_positions_are_its_rows():
  for layout in (_TABLE, layouts.validated(_TABLE)):
    ids_TP = layouts.positions(layout, np.array([2, 0]))
    assert ids_TP.tolist() == [[1, 2], [1, 1]]
    assert layouts.num_axes(layout) == 2


def test_positions_beyond_the_table_are_refused():
  with pytest.raises(UserError, match='3 rows and a document reaches token 3'):
    layouts.positions(_TABLE, np.array([3]))


@pytest.mark.parametrize(
  'layout',
  [
    {},
    {'kind': 'spiral'},
    {'kind': 'table'},
    {'kind': 'table', 'rows': []},
    {'kind': 'table', 'rows': [[1], [1, 2]]},
    {'kind': 'table', 'rows': [[0, 1]]},
    {'kind': 'raster', 'height': 2, 'width': 2, 'channels': 3, 'order': 'rgb'},
    *(
      {'kind': 'raster', 'height': 2, 'width': 2, 'channels': 3}
      | {'order': 'rgb', 'seed': 0}
      | wrong
      for wrong in (
        {'height': 0},
        {'width': 2.5},
        {'height': 2**40, 'width': 2**40},
        {'order': 'spiral'},
        {'seed': -1},
      )
    ),
  ],
)
def test_malformed_layouts_are_refused(layout):
  with pytest.raises(UserError, match='position layout'):
    layouts.validated(layout)


def test_largest_is_per_axis_and_only_over_the_tokens_in_use():
  assert layouts.largest(layouts.INDEX, 9) == (9,)
  assert layouts.largest(_TABLE, 2) == (2, 1)
  assert layouts.largest(_TABLE, 3) == (2, 2)


def _raster(height: int, width: int, order: str, seed: int = 0):
  return {
    'kind': 'raster',
    'height': height,
    'width': width,
    'channels': 3,
    'order': order,
    'seed': seed,
  }


def test_index_positions_may_start_later():
  layout = layouts.validated(layouts.INDEX | {'first': 5})
  assert layouts.positions(layout, np.array([0, 2])).tolist() == [[5], [7]]
  assert layouts.largest(layout, 3) == (7,)
  with pytest.raises(UserError, match="position layout index has 'first': 0"):
    layouts.validated(layouts.INDEX | {'first': 0})


def test_raster_positions_are_column_row_and_channel_after_sos():
  layout = layouts.validated(_raster(2, 3, 'rgb'))
  ids_TP = layouts.positions(layout, np.arange(19))
  expected = [(1, 1, 1)] + [
    (2 + x, 2 + y, 2 + c) for y in range(2) for x in range(3) for c in range(3)
  ]
  assert ids_TP.dtype == np.int32
  assert [tuple(row) for row in ids_TP] == expected
  planes = layouts.validated(_raster(2, 3, 'planes'))
  ids_TP = layouts.positions(planes, np.arange(19))
  assert [tuple(row) for row in ids_TP] == sorted(
    expected, key=lambda ids: (ids[2], ids[1], ids[0])
  )


@pytest.mark.parametrize('order', layouts.ORDERS)
def test_a_published_image_has_the_published_positions(order):
  layout = layouts.validated(_raster(64, 64, order))
  ids_TP = layouts.positions(layout, np.arange(12_289))
  assert len({tuple(row) for row in ids_TP.tolist()}) == 12_289
  assert ids_TP[0].tolist() == [1, 1, 1]
  assert ids_TP[1:].min(axis=0).tolist() == [2, 2, 2]
  assert layouts.largest(layout, 12_289) == (65, 65, 4)
  assert layouts.num_axes(layout) == 3
  assert layouts.max_tokens(layout) == 12_289
  with pytest.raises(UserError, match='raster has 12289 rows'):
    layouts.positions(layout, np.array([12_289]))


def test_a_permuted_order_follows_from_its_seed():
  # These numbers are in every data set that was prepared so: they stay.
  layout = _raster(2, 2, 'permuted', seed=3)
  order = layouts.raster_order(layout).tolist()
  assert order == [6, 1, 11, 8, 5, 2, 7, 10, 9, 4, 3, 0]
  assert order != layouts.raster_order(_raster(2, 2, 'permuted', 4)).tolist()


def test_the_largest_position_is_that_of_the_tokens_in_use():
  assert layouts.largest(_raster(4, 4, 'rgb'), 1) == (1, 1, 1)
  assert layouts.largest(_raster(4, 4, 'rgb'), 5) == (3, 2, 4)
  assert layouts.largest(_raster(4, 4, 'planes'), 5) == (5, 2, 2)


def test_documents_are_as_long_as_their_positions_reach():
  assert layouts.max_tokens(layouts.INDEX) is None
  assert layouts.max_tokens(layouts.validated(_TABLE)) == 3
  assert layouts.max_tokens(_raster(2, 3, 'rgb')) == 19


def test_what_is_shared_cannot_be_written_to():
  layout = _raster(2, 3, 'rgb')
  with pytest.raises(ValueError, match='read-only'):
    layouts.raster_order(layout)[0] = 1
  layouts.positions(layout, np.arange(3))[0] = 7  # a copy
  assert layouts.positions(layout, np.arange(1)).tolist() == [[1, 1, 1]]
