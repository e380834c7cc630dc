"""Where performances lie: MAESTRO or any MIDI files, in a folder or a zip.

Nothing is unpacked: members of a zip are read where they are, a bounded number
of bytes at a time.
"""

import collections
import csv
import dataclasses
import functools
import io
import json
import re
import zipfile
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Any

import archives
import preparation
import source_files

from perceiver_ar.data import midi
from perceiver_ar.errors import UserError

_SUFFIXES = ('.mid', '.midi')
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
  """Which files are in which split.

  Attributes:
    place: where the files are.
    variant: the edition; with -partial, less or more than that; or ''.
    split_of: by the file's name in its place.
    folder: what these names begin with, and those of documents do not.
    notes: what is odd, as sentences for the user.
  """

  place: Place
  variant: str
  split_of: dict[str, str]
  folder: str
  notes: list[str]


def find(path: Path, held_out: float | None) -> Performances:
  """MAESTRO if its list is there, else all MIDI files.

  Args:
    path: a folder or a zip file.
    held_out: see `source_files.divide`.
  """
  place = _open(path)
  lists = sorted(
    (name.count('/'), name)  # the list beside the files, not a copy below
    for name in place.names
    if _LIST.fullmatch(PurePosixPath(name).name)
  )
  if lists:
    source_files.refuse_held_out(held_out, path)
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
  except Exception as error:  # of a damaged or encrypted one, anything
    raise UserError(
      f'it cannot be read from the zip file ({error}); get it again'
    ) from error


@functools.lru_cache(1)
def _opened_zip(path: str) -> zipfile.ZipFile:
  return zipfile.ZipFile(path)


def _open(path: Path) -> Place:
  if path.is_dir():
    return Place(path, False, frozenset(source_files.files_below(path)))
  if not path.is_file():
    raise UserError(
      f'--input={path} is not there; give a folder with MIDI files, or a zip '
      'of one'
    )
  try:
    with zipfile.ZipFile(path) as file:
      archives.check_zip(path, file, path.stat().st_size)
      names = [info.filename for info in file.infolist() if not info.is_dir()]
  except UserError:
    raise
  except Exception as error:  # of a damaged one, anything
    raise UserError(
      f'--input={path} is no zip file ({error}); give a folder with MIDI '
      'files, or a zip of one'
    ) from error
  return Place(path, True, frozenset(names))


def _is_midi(name: str) -> bool:
  # Archives of some systems have a ._ file beside every file.
  path = PurePosixPath(name)
  is_hidden = any(part.startswith('.') for part in path.parts)
  return path.suffix.lower() in _SUFFIXES and not is_hidden


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
  if variant in _PUBLISHED:
    variant, note = source_files.name_variant(
      variant,
      collections.Counter(split_of.values()),
      dict(zip(source_files.SPLITS, _PUBLISHED[variant], strict=True)),
    )
    notes.append(note)
  return Performances(place, variant, split_of, folder, notes)


def _splits(
  name: str, content: bytes, parse: Callable[[str], list[tuple[Any, Any]]]
) -> dict[str, str]:
  try:
    rows = parse(content.decode())
  except (
    ValueError,
    LookupError,
    AttributeError,
    TypeError,
    RecursionError,
    csv.Error,
  ) as error:
    raise UserError(
      f'{name} is not the list of a MAESTRO edition ({error}); it must have '
      'the columns split and midi_filename'
    ) from error
  split_of: dict[str, str] = {}
  for file, split in rows:
    if split not in source_files.SPLITS:
      raise UserError(
        f'{name} says that {file} is of the split {split!r}; it must be one of '
        f'{", ".join(source_files.SPLITS)}'
      )
    parts = file.split('/') if isinstance(file, str) else ['']
    if not parts[0] or '..' in parts or {'\\', '\0'} & set(file):
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


def _folder(place: Place, held_out: float | None) -> Performances:
  names = sorted(filter(_is_midi, place.names))
  if not names:
    raise UserError(
      f'--input={place.path} holds no .mid or .midi file; give a folder with '
      'MIDI files, or a zip of one'
    )
  # A zip file is one of a folder: splits and names are those of the folder.
  folder = _wrapper(names) if place.is_zip else ''
  inside = [name.removeprefix(folder) for name in names]
  division = source_files.divide(
    {name: source_files.folder_split(name) for name in inside},
    held_out,
    place.path,
  )
  split_of = {folder + name: s for name, s in division.split_of.items()}
  notes = division.notes(place.path)
  if others := len(place.names) - len(names):
    notes.append(f'{others:,} files in {place.path} are not MIDI: ignored')
  return Performances(place, '', split_of, folder, notes)


def _wrapper(names: list[str]) -> str:
  """The folder that all files are in, unless that is a split; or ''."""
  tops = {name[: name.find('/') + 1] for name in names}
  if len(tops) > 1 or source_files.folder_split(names[0]):
    return ''
  return tops.pop()


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
