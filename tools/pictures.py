"""Finds pictures of any size in a folder, and cuts images of one size."""

import dataclasses
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encoded_parts
import image_files
import numpy as np
import source_files

from perceiver_ar.data import image
from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress

_SCALES = (1, 2, 4)  # tiles are cut from photographs reduced so many times
_SUFFIXES = frozenset(
  ('.png', '.jpg', '.jpeg', '.webp', '.bmp', '.ppm', '.tif', '.tiff')
)
# Of these suffixes. Pillow knows more, and hands some to other programs.
_FORMATS = ('PNG', 'JPEG', 'WEBP', 'BMP', 'PPM', 'TIFF')
_MODES = frozenset(('1', 'L', 'LA', 'P', 'PA', 'RGB', 'RGBA', 'CMYK', 'YCbCr'))


@dataclasses.dataclass(frozen=True)
class Cut:
  """How images are cut from pictures of any size.

  Attributes:
    size: of their sides.
    tiles: step from one tile to the next; None cuts one from the centre.
    held_out: see `source_files.divide`.
  """

  size: int
  tiles: int | None
  held_out: float | None


def find(folder: Path, how: Cut) -> image_files.Found:
  """The pictures below a folder, with their splits."""
  files = source_files.files_below(folder)
  names = [name for name in files if Path(name).suffix.lower() in _SUFFIXES]
  if not names:
    raise UserError(
      f'--input={folder} holds no pictures; give a folder with some '
      f'({" ".join(sorted(_SUFFIXES))})'
    )
  division = source_files.divide(
    {name: source_files.folder_split(name) for name in names},
    how.held_out,
    folder,
  )
  items: list[encoded_parts.Item] = []
  with Progress('look at', len(division.split_of), 'pictures') as bar:
    for name, split in division.split_of.items():
      items += _picture_items(folder, name, split, how)
      bar.advance(1)
  notes = division.notes(folder)
  if others := len(files) - len(names):
    notes.append(f'{others:,} files in {folder} are no pictures: ignored')
  return image_files.Found(items, '', tuple(notes))


def _picture_items(
  folder: Path, name: str, split: str, how: Cut
) -> Iterator[encoded_parts.Item]:
  path = folder / name
  stamp = source_files.stamp(path)
  if how.tiles is None:
    yield encoded_parts.Item(name, split, ('centre', str(path)), stamp)
    return
  try:
    width, height = _open(str(path)).size
  except UserError:
    width = height = 0
  if min(width, height) < how.size:
    # The encoder says by name what is wrong with it.
    yield encoded_parts.Item(name, split, ('tile', str(path), 1, 0, 0), stamp)
  for scale in _SCALES:
    for y in range(0, height // scale - how.size + 1, how.tiles):
      for x in range(0, width // scale - how.size + 1, how.tiles):
        yield encoded_parts.Item(
          f'{name} 1/{scale} {x},{y}',
          split,
          ('tile', str(path), scale, y, x),
          stamp,
        )


def centre(path: str, side: int) -> np.ndarray:
  """The largest square in the middle, reduced by a box filter."""
  picture = _load_picture(path)
  _check_size(picture, side)
  small = min(picture.size)
  left, top = (picture.width - small) // 2, (picture.height - small) // 2
  square = picture.crop((left, top, left + small, top + small))
  box = image.import_pillow().Resampling.BOX
  return np.array(square.resize((side, side), box))


def tile(path: str, scale: int, y: int, x: int, side: int) -> np.ndarray:
  pixels_HWC = _reduced(path, scale, side)
  return pixels_HWC[y : y + side, x : x + side]


@functools.lru_cache(maxsize=1)
def _reduced(path: str, scale: int, side: int) -> np.ndarray:
  picture = _load_picture(path)
  _check_size(picture, side)
  width, height = picture.width // scale, picture.height // scale
  whole = picture.crop((0, 0, width * scale, height * scale))
  return np.array(whole.reduce(scale))


def _check_size(picture: Any, side: int) -> None:
  if min(picture.size) < side:
    raise UserError(
      f'this has {picture.width}x{picture.height} pixels, fewer than '
      f'{side}x{side}; lower --size, or move it elsewhere'
    )


def _load_picture(path: str) -> Any:
  """In RGB; what is transparent becomes white."""
  pillow = image.import_pillow()
  picture = _open(path)
  with image.reading():
    if picture.mode not in _MODES:
      raise UserError(
        f'this is in mode {picture.mode}; convert it to 8 bit RGB'
      )
    if picture.has_transparency_data:
      picture = picture.convert('RGBA')
      white = pillow.new('RGBA', picture.size, 'white')
      picture = pillow.alpha_composite(white, picture)
    return picture.convert('RGB')


def _open(path: str) -> Any:
  """A picture as it is meant to be held; cameras may save it turned."""
  import PIL.ImageOps

  picture = image.open_image(image_files.read_bytes(path, 0, -1), _FORMATS)
  with image.reading():
    PIL.ImageOps.exif_transpose(picture, in_place=True)
  return picture
