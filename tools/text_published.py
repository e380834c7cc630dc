"""Finds the texts of PG-19 and Wikitext-103, in every form they come in."""

import array
import collections
import re
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import archives
import encoded_parts
import preparation
import source_files
import text_parquet
import text_places

from perceiver_ar.errors import UserError

# What the published word perplexities are divided by, of complete splits.
_PG19_WORDS: preparation.Published = {
  'train': (28_602, {'words': 1_973_136_207}),
  'validation': (50, {'words': 3_007_061}),
  'test': (100, {'words': 6_966_499}),
}
# They count the end of a line as a word.
_WIKITEXT_WORDS: preparation.Published = {
  'train': (28_475, {'words': 103_227_021}),
  'validation': (60, {'words': 217_646}),
  'test': (60, {'words': 245_569}),
}
# Wikitext-2 has the same files, and its evaluation splits are the same, too.
_WIKITEXT2_WORDS = _WIKITEXT_WORDS | {'train': (600, {'words': 2_088_628})}
_WIKITEXT_FILES = {
  'train': 'wiki.train.raw',
  'validation': 'wiki.valid.raw',
  'test': 'wiki.test.raw',
}
_BOOK = re.compile(r'[0-9]+\.txt')


# PG-19


def split_folders(path: Path) -> list[str]:
  return [split for split in source_files.SPLITS if (path / split).is_dir()]


def is_pg19(path: Path) -> bool:
  """Whether a folder is, by its metadata.csv or by the names of its books."""
  splits = split_folders(path)
  if (path / 'metadata.csv').is_file():
    return bool(splits)
  if splits != list(source_files.SPLITS):
    return False
  names = [source_files.files_below(path / split) for split in splits]
  return all(names) and all(_BOOK.fullmatch(n) for some in names for n in some)


def pg19(path: Path) -> text_places.Texts:
  notes: list[str] = []
  if path.is_file() or not split_folders(path):
    items = _pg19_parquet(path)
  else:
    items = _pg19_folders(path)
    notes = _outside(path) + _against_metadata(path / 'metadata.csv', items)
  variant, about = source_files.name_variant(
    'pg19',
    collections.Counter(item.split for item in items),
    {split: number for split, (number, _) in _PG19_WORDS.items()},
  )
  found = f'{path}: PG-19, {text_places.numbers(items)} books'
  return text_places.Texts(
    items=items,
    variant=variant,
    published=_PG19_WORDS,
    per_part=16,
    ends_are_words=False,
    notes=[found, *notes, about],
  )


def _pg19_folders(path: Path) -> list[encoded_parts.Item]:
  items = []
  for split in split_folders(path):
    files = source_files.files_below(path / split)
    names = sorted(
      (name for name in files if name.endswith('.txt')),
      key=lambda name: (len(name), name),  # as numbers
    )
    items += [
      text_places.file_item(path / split / name, f'{split}/{name}', split)
      for name in names
    ]
  return text_places.some(
    items, path, '.txt files in train/, validation/ or test/'
  )


def _outside(path: Path) -> list[str]:
  others = [
    name
    for name in source_files.files_below(path)
    if name.split('/')[0] not in source_files.SPLITS and name != 'metadata.csv'
  ]
  return source_files.Division({}, len(others)).notes(path)


def _against_metadata(path: Path, items: list[encoded_parts.Item]) -> list[str]:
  """What only one of folders and metadata.csv knows, as sentences."""
  if not path.exists():
    return [
      f'{path} is missing: books are not checked; if this is not PG-19, give '
      '--format=folder'
    ]
  try:
    rows = path.read_bytes().decode(errors='replace').splitlines()
  except OSError as error:
    return [f'{path} cannot be read ({error.strerror}): titles are not checked']
  listed = {row.split(',')[0].strip() for row in rows if row.strip()}
  there = {Path(item.name).stem for item in items}
  notes = []
  if without_row := sorted(there - listed):
    notes.append(f'not in {path.name}: {_some_of(without_row)}')
  if without_file := sorted(listed - there):
    notes.append(f'in {path.name} only: {_some_of(without_file)}')
  return notes


def _some_of(names: list[str]) -> str:
  shown = ', '.join(names[:10])
  more = f' and {len(names) - 10:,} more' if len(names) > 10 else ''
  return f'{shown}{more}'


def _pg19_parquet(path: Path) -> list[encoded_parts.Item]:
  items = []
  for split, files in _by_split(path).items():
    found: list[encoded_parts.Item] = []
    for file in files:
      stamp = source_files.stamp(file)
      for url, span in text_parquet.books(file):
        # .../cache/epub/1234/pg1234.txt, .../ebooks/1234
        number = url.rstrip('/').rpartition('/')[2].removeprefix('pg')
        name = f'{split}/{number.removesuffix(".txt")}.txt'
        found.append(
          encoded_parts.Item(name, split, text_places.parquet([span]), stamp)
        )
    items += sorted(found, key=lambda item: (len(item.name), item.name))
  return text_places.some(items, path, 'books')


# Wikitext


def wikitext_folder(path: Path) -> Path | None:
  for folder in (path, path / 'wikitext-103-raw'):
    if (folder / _WIKITEXT_FILES['train']).is_file():
      return folder
  return None


def wikitext(path: Path) -> text_places.Texts:
  per_split = {}
  if path.is_file() and path.suffix == '.zip':
    per_split = _wikitext_zip(path)
  elif folder := wikitext_folder(path):
    per_split = _wikitext_files(folder)
  else:
    per_split = _wikitext_parquet(path)
  is_small = 'wikitext-2' in str(path.resolve()).lower()
  name = 'wikitext-2-raw' if is_small else 'wikitext-103-raw'
  published = dict(_WIKITEXT2_WORDS if is_small else _WIKITEXT_WORDS)
  items = []
  for split, (found, num_words) in per_split.items():
    items += found
    counts = published[split][1]
    # With all its words it is complete, into how many articles it is cut.
    if num_words == counts['words']:
      published[split] = (len(found), counts)
  text_places.some(items, path, 'articles')
  variant, about = source_files.name_variant(
    name,
    {split: len(found) for split, (found, _) in per_split.items()},
    {split: number for split, (number, _) in published.items()},
  )
  found = f'{path}: {name}, {text_places.numbers(items)} articles'
  return text_places.Texts(
    items=items,
    variant=variant,
    published=published,
    per_part=256,
    ends_are_words=True,
    notes=[found, about],
  )


Articles = tuple[list[encoded_parts.Item], int]  # and their words


def _wikitext_files(folder: Path) -> dict[str, Articles]:
  per_split = {}
  for split, name in _WIKITEXT_FILES.items():
    path = folder / name
    if not path.is_file():
      continue
    with text_places.naming(path), path.open('rb') as file:
      articles = _Articles(split, source_files.stamp(path))
      for line in file:
        articles.add(line)
    make = lambda at, length, path=path: (
      ('range', length, str(path), at, length)
    )
    per_split[split] = articles.items(make)
  return per_split


def _wikitext_zip(path: Path) -> dict[str, Articles]:
  per_split = {}
  with text_places.naming(path), zipfile.ZipFile(path) as archive:
    archives.check_zip(path, archive, path.stat().st_size)
    for split, name in _WIKITEXT_FILES.items():
      members = [
        member
        for member in archive.namelist()
        if member.rpartition('/')[2] == name
      ]
      if len(members) != 1:
        raise UserError(
          f'{path} has {len(members)} members {name}, and wikitext has one; '
          'give its zip as it was downloaded'
        )
      articles = _Articles(split, source_files.stamp(path))
      with archive.open(members[0]) as file:
        for line in file:
          articles.add(line)
      make = lambda at, length, member=members[0]: (
        ('zip', length, str(path), member, at, length)
      )
      per_split[split] = articles.items(make)
  return per_split


def _wikitext_parquet(path: Path) -> dict[str, Articles]:
  per_split = {}
  for split, files in _by_split(path).items():
    stamp = ' '.join(source_files.stamp(file) for file in files)
    articles = _Articles(split, stamp)
    groups: list[tuple[str, int, int]] = []
    lengths = array.array('i')
    for file in files:
      for group, lines in text_parquet.lines(file):
        groups.append((str(file), group, len(lines)))
        for line in lines:
          articles.add(line)
          lengths.append(len(line))
    per_split[split] = articles.items(_SpanMaker(groups, lengths))
  return per_split


class _SpanMaker:
  """Turns lengths in the joined rows into spans; asked in order."""

  def __init__(
    self, groups: list[tuple[str, int, int]], lengths: Iterable[int]
  ):
    self._rows = (
      (path, group, row)
      for path, group, num_rows in groups
      for row in range(num_rows)
    )
    self._lengths = iter(lengths)

  def __call__(self, at: int, length: int) -> Any:
    rows = []
    while length > 0:
      size = next(self._lengths)
      rows.append(text_parquet.Span(*next(self._rows), 1, size, True))
      length -= size
    return text_places.parquet(text_parquet.joined(rows))


class _Articles:
  """Cuts lines into articles, each with the blank line before its heading."""

  def __init__(self, split: str, stamp: str):
    self._split, self._stamp = split, stamp
    self._starts: list[int] = []
    self._titles: list[str] = []
    self._at = self._blank_at = 0
    self._after_blank = True
    self._num_words = 0

  def add(self, line: bytes) -> None:
    is_blank = not line.strip()
    is_heading = (
      line.startswith(b' = ')
      and line.endswith(b' = \n')
      and not line.startswith(b' = = ')
    )
    if is_heading and self._after_blank:
      # What comes before the first heading belongs to the first article.
      self._starts.append(self._blank_at if self._starts else 0)
      self._titles.append(line.decode(errors='replace')[3:-4].strip())
    if is_blank:
      self._blank_at = self._at
    self._after_blank = is_blank
    self._at += len(line)
    self._num_words += text_places.num_words(line, ends_are_words=True)

  def items(self, make: Callable[[int, int], Any]) -> Articles:
    """`make` turns offset and length into a source."""
    if self._at and not self._starts:
      self._starts, self._titles = [0], ['']
    ends = [*self._starts[1:], self._at]
    items = [
      encoded_parts.Item(
        name=f'{self._split}/{number:05d} {title}'.strip(),
        split=self._split,
        source=make(start, end - start),
        stamp=self._stamp,
      )
      for number, (title, start, end) in enumerate(
        zip(self._titles, self._starts, ends, strict=True)
      )
      if self._at
    ]
    return items, self._num_words


# Parquet mirrors


def parquet_files(path: Path) -> list[Path]:
  if path.is_file():
    return [path]
  files = sorted(
    path / name
    for name in source_files.files_below(path)
    if name.endswith('.parquet')
  )
  # A mirror of Wikitext holds its four sizes side by side.
  right = [file for file in files if 'wikitext-103-raw-v1' in file.parts]
  files = right or files
  if len({file.parent for file in files}) > 1:
    raise UserError(
      f'--input={path} holds .parquet files in more than one folder; give the '
      'one that is meant'
    )
  return files


def _by_split(path: Path) -> dict[str, list[Path]]:
  """Parquet files by what their names begin with."""
  per_split: dict[str, list[Path]] = {
    split: [] for split in source_files.SPLITS
  }
  for file in parquet_files(path):
    split = source_files.SPLIT_OF.get(file.name.split('-')[0].split('.')[0])
    if split is None:
      raise UserError(
        f'{file} does not say which split it is; its name must begin with '
        'train, validation or test'
      )
    per_split[split].append(file)
  return {split: files for split, files in per_split.items() if files}
