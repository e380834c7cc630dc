"""Where texts are: what finds them and what reads them agree on this.

A source is (how, size, ...) in plain values; `read` makes bytes of it.
"""

import contextlib
import dataclasses
import functools
import json
import struct
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import encoded_parts
import preparation
import source_files
import text_parquet

from perceiver_ar.errors import UserError

WHOLE = -1  # as the length of what is read of a file


@dataclasses.dataclass(frozen=True)
class Texts:
  """All the texts of an input.

  Attributes:
    items: in the order of the data set.
    variant: pg19, wikitext-103-raw, the same -partial, or ''.
    published: see `preparation.prepare`.
    per_part: items that are worth a part.
    ends_are_words: whether the end of a line counts as a word.
    notes: what was found, and what is odd about it, as sentences.
  """

  items: list[encoded_parts.Item]
  variant: str
  published: preparation.Published
  per_part: int
  ends_are_words: bool
  notes: list[str]


def size(source: Any) -> int:
  """How many bytes its text has, as far as that is known without reading."""
  return source[1]


def read(source: Any) -> bytes:
  """The bytes of a text; a UserError says why there are none."""
  how, _, *where = source
  readers = {
    'range': _read_range,
    'json': _read_json,
    'zip': _read_zip,
    'parquet': text_parquet.read,
  }
  return readers[how](*where)


def file_item(path: Path, name: str, split: str) -> encoded_parts.Item:
  try:
    num_bytes = path.stat().st_size
  except OSError:  # reading it will say why
    num_bytes = 0
  source = ('range', num_bytes, str(path), 0, WHOLE)
  return encoded_parts.Item(name, split, source, source_files.stamp(path))


def some(
  items: list[encoded_parts.Item], path: Path, what: str
) -> list[encoded_parts.Item]:
  if not items:
    raise UserError(f'--input={path} holds no {what}; check the folder')
  return items


def numbers(items: list[encoded_parts.Item]) -> str:
  splits = [item.split for item in items]
  return ', '.join(
    f'{splits.count(split):,} {split}'
    for split in source_files.SPLITS
    if split in splits
  )


def parquet(spans: list[text_parquet.Span]) -> Any:
  return ('parquet', sum(span.size for span in spans), spans)


def num_words(data: bytes, ends_are_words: bool) -> int:
  """What white space separates; and the ends of lines, if they are words."""
  if not ends_are_words:
    return len(data.decode().split())
  # Here nothing but ASCII separates, as where the published numbers are from.
  is_open = bool(data) and not data.endswith(b'\n')
  return len(data.split()) + data.count(b'\n') + is_open


@contextlib.contextmanager
def naming(path: Path | str) -> Iterator[None]:
  """Errors of reading a file, as sentences with its name."""
  try:
    yield
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror or error}); allow it with '
      'chmod, or move it elsewhere'
    ) from error
  except (
    zipfile.BadZipFile,
    zlib.error,
    EOFError,
    RuntimeError,
    NotImplementedError,
    UnicodeDecodeError,  # in names of members
    struct.error,
  ) as error:
    raise UserError(
      f'{path} cannot be unpacked ({error}); download it again'
    ) from error


@functools.lru_cache(1)
def _opened_member(path: str, member: str, stamp: str) -> Any:
  del stamp  # another file of that name is opened anew
  return zipfile.ZipFile(path).open(member)


def _read_range(path: str, at: int, length: int) -> bytes:
  with naming(path), open(path, 'rb') as file:
    file.seek(at)
    return file.read(length)


def _read_zip(path: str, member: str, at: int, length: int) -> bytes:
  with naming(path):
    # Going forwards in it is as cheap as reading it once.
    file = _opened_member(path, member, source_files.stamp(Path(path)))
    file.seek(at)
    return file.read(length)


def _read_json(path: str, at: int, length: int, key: str) -> bytes:
  line = _read_range(path, at, length)
  try:
    content = json.loads(line)
  except (ValueError, RecursionError) as error:
    raise UserError(f'it is not JSON ({error}); mend or remove it') from error
  if isinstance(content, dict):
    content = content.get(key)
  if not isinstance(content, str):
    raise UserError(
      f'it is neither a string nor an object with a string {key!r}; mend it, '
      'or name the key with --text_key'
    )
  try:
    return content.encode()
  except UnicodeEncodeError as error:
    raise UserError(
      f'its character {error.start} is half a surrogate pair; mend it'
    ) from error
