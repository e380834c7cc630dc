"""Where performances lie: MAESTRO or any MIDI files, in a folder or a zip.

Nothing is unpacked: members of a zip are read where they are, a bounded number
of bytes at a time.
"""

import csv
import dataclasses
import functools
import io
import json
import os
import re
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import preparation

from perceiver_ar.data import midi
from perceiver_ar.errors import UserError

_SUFFIXES = ('.mid', '.midi')
_SPLITS = ('train', 'validation', 'test')
_LIST = re.compile(r'(maestro-[^/]+)\.(csv|json)', re.IGNORECASE)
_MAX_LIST_BYTES = 64 * 2**20
# Performances in the splits of each edition.
_PUBLISHED = {
  'maestro-v1.0.0': (954, 105, 125),
  'maestro-v2.0.0': (967, 137, 178),
  'maestro-v3.0.0': (962, 137, 177),
}


@dataclasses.dataclass(frozen=True)
class Place:
  """A folder or a zip file: its files' names, with / between the parts."""

  path: Path
  is_zip: bool
  names: frozenset[str]

  def read(self, name: str, limit: int) -> bytes:
    return read(self.source(name), limit)

  def source(self, name: str) -> list[str]:
    """What `read` needs, plain enough for JSON."""
    return [str(self.path), name, 'zip' if self.is_zip else 'folder']

  def stamp(self, name: str) -> str:
    if self.is_zip:
      return preparation.stamp(self.path)
    try:
      return preparation.stamp(self.path / name)
    except OSError:
      return 'missing'


@dataclasses.dataclass(frozen=True)
class Performances:
  """Which files are in which split; `notes` are sentences for the user."""

  place: Place
  variant: str
  split_of: dict[str, str]  # by the file's name in its place
  folder: str  # what these names begin with and documents' do not
  notes: list[str]


def find(path: Path, held_out: float) -> Performances:
  """MAESTRO if its list is there, else all MIDI files."""
  place = _open(path)
  lists = sorted(
    (name.count('/'), name)  # the list beside the files, not a copy below
    for name in place.names
    if _LIST.fullmatch(PurePosixPath(name).name)
  )
  if lists:
    return _maestro(place, lists[0][1])
  return _folder(place, held_out)


def read(source: list[str], limit: int) -> bytes:
  """A file's bytes, and one more than `limit` of them at most."""
  path, name, kind = source
  try:
    if kind == 'folder':
      with (Path(path) / name).open('rb') as file:
        return file.read(limit + 1)
    with _opened_zip(path).open(name) as file:
      return file.read(limit + 1)
  except OSError as error:
    raise UserError(
      f'it cannot be read ({error.strerror or error}); get it again'
    ) from error
  except KeyError as error:
    raise UserError('it is not in the zip file; get it again') from error
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    NotImplementedError,
    RuntimeError,  # encrypted
  ) as error:
    raise UserError(
      f'it cannot be read from the zip file ({error}); get it again'
    ) from error


@functools.lru_cache(1)
def _opened_zip(path: str) -> zipfile.ZipFile:
  return zipfile.ZipFile(path)


def _open(path: Path) -> Place:
  if path.is_dir():
    return Place(path, False, frozenset(_files_below(path)))
  if not path.is_file():
    raise UserError(
      f'--input={path} is not there; give a folder with MIDI files, or a zip '
      'of one'
    )
  try:
    with zipfile.ZipFile(path) as file:
      names = [info.filename for info in file.infolist() if not info.is_dir()]
  except (zipfile.BadZipFile, NotImplementedError, ValueError) as error:
    raise UserError(
      f'--input={path} is no zip file ({error}); give a folder with MIDI '
      'files, or a zip of one'
    ) from error
  for name in names:
    parts = name.replace('\\', '/').split('/')
    if '..' in parts or not parts[0] or ':' in parts[0]:
      raise UserError(
        f'--input={path} has a member that leaves its folder, {name!r}; do not '
        'trust this file, and get it again where it is published'
      )
  return Place(path, True, frozenset(names))


def _files_below(folder: Path) -> list[str]:
  def refuse(error: OSError) -> None:
    raise UserError(
      f'{error.filename} cannot be read ({error.strerror}); allow it with '
      'chmod, or move it elsewhere'
    ) from error

  return [
    (Path(parent) / name).relative_to(folder).as_posix()
    for parent, _, names in os.walk(folder, onerror=refuse)
    for name in names
  ]


def _is_midi(name: str) -> bool:
  # Archives of some systems have a ._ file beside every file.
  path = PurePosixPath(name)
  return path.suffix.lower() in _SUFFIXES and not path.name.startswith('._')


def _maestro(place: Place, name: str) -> Performances:
  folder = '' if '/' not in name else name.rpartition('/')[0] + '/'
  variant, suffix = PurePosixPath(name).stem.lower(), PurePosixPath(name).suffix
  content = place.read(name, _MAX_LIST_BYTES)
  parse = _csv_rows if suffix.lower() == '.csv' else _json_rows
  split_of = _splits(name, content, parse)
  split_of = {folder + file: split for file, split in split_of.items()}
  notes = []
  others = sum(map(_is_midi, place.names - split_of.keys()))
  if others:
    notes.append(f'{others} MIDI files are not in {name}: ignored')
  published = _PUBLISHED.get(variant)
  ours = tuple(list(split_of.values()).count(split) for split in _SPLITS)
  if published and ours != published:
    notes.append(
      f'{name} lists {" / ".join(map(str, ours))} performances and {variant} '
      f'has {" / ".join(map(str, published))}: results on it are not '
      'comparable, so it is called partial'
    )
    variant += '-partial'
  return Performances(place, variant, split_of, folder, notes)


def _splits(
  name: str, content: bytes, parse: Callable[[str], list[tuple[Any, Any]]]
) -> dict[str, str]:
  try:
    rows = parse(content.decode())
  except (ValueError, KeyError, AttributeError, TypeError, csv.Error) as error:
    raise UserError(
      f'{name} is not the list of a MAESTRO edition ({error}); it must have '
      'the columns split and midi_filename'
    ) from error
  split_of: dict[str, str] = {}
  for file, split in rows:
    if split not in _SPLITS:
      raise UserError(
        f'{name} says that {file} is of the split {split!r}; it must be one of '
        f'{", ".join(_SPLITS)}'
      )
    parts = str(file).split('/')
    if not file or '..' in parts or not parts[0] or '\\' in str(file):
      raise UserError(
        f'{name} lists {file!r}, which is no file beside it; get it again'
      )
    if file in split_of:
      raise UserError(f'{name} lists {file} twice; get it again')
    split_of[file] = split
  if not split_of:
    raise UserError(f'{name} lists no performances; get it again')
  return split_of


def _csv_rows(content: str) -> list[tuple[Any, Any]]:
  rows = csv.DictReader(io.StringIO(content.removeprefix('\ufeff')))
  return [(row['midi_filename'], row['split']) for row in rows]


def _json_rows(content: str) -> list[tuple[Any, Any]]:
  """A list of objects in the first editions, columns in the third."""
  about = json.loads(content)
  if isinstance(about, list):
    return [(row['midi_filename'], row['split']) for row in about]
  files, splits = about['midi_filename'], about['split']
  return [(files[key], splits[key]) for key in files]


def _folder(place: Place, held_out: float) -> Performances:
  names = sorted(filter(_is_midi, place.names))
  if not names:
    raise UserError(
      f'--input={place.path} holds no .mid or .midi file; give a folder with '
      'MIDI files, or a zip of one'
    )
  if len(names) == 1:
    raise UserError(
      f'--input={place.path} holds one performance, {names[0]}, and one is '
      'held out; add another'
    )
  held = preparation.held_out(names, held_out)
  split_of = {name: 'validation' if name in held else 'train' for name in names}
  notes = []
  if others := len(place.names) - len(names):
    notes.append(f'{others} files in {place.path} are not MIDI: ignored')
  return Performances(place, '', split_of, '', notes)


def read_notes(path: str, name: str, kind: str, stamp: str) -> midi.Notes:
  """One file's notes, kept for its other variants; `stamp` is of the file."""
  notes = _parsed(path, name, kind, stamp)
  if isinstance(notes, str):
    raise UserError(notes)
  return notes


@functools.lru_cache(1)
def _parsed(path: str, name: str, kind: str, stamp: str) -> midi.Notes | str:
  """The notes, or what is wrong, which is not found out again either."""
  del stamp
  try:
    return midi.read(read([path, name, kind], midi.MAX_BYTES))
  except UserError as error:
    return str(error)
