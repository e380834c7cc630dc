"""What is read where records are damaged."""

import collections
import contextlib
import logging

import numpy as np
import pytest

from perceiver_ar.data import reading, records
from perceiver_ar.errors import UserError


class Documents:
  """Documents that are their own index; some are damaged."""

  def __init__(self, num, damaged=()):
    self._num, self._damaged = num, set(damaged)

  def __len__(self):
    return self._num

  def __getitem__(self, index):
    if index in self._damaged:
      raise records.DamagedRecord(f'FILE: record {index} is damaged')
    return np.array([index])


def read(reader, visit, seed=0):
  document, num = reader.read(visit, np.random.default_rng([seed, visit]))
  return int(document[0]), num


def reader_of(damaged, num=100, *, skip=True, visits=None):
  visits = range(num) if visits is None else visits
  return reading.Reader(Documents(num, damaged), visits, skip=skip)


def test_sound_records_draw_nothing():
  rng = np.random.default_rng(0)
  before = rng.bit_generator.state
  document, num = reader_of([7]).read(3, rng)
  assert (int(document[0]), num) == (3, 0)
  assert rng.bit_generator.state == before


def test_what_replaces_a_record_is_a_function_of_the_generator():
  reader = reader_of([7, 8])
  found = {seed: read(reader, 7, seed) for seed in range(5)}
  again = reader_of([7, 8])  # which has read other things before
  read(again, 1)
  assert {seed: read(again, 7, seed) for seed in reversed(range(5))} == found
  assert len({document for document, _ in found.values()}) > 1
  assert all(num >= 1 for _, num in found.values())
  assert not {7, 8} & {document for document, _ in found.values()}


def test_a_replacement_is_drawn_as_often_as_it_is_visited():
  visits = [0] * 10 + [1] * 80 + [2] * 10  # the damaged one is 0
  reader = reader_of([0], 3, visits=visits)
  for _ in range(10_000):  # so that the share of what is damaged is small
    read(reader, 20)
  drawn = collections.Counter(read(reader, 0, s)[0] for s in range(400))
  assert drawn[1] + drawn[2] == 400
  assert drawn[1] / 400 == pytest.approx(80 / 90, abs=0.06)


def test_each_damaged_record_is_named_once(caplog):
  reader = reader_of([7, 8])
  with caplog.at_level(logging.WARNING):
    for seed in range(4):
      read(reader, 7, seed)
      read(reader, 8, seed)
  said = [record.getMessage() for record in caplog.records]
  assert len(said) == 2
  assert said[0].startswith('FILE: record 7 is damaged; another is read')


def test_without_skipping_the_first_one_ends_it_with_the_remedy():
  with pytest.raises(UserError, match=r'record 7 .*data\.damaged=skip') as e:
    read(reader_of([7], skip=False), 7)
  assert not isinstance(e.value, records.DamagedRecord)


def test_a_data_set_that_is_all_damaged_ends_at_once():
  with pytest.raises(UserError, match=r'20 records in a row .* of the split'):
    read(reader_of(range(100)), 3)


@pytest.mark.parametrize(('share', 'ends'), [(2, False), (30, True)])
def test_a_share_that_is_too_large_ends_it(share, ends):
  reader, num = reader_of(range(share)), 0
  with (
    pytest.raises(UserError, match='more than 5%')
    if ends
    else (contextlib.nullcontext())
  ):
    for num in range(3_000):
      read(reader, num % 100, num)
  assert num < 300 if ends else num == 2_999


def test_what_is_no_damage_is_never_skipped():
  class Gone(Documents):
    def __getitem__(self, index):
      raise UserError('the file is gone')

  reader = reading.Reader(Gone(3), range(3), skip=True)
  with pytest.raises(UserError, match='the file is gone'):
    read(reader, 0)
