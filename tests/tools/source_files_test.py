"""Files are found, and split, in the same way by all tools."""

import pathlib
import sys

import pytest

from perceiver_ar.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import preparation
import source_files

_HERE = pathlib.Path('in')


def divide(names, held_out=None):
  named = {name: source_files.folder_split(name) for name in names}
  return source_files.divide(named, held_out, _HERE)


def numbered(folder, number=20):
  return [f'{folder}/{i}' for i in range(number)]


def test_files_are_sorted_and_hidden_ones_left_out(tmp_path):
  names = ['b', 'a/z', 'a b', '.hidden', 'a/._z', '.git/c', 'A', 'a/deep/er']
  for name in names:
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).touch()
  assert source_files.files_below(tmp_path) == (
    ['A', 'a b', 'a/deep/er', 'a/z', 'b']
  )


def test_without_a_folder_for_training_all_is_divided():
  names = [*numbered('x'), *numbered('y')]
  division = divide(names, 0.1)
  held = {name for name, s in division.split_of.items() if s == 'validation'}
  assert held == preparation.held_out(names, 0.1)
  assert division.num_outside == 0 and not division.notes(_HERE)
  assert list(division.split_of) == names


def test_named_folders_are_the_splits_and_the_rest_is_counted():
  names = [*numbered('train'), *numbered('Val'), *numbered('test')]
  others = [*numbered('y'), 'README', 'validation']  # the last is no folder
  division = divide([*names, *others])
  assert division.split_of == {
    name: {'train': 'train', 'Val': 'validation', 'test': 'test'}[top]
    for name in names
    for top in [name.split('/')[0]]
  }
  assert division.num_outside == 22
  assert '22 files in in are not' in division.notes(_HERE)[0]


def test_a_missing_validation_is_held_out_of_training_only():
  train, test = numbered('train'), numbered('test')
  division = divide([*train, *test, 'other'])
  held = {name for name, s in division.split_of.items() if s == 'validation'}
  assert held == preparation.held_out(train, source_files.HELD_OUT)
  assert all(division.split_of[name] == 'test' for name in test)
  assert division.num_outside == 1


@pytest.mark.parametrize(
  ('names', 'held_out', 'said'),
  [
    (numbered('x'), 0, 'must lie'),
    (numbered('x'), 1, 'must lie'),
    (numbered('x'), float('nan'), 'must lie'),
    (['train/0', 'validation/1'], 0.1, '--held_out=0.1 is for inputs without'),
    (['train/0', 'test/1', 'x'], None, 'one document to train on, train/0,'),
    (['test/1', 'x', 'val/2'], None, 'split test and validation and no train'),
  ],
)
def test_what_cannot_be_divided_is_refused(names, held_out, said):
  with pytest.raises(UserError, match=said):
    divide(names, held_out)


@pytest.mark.parametrize(
  'name',
  ['../a', 'a/../../b', '/a', '\\\\host\\a', '..\\a', 'C:/a', 'c:a', ''],
)
def test_members_that_leave_their_folder_are_refused(name):
  with pytest.raises(UserError, match='leaves its folder'):
    source_files.check_members(_HERE, ['good', name])


def test_members_within_their_folder_are_fine():
  names = ['a', 'a/b/', './a', '.', 'a..b', '...', 'Bach: Fugue.mid', 'a\\b']
  source_files.check_members(_HERE, names)


@pytest.mark.parametrize(
  ('found', 'variant'),
  [
    ({'train': 5, 'test': 2}, 'known'),
    ({'train': 5}, 'known'),
    ({'train': 5, 'test': 0}, 'known'),
    ({'train': 4, 'test': 2}, 'known-partial'),
    ({'train': 6}, 'known-partial'),
  ],
)
def test_a_variant_is_complete_if_the_splits_that_are_there_are(found, variant):
  name, note = source_files.name_variant(
    'known', found, {'train': 5, 'test': 2}
  )
  assert name == variant
  assert f'{found["train"]} of 5 in train' in note
  assert ('part' in note) == name.endswith(source_files.PARTIAL)
