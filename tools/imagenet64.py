"""Finds ImageNet at 64x64 in what people have downloaded, and reads it.

Two editions are in use, and their pixels differ: that of van den Oord et al.
(2016) are PNG files in two tars, that of Chrabaszcz et al. (2017) batches of
arrays, pickled or as .npz.
"""

import dataclasses
import functools
import io
import os
import re
import tarfile
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from typing import Any, BinaryIO

import archives
import array_pickles
import encoded_parts
import image_files
import numpy as np
import preparation
import source_files

from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress

EDITIONS = OORD, CHRABASZCZ = 'imagenet64-oord', 'imagenet64-chrabaszcz'
_SIDE = 64
_NUM_PUBLISHED = {
  OORD: {'train': 1_281_149, 'validation': 49_999},
  CHRABASZCZ: {'train': 1_281_167, 'validation': 50_000},
}
_OORD_STEMS = {'train_64x64': 'train', 'valid_64x64': 'validation'}
_BATCH = re.compile(r'(train_data_batch_(?:10|[1-9])|val_data)(?:\.npz)?')
_BATCH_ZIP = re.compile(r'imagenet64_(train_part[12]|val)(_npz)?\.zip', re.I)
_MOST_BATCH_BYTES = 2**32  # published ones have 1.6 GB


def find(folder: Path) -> image_files.Found | None:
  """ImageNet64 of either edition, if that is in the folder.

  Raises:
    UserError: both are, or parts of one are there twice, or cannot be read.
  """
  oord, batches = _find_oord(folder), _find_batches(folder)
  if oord and batches:
    raise UserError(
      f"--input={folder} mixes two editions of ImageNet64, van den Oord's "
      f"({oord[0][1].name}) and Chrabaszcz's ({batches[0].name}), whose "
      'pixels differ; keep them in two folders'
    )
  if oord:
    items = [item for split, path in oord for item in _oord_items(split, path)]
    return _named(items, OORD)
  if batches:
    items = _batch_items(batches)
    return _named(items, CHRABASZCZ)
  return None


def _named(items: list[encoded_parts.Item], edition: str) -> image_files.Found:
  """Tells the edition, by name and by number, and whether it is complete."""
  numbers = dict.fromkeys(_NUM_PUBLISHED[edition], 0)
  for item in items:
    numbers[item.split] += 1
  for other, published in _NUM_PUBLISHED.items():
    for split, number in numbers.items():
      if other != edition and number == published[split]:
        raise UserError(
          f'the split {split} is named as that of {edition} and has as many '
          f'images, {number:,}, as that of {other}; name it after the edition '
          'that it is'
        )
  variant, note = source_files.name_variant(
    edition, numbers, _NUM_PUBLISHED[edition]
  )
  return image_files.Found(items, variant, (note,))


def _find_oord(folder: Path) -> list[tuple[str, Path]]:
  found = []
  for stem, split in _OORD_STEMS.items():
    tar, unpacked = folder / f'{stem}.tar', folder / stem
    if tar.is_file() and unpacked.is_dir():
      raise UserError(
        f'{tar} and {unpacked} are both there; move one of them elsewhere'
      )
    if tar.is_file() or unpacked.is_dir():
      found.append((split, tar if tar.is_file() else unpacked))
  return found


def _oord_items(split: str, path: Path) -> list[encoded_parts.Item]:
  """By name, so that a tar and its folder give the same data set."""
  members = _tar_members(path) if path.is_file() else _folder_members(path)
  items = [
    encoded_parts.Item(f'{split}/{name}', split, ('png', *place), stamp)
    for name, stamp, place in members
  ]
  return sorted(items, key=lambda item: item.name)


def _tar_members(path: Path) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
  where, stamp = str(path), preparation.stamp(path)
  megabytes = path.stat().st_size >> 20
  try:
    with (
      tarfile.open(path, 'r:') as tar,
      Progress(f'list {path.name}', megabytes, 'MiB') as bar,
    ):
      done = last = 0
      while (member := tar.next()) is not None:
        # There are more than a million, and it would keep them all.
        setattr(tar, 'members', [])  # noqa: B010
        if tar.offset <= last:  # as sizes below 0 have it, for ever
          raise tarfile.ReadError(f'{member.name!r} goes back')
        last = tar.offset
        _check_member(path, member)
        bar.advance((tar.offset >> 20) - done)
        done = tar.offset >> 20
        name = PurePosixPath(member.name).name
        if member.isreg() and _is_png(name):
          yield name, stamp, (where, member.offset_data, member.size)
      # A header that is cut or damaged looks like the end, to tarfile.
      block = image_files.read_bytes(where, tar.offset, tarfile.BLOCKSIZE)
      if block != bytes(tarfile.BLOCKSIZE):
        raise tarfile.ReadError('it has no end')
  except UserError:
    raise
  except Exception as error:  # of a damaged one, anything
    raise UserError(
      f'{path} is no readable tar ({error}); unpack it if it is compressed, '
      'or download it again'
    ) from error


def _check_member(path: Path, member: tarfile.TarInfo) -> None:
  source_files.check_members(path, [member.name])
  if not member.isdir() and (not member.isreg() or member.issparse()):
    raise UserError(
      f'{path} holds {member.name!r}, which is a link or no plain file; get it '
      'again where it is published'
    )


def _folder_members(path: Path) -> Iterator[tuple[str, str, tuple[Any, ...]]]:
  for name in source_files.files_below(path):
    file = path / name
    if _is_png(file.name):
      yield file.name, source_files.stamp(file), (str(file), 0, -1)


def _is_png(name: str) -> bool:
  return name.lower().endswith('.png') and not name.startswith('.')


@dataclasses.dataclass(frozen=True)
class _Batch:
  """A file of a batch, or a member of a zip."""

  name: str  # such as train_data_batch_1
  path: Path
  member: str  # '' for a file of its own

  @property
  def order(self) -> tuple[bool, int]:
    number = self.name.rpartition('_')[2]
    return not number.isdigit(), int(number) if number.isdigit() else 0

  @property
  def split(self) -> str:
    return 'train' if self.name.startswith('train') else 'validation'

  @property
  def place(self) -> str:
    return f'{self.path}/{self.member}' if self.member else str(self.path)


def _find_batches(folder: Path) -> list[_Batch]:
  found: dict[str, _Batch] = {}
  for name in source_files.files_below(folder):
    path = folder / name
    batches = []
    if matched := _BATCH.fullmatch(path.name):
      batches = [_Batch(matched[1], path, '')]
    elif _BATCH_ZIP.fullmatch(path.name):
      batches = _batches_in(path)
    for batch in batches:
      if batch.name in found:
        raise UserError(
          f'{batch.name} is there twice, as {found[batch.name].place} and '
          f'{batch.place}; move one of them elsewhere'
        )
      found[batch.name] = batch
  return sorted(found.values(), key=lambda batch: batch.order)


def _batches_in(path: Path) -> list[_Batch]:
  try:
    with zipfile.ZipFile(path) as file:
      archives.check_zip(path, file, path.stat().st_size)
      members = file.namelist()
  except UserError:
    raise
  except Exception as error:  # of a damaged one, anything
    raise UserError(
      f'{path} is no readable zip ({error}); download it again'
    ) from error
  batches = []
  for member in members:
    if matched := _BATCH.fullmatch(PurePosixPath(member).name):
      batches.append(_Batch(matched[1], path, member))
  return batches


def _batch_items(batches: list[_Batch]) -> list[encoded_parts.Item]:
  items: list[encoded_parts.Item] = []
  with Progress('check', len(batches), 'batches') as bar:
    for batch in batches:
      place = str(batch.path), batch.member
      stamp = preparation.stamp(batch.path)
      items += [
        encoded_parts.Item(
          f'{batch.name}/{row:06d}', batch.split, ('row', *place, row), stamp
        )
        for row in range(len(_load_batch(*place)))
      ]
      bar.advance(1)
  _load_batch.cache_clear()  # the workers need the memory
  return items


def read_row(path: str, member: str, row: int) -> np.ndarray:
  side = _SIDE
  pixels_CHW = _load_batch(path, member)[row].reshape(3, side, side)
  return pixels_CHW.transpose(1, 2, 0)


# One, because a batch has 1.6 GB; items come in its order.
@functools.lru_cache(maxsize=1)
def _load_batch(path: str, member: str) -> np.ndarray:
  """Images [N, C * H * W] uint8."""
  place = f'{path}/{member}' if member else path
  try:
    with _opened(path, member) as file:
      if (member or path).endswith('.npz'):
        with zipfile.ZipFile(file) as archive:
          size = file.seek(0, os.SEEK_END)
          archives.check_zip(Path(place), archive, size)
        file.seek(0)
        with np.load(file, allow_pickle=False) as arrays:
          data = arrays['data']
      else:
        data = array_pickles.load(file, encoding='latin1')['data']
  except UserError as error:
    said = str(error).removeprefix(f'{place} ')
    raise UserError(f'{place} {said}; download it again') from error
  except Exception as error:  # a damaged file raises anything
    reason = ' '.join(f'{type(error).__name__}: {error}'.split())[:200]
    raise UserError(
      f'{place} is no readable batch of images ({reason}); download it again'
    ) from error
  size = 3 * _SIDE**2
  shape, dtype = getattr(data, 'shape', ()), getattr(data, 'dtype', None)
  if dtype != np.uint8 or len(shape) != 2 or shape[1] != size:
    raise UserError(
      f'{place} has data of shape {shape} and type {dtype}, not (N, {size}) '
      'and uint8; give the 64x64 edition'
    )
  return np.asarray(data)


def _opened(path: str, member: str) -> BinaryIO:
  if not member:
    return open(path, 'rb')
  with zipfile.ZipFile(path) as file:
    if file.getinfo(member).file_size > _MOST_BATCH_BYTES:
      raise UserError('is larger than a published batch')
    return io.BytesIO(file.read(member))
