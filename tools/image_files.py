"""What reading images has in common: files below a folder, and their bytes."""

import dataclasses
import os
from pathlib import Path

import preparation

from perceiver_ar.errors import UserError


@dataclasses.dataclass(frozen=True)
class Found:
  """Images, which published set they are ('' if none), and what to say."""

  items: list[preparation.Item]
  variant: str
  notes: tuple[str, ...]


def files_below(folder: Path) -> list[str]:
  """Names of all files, relative to the folder, sorted; no hidden ones."""

  def refuse(error: OSError) -> None:
    raise UserError(
      f'{error.filename} cannot be read ({error.strerror}); allow it with '
      'chmod, or move it elsewhere'
    ) from error

  if not folder.is_dir():
    raise UserError(f'--input={folder} is no folder; give one with images')
  return sorted(
    (Path(parent) / name).relative_to(folder).as_posix()
    for parent, _, names in os.walk(folder, onerror=refuse)
    for name in names
    if not name.startswith('.')
  )


def stamp(path: Path) -> str:
  try:
    return preparation.stamp(path)
  except OSError:
    return ''  # a link to nowhere; the encoder says so by name


def read_bytes(path: str, offset: int, size: int) -> bytes:
  try:
    with open(path, 'rb') as file:
      file.seek(offset)
      return file.read(size)
  except OSError as error:
    raise UserError(
      f'this cannot be read ({error.strerror}); restore it'
    ) from error
