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
  ],
)
def test_malformed_layouts_are_refused(layout):
  with pytest.raises(UserError, match='position layout'):
    layouts.validated(layout)


def test_largest_is_per_axis_and_only_over_the_tokens_in_use():
  assert layouts.largest(layouts.INDEX, 9) == (9,)
  assert layouts.largest(_TABLE, 2) == (2, 1)
  assert layouts.largest(_TABLE, 3) == (2, 2)
