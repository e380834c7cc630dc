import io
import sys

import numpy as np
import pytest
from PIL import Image

from perceiver_ar.data import midi, piano_roll
from perceiver_ar.errors import UserError


def notes_of(*rows):
  columns = zip(*rows, strict=True) if rows else [()] * 4
  return midi.Notes(*(np.array(column) for column in columns))


def pixels(notes, mark=None):
  data = piano_roll.piano_roll_png(notes, mark=mark)
  return np.asarray(Image.open(io.BytesIO(data)).convert('RGB')).astype(int)


def changed(one, two):
  """Top, bottom, left and right of where two pictures differ."""
  rows, columns = np.nonzero((one != two).any(axis=2))
  return rows.min(), rows.max(), columns.min(), columns.max()


FRAME = [(0.0, 10.0, 36, 1), (0.0, 10.0, 83, 1)]


def test_pitch_goes_up_and_time_to_the_right():
  empty = pixels(notes_of(*FRAME))
  assert empty.shape[1] == 1200
  low = changed(empty, pixels(notes_of(*FRAME, (1.0, 2.0, 48, 64))))
  high = changed(empty, pixels(notes_of(*FRAME, (1.0, 2.0, 72, 64))))
  late = changed(empty, pixels(notes_of(*FRAME, (5.0, 7.0, 48, 64))))
  assert high[1] < low[0] and high[2:] == low[2:]
  assert late[:2] == low[:2] and late[2] > low[3]
  assert late[3] - late[2] == pytest.approx(2 * (low[3] - low[2]), abs=3)


def test_loud_notes_are_darker():
  of = lambda v: pixels(notes_of(*FRAME, (1.0, 9.0, 60, v)))
  quiet, loud = of(10), of(120)
  top, bottom, left, right = changed(quiet, loud)
  area = np.s_[top : bottom + 1, left : right + 1]
  assert loud[area].mean() < quiet[area].mean() < 230


def test_the_end_of_the_prompt_is_marked():
  notes = notes_of(*FRAME)
  _, _, left, right = changed(pixels(notes), pixels(notes, mark=5.0))
  assert right - left < 4 and 550 < left < 680


def test_a_long_piece_is_cut_into_rows_and_never_higher_than_twelve():
  of = lambda seconds: pixels(
    notes_of((0.0, 1.0, 36, 64), (seconds - 1.0, seconds, 83, 64))
  )
  one = of(20.0).shape[0]
  assert of(60.0).shape == (2 * one, 1200, 3)
  assert of(3 * 3600.0).shape == (12 * one, 1200, 3)


def test_silence_is_a_picture_too():
  assert pixels(notes_of()).shape[1] == 1200


def test_a_missing_pillow_names_the_extra(monkeypatch):
  monkeypatch.setitem(sys.modules, 'PIL', None)
  with pytest.raises(UserError, match=r'perceiver-ar\[prepare\]'):
    piano_roll.piano_roll_png(notes_of(), mark=None)
