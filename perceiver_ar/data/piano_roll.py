"""Pictures of performances: time to the right, pitch upwards, loud is dark."""

import io
import math
from typing import Any

import numpy as np

from perceiver_ar.data.midi import Notes
from perceiver_ar.errors import UserError

_WIDTH = 1200
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 12, 10, 26  # around the notes of a row
_KEY_HEIGHT = 4
_ROW_SECONDS = 30.0  # before a piece is cut into rows
_MOST_ROWS = 12  # before a row holds more than that
_LEAST_ROW_SECONDS = 5.0
_OCTAVE = 12
_LABELS = 14  # size of letters

_PAPER = (255, 255, 255)
_BLACK_KEY = (246, 247, 249)
_LINE = (214, 218, 224)
_INK = (90, 96, 106)
_MARK = (214, 69, 65)
_SOFT = np.array([158, 196, 232])
_LOUD = np.array([22, 30, 92])


def piano_roll_png(notes: Notes, *, mark: float | None) -> bytes:
  """A PNG, 1200 pixels wide, of one row or more; a prompt ends at `mark`."""
  pil = _import_pillow()
  lowest, highest = _octaves(notes)
  seconds = float(notes.end_N.max()) if len(notes) else 0.0
  row_seconds, num_rows = _rows(max(seconds, mark or 0.0))
  scale = (_WIDTH - _LEFT - _RIGHT) / row_seconds
  key_rows = highest - lowest + 1
  height = _TOP + key_rows * _KEY_HEIGHT + _BOTTOM
  picture = pil.Image.new('RGB', (_WIDTH, num_rows * height), _PAPER)
  draw = pil.ImageDraw.Draw(picture)
  font = pil.ImageFont.load_default(_LABELS)
  for row in range(num_rows):
    begin = row * row_seconds
    top = row * height + _TOP
    _draw_keys(draw, font, top, lowest, highest)
    _draw_seconds(draw, font, top + key_rows * _KEY_HEIGHT, begin, row_seconds)
    _draw_notes(draw, notes, begin, row_seconds, top, highest)
    if mark is not None and begin <= mark <= begin + row_seconds:
      x = _LEFT + round((mark - begin) * scale)
      bottom = top + key_rows * _KEY_HEIGHT
      draw.line([x, top - 6, x, bottom + 6], fill=_MARK, width=2)
  file = io.BytesIO()
  picture.save(file, 'PNG', optimize=True)
  return file.getvalue()


def _octaves(notes: Notes) -> tuple[int, int]:
  """Whole octaves around the notes, and no fewer than two."""
  low, high = 60, 60
  if len(notes):
    low, high = int(notes.pitch_N.min()), int(notes.pitch_N.max())
  low = low // _OCTAVE * _OCTAVE
  high = max(high // _OCTAVE * _OCTAVE + _OCTAVE, low + 2 * _OCTAVE)
  return low, high


def _rows(seconds: float) -> tuple[float, int]:
  if seconds <= _ROW_SECONDS:
    return float(max(math.ceil(seconds), _LEAST_ROW_SECONDS)), 1
  num_rows = min(math.ceil(seconds / _ROW_SECONDS), _MOST_ROWS)
  return float(math.ceil(seconds / num_rows)), num_rows


def _draw_keys(
  draw: Any, font: Any, top: int, lowest: int, highest: int
) -> None:
  right = _WIDTH - _RIGHT
  for pitch in range(lowest, highest + 1):
    y = top + (highest - pitch) * _KEY_HEIGHT
    if pitch % _OCTAVE in (1, 3, 6, 8, 10):
      box = [_LEFT, y, right, y + _KEY_HEIGHT - 1]
      draw.rectangle(box, fill=_BLACK_KEY)
    if pitch % _OCTAVE == 0:
      line = y + _KEY_HEIGHT
      draw.line([_LEFT, line, right, line], fill=_LINE)
      name = f'C{pitch // _OCTAVE - 1}'
      draw.text((_LEFT - 6, line), name, fill=_INK, font=font, anchor='rm')


def _draw_seconds(
  draw: Any, font: Any, bottom: int, begin: float, row_seconds: float
) -> None:
  scale = (_WIDTH - _LEFT - _RIGHT) / row_seconds
  every = next(
    step
    for step in (1, 2, 5, 10, 30, 60, 300, 3600, 36000)
    if step * scale >= 70
  )
  first = math.ceil(begin / every) * every
  for second in np.arange(first, begin + row_seconds + 1e-9, every).tolist():
    x = _LEFT + round((second - begin) * scale)
    draw.line([x, bottom, x, bottom + 5], fill=_INK)
    if x < _WIDTH - 40:
      name = f'{int(second) // 60}:{int(second) % 60:02}'
      draw.text((x, bottom + 7), name, fill=_INK, font=font, anchor='mt')


def _draw_notes(
  draw: Any,
  notes: Notes,
  begin: float,
  row_seconds: float,
  top: int,
  highest: int,
) -> None:
  scale = (_WIDTH - _LEFT - _RIGHT) / row_seconds
  end = begin + row_seconds
  is_here_N = (notes.start_N < end) & (notes.end_N > begin)
  start_N = notes.start_N[is_here_N].clip(begin, end)
  end_N = notes.end_N[is_here_N].clip(begin, end)
  left_N = np.rint(_LEFT + (start_N - begin) * scale).astype(int)
  # A gap of a pixel shows where a key is struck again.
  right_N = np.rint(_LEFT + (end_N - begin) * scale).astype(int) - 2
  y_N = top + (highest - notes.pitch_N[is_here_N]) * _KEY_HEIGHT
  share_N1 = notes.velocity_N[is_here_N, None] / 127
  color_N3 = np.rint(_SOFT + (_LOUD - _SOFT) * share_N1).astype(int)
  for left, right, y, color in zip(
    left_N.tolist(),
    right_N.tolist(),
    y_N.tolist(),
    color_N3.tolist(),
    strict=True,
  ):
    box = [left, y, max(left + 1, right), y + _KEY_HEIGHT - 1]
    draw.rectangle(box, fill=tuple(color))


def _import_pillow():
  try:
    import PIL
    import PIL.Image
    import PIL.ImageDraw
    import PIL.ImageFont
  except ImportError as error:
    raise UserError(
      'piano rolls need the package pillow; install it with pip install '
      "'perceiver-ar[prepare]'"
    ) from error
  return PIL
