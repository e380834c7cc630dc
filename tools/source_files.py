"""What finding texts, music and images has in common: files and splits.

The splits are the same everywhere. If there is a folder train/, the folders
train/, validation/ (or valid/, val/, dev/) and test/ are the splits, and
nothing else is read. Documents for validation come out of train/ if they have
no folder of their own, and out of everything if there is no train/ either.
"""

import os
import stat as file_mode
from collections.abc import Iterable, Mapping
from pathlib import Path, PureWindowsPath
from typing import NamedTuple

import preparation

from perceiver_ar.errors import UserError

SPLITS = ('train', 'validation', 'test')
SPLIT_OF = {name: name for name in SPLITS} | {
  'valid': 'validation',
  'val': 'validation',
  'dev': 'validation',
}
HELD_OUT = 0.05  # of the documents, where the user has not said
PARTIAL = '-partial'  # ends the name of a published set that is not all there


class Division(NamedTuple):
  """The split of every name that has one, and how many have none."""

  split_of: dict[str, str]
  num_outside: int

  def notes(self, path: Path) -> list[str]:
    if not self.num_outside:
      return []
    return [
      f'{self.num_outside:,} files in {path} are not in the folders of the '
      'splits: ignored'
    ]


def files_below(folder: Path) -> list[str]:
  """Names of all files, relative to the folder, with / between the parts.

  They are sorted. What is hidden, a name that begins with a dot, is left out.
  Links are followed to files, which may be on another disk, not to folders.

  Raises:
    UserError: one cannot be read, or is a pipe or a device: reading that may
      never end.
  """

  def refuse(error: OSError) -> None:
    raise UserError(
      f'{error.filename} cannot be read ({error.strerror}); allow it with '
      'chmod, or move it elsewhere'
    ) from error

  found = []
  for parent, folders, names in os.walk(folder, onerror=refuse):
    folders[:] = [name for name in folders if not name.startswith('.')]
    below = Path(parent).relative_to(folder)
    names = [name for name in names if not name.startswith('.')]
    for name in names:
      _check_plain(Path(parent) / name)
    found += [(below / name).as_posix() for name in names]
  return sorted(found)


def _check_plain(path: Path) -> None:
  try:
    mode = path.stat().st_mode
  except OSError:  # reading it will say why
    return
  if not file_mode.S_ISREG(mode):
    raise UserError(
      f'{path} is a pipe, a socket or a device, and no file; move it elsewhere'
    )


def stamp(path: Path) -> str:
  """As that of preparation; '' for a link to nowhere: reading it says so."""
  try:
    return preparation.stamp(path)
  except OSError:
    return ''


def folder_split(name: str) -> str:
  """The split that the first folder of a relative name stands for, or ''."""
  top, slash, _ = name.partition('/')
  return SPLIT_OF.get(top.lower(), '') if slash else ''


def divide(
  named: Mapping[str, str], held_out: float | None, path: Path
) -> Division:
  """Gives every document its split.

  Args:
    named: by name, the split that its place stands for (see `folder_split`),
      or ''.
    held_out: share of the documents that is validation, if it is not named;
      None if the user has not said.
    path: the input, for messages.
  """
  if held_out is not None and not 0 < held_out < 1:
    raise UserError(
      f'--held_out={held_out} must lie between 0 and 1: the share of what is '
      'not trained on'
    )
  present = set(named.values()) - {''}
  if present and 'train' not in present:
    raise UserError(
      f'--input={path} has the split {" and ".join(sorted(present))} and no '
      'train; call the rest train, or rename what is no split'
    )
  split_of = {name: split for name, split in named.items() if split}
  if not present:
    split_of = dict.fromkeys(named, 'train')
  if 'validation' in present:
    refuse_held_out(held_out, path)
  else:
    train = [name for name, split in split_of.items() if split == 'train']
    held = _held_out(train, HELD_OUT if held_out is None else held_out, path)
    split_of |= dict.fromkeys(held, 'validation')
  return Division(split_of, len(named) - len(split_of))


def _held_out(names: list[str], share: float, path: Path) -> set[str]:
  if len(names) < 2:
    raise UserError(
      f'--input={path} holds one document to train on, {"".join(names)}, and '
      'one is held out; add another'
    )
  return preparation.held_out(names, share)


def refuse_held_out(held_out: float | None, path: Path) -> None:
  if held_out is not None:
    raise UserError(
      f'--held_out={held_out} is for inputs without splits of their own, and '
      f'--input={path} has them; leave it out'
    )


def name_variant(
  variant: str, found: Mapping[str, int], published: Mapping[str, int]
) -> tuple[str, str]:
  """What a published set is called if this is found of it, and a sentence.

  It has its plain name if every split that is there is complete.

  Args:
    variant: the plain name.
    found: items of each split.
    published: the same, as published.
  """
  there = {split: number for split, number in found.items() if number}
  said = ', '.join(
    f'{number:,} of {published[split]:,} in {split}'
    for split, number in there.items()
  )
  if all(number == published[split] for split, number in there.items()):
    return variant, f'this is {variant} ({said})'
  return f'{variant}{PARTIAL}', (
    f'this is a part of {variant} ({said}): published results are of all of it'
  )


def check_members(path: Path, names: Iterable[str]) -> None:
  """Refuses an archive with a member that would lie outside its folder."""
  for name in names:
    # It knows what leads away anywhere: both slashes, and letters of drives.
    pure = PureWindowsPath(name)
    if not name or pure.anchor or '..' in pure.parts:
      raise UserError(
        f'{path} has a member that leaves its folder, {name!r}; do not trust '
        'this file, and get it again where it is published'
      )
