"""Images as tokens: every sub-pixel is a byte, in the order of a raster."""

import contextlib
import hashlib
import io
import json
import re
import warnings
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from perceiver_ar.data import layouts
from perceiver_ar.data.tokens import EOS, NUM_RESERVED, PAD, SOS
from perceiver_ar.errors import UserError

_NUM_VALUES = 256
_CHANNELS = 3  # red, green, blue
# Sub-pixels that a byte of a file may become; nothing deflates further.
_MOST_PER_BYTE = 1100
_FREE = 2**24  # that any file may have
# Where nothing is drawn yet, in the manner of picture editors.
_BOARD = (96, 160)
_BOARD_FIELDS = 16  # along a side
_SHEET_SIDE = 160  # points of one image on a sheet, at most, if it is enlarged
_SHEET_GAP = 6


class ImageCodec:
  """Sub-pixels in the order of a raster layout (see `layouts`)."""

  kind = 'pixels'
  vocab_size = _NUM_VALUES + NUM_RESERVED
  forbidden: tuple[int, ...] = (PAD, EOS, SOS)  # an image ends where it is full
  suffix = '.png'
  file = ''
  model = b''

  def __init__(self, layout: dict[str, Any]):
    self.layout = layouts.validated(layout)
    if layout['kind'] != 'raster' or layout['channels'] != _CHANNELS:
      raise UserError(
        f'position layout {layout} is none of colour images, which is a raster '
        f'with {_CHANNELS} channels; prepare the data set again'
      )
    about = {'kind': self.kind, 'layout': self.layout}
    self.sha256 = hashlib.sha256(
      json.dumps(about, sort_keys=True).encode()
    ).hexdigest()

  @property
  def shape(self) -> tuple[int, int, int]:
    """Height, width and channels of the images."""
    return self.layout['height'], self.layout['width'], _CHANNELS

  def encode(self, pixels_HWC: np.ndarray) -> np.ndarray:
    """The tokens [T] int32 of an image; those of the raster, without SOS."""
    assert pixels_HWC.shape == self.shape and pixels_HWC.dtype == np.uint8
    order_T = layouts.raster_order(self.layout)
    return pixels_HWC.reshape(-1)[order_T].astype(np.int32) + NUM_RESERVED

  def decode(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, int]:
    """The image [H, W, C] uint8, and how many sub-pixels it lacks.

    Those are drawn as a checkerboard. Reserved ids are left out.
    """
    symbols_T, _ = self._symbols(ids)
    order_T = layouts.raster_order(self.layout)
    flat = self._board().reshape(-1)
    symbols_T = symbols_T[: len(order_T)]
    flat[order_T[: len(symbols_T)]] = symbols_T
    return flat.reshape(self.shape), len(order_T) - len(symbols_T)

  def read(self, data: bytes) -> np.ndarray:
    """The tokens of a PNG file of just this size.

    Raises:
      UserError: it is none, or is damaged.
    """
    height, width, _ = self.shape
    image = open_image(data, ('PNG',))
    if (image.size, image.mode) != ((width, height), 'RGB'):
      raise UserError(
        f'this is a PNG of {image.width}x{image.height} in mode {image.mode}; '
        f'it must be {width}x{height} in RGB'
      )
    with reading():
      pixels_HWC = np.array(image)
    return self.encode(pixels_HWC)

  def write(self, ids: Sequence[int] | np.ndarray) -> tuple[bytes, int]:
    """A PNG file; repairs are sub-pixels that are missing or too many."""
    pixels_HWC, num_missing = self.decode(ids)
    symbols_T, num_foreign = self._symbols(ids)
    num_surplus = max(0, len(symbols_T) - pixels_HWC.size)
    return png(pixels_HWC), num_missing + num_surplus + num_foreign

  def _symbols(self, ids: Sequence[int] | np.ndarray) -> tuple[np.ndarray, int]:
    """Bytes [T], and how many ids stand for nothing in this vocabulary."""
    ids_T = np.asarray(ids, np.int64)
    is_foreign_T = (ids_T < 0) | (ids_T >= self.vocab_size)
    known_T = ids_T[(ids_T >= NUM_RESERVED) & ~is_foreign_T]
    return (known_T - NUM_RESERVED).astype(np.uint8), int(is_foreign_T.sum())

  def _board(self) -> np.ndarray:
    height, width, channels = self.shape
    field = max(1, max(height, width) // _BOARD_FIELDS)
    is_light_HW = (
      np.arange(height)[:, None] // field + np.arange(width) // field
    ) % 2
    board_HW = np.array(_BOARD, np.uint8)[is_light_HW]
    return np.repeat(board_HW[:, :, None], channels, axis=2)


def png(pixels_HWC: np.ndarray) -> bytes:
  out = io.BytesIO()
  import_pillow().fromarray(pixels_HWC).save(out, 'PNG', optimize=True)
  return out.getvalue()


def grid_png(images: Sequence[np.ndarray], columns: int) -> bytes:
  """One PNG file of images [H, W, C] of one size, row by row, enlarged."""
  assert images and columns > 0
  height, width, channels = images[0].shape
  scale = max(1, _SHEET_SIDE // max(height, width))
  high, wide = scale * height + _SHEET_GAP, scale * width + _SHEET_GAP
  columns = min(columns, len(images))
  rows = -(-len(images) // columns)
  shape = rows * high + _SHEET_GAP, columns * wide + _SHEET_GAP, channels
  sheet_HWC = np.full(shape, 255, np.uint8)
  for at, pixels_HWC in enumerate(images):
    assert pixels_HWC.shape == images[0].shape
    y = at // columns * high + _SHEET_GAP
    x = at % columns * wide + _SHEET_GAP
    large_HWC = pixels_HWC.repeat(scale, axis=0).repeat(scale, axis=1)
    sheet_HWC[y : y + scale * height, x : x + scale * width] = large_HWC
  return png(sheet_HWC)


def import_pillow() -> Any:
  """Pillow's module Image."""
  try:
    import PIL.Image
  except ImportError as error:
    raise UserError(
      "images need Pillow, which is not installed; pip install 'perceiver-ar"
      "[prepare]'"
    ) from error
  return PIL.Image


def open_image(data: bytes, formats: Sequence[str]) -> Any:
  """A file as a Pillow image; pixels are not read before they are used.

  Raises:
    UserError: it is in none of these formats of Pillow's, or damaged, or has so
      many pixels that it may be made to fill the memory.
  """
  pillow = import_pillow()
  with reading(), warnings.catch_warnings():
    warnings.simplefilter('ignore')
    warnings.simplefilter('error', pillow.DecompressionBombWarning)
    image = pillow.open(io.BytesIO(data), formats=formats)
    width, height = image.size
    if width * height * _CHANNELS > max(_FREE, _MOST_PER_BYTE * len(data)):
      raise UserError(
        f'this is no readable image (its {len(data):,} bytes claim to be '
        f'{width}x{height} pixels)'
      )
    # Reading alone would not look at the checksums in a PNG.
    image.verify()
    return pillow.open(io.BytesIO(data), formats=formats)


@contextlib.contextmanager
def reading() -> Iterator[None]:
  """Makes a UserError of what Pillow raises: for a damaged file, anything."""
  try:
    yield
  except UserError:
    raise
  except Exception as error:
    # Without the address of an object, which differs from run to run.
    said = ' '.join(re.sub('<[^>]*>', '', str(error)).split())
    reason = said[:200] or type(error).__name__
    raise UserError(f'this is no readable image ({reason})') from error
