"""Finds the texts in what people have downloaded.

Known are PG-19 and Wikitext-103 raw (see `text_published`), folders of .txt
files, and JSONL. What is found is where each text is, not the text.
"""

import dataclasses
import os
from pathlib import Path

import encoded_parts
import source_files
import text_parquet
import text_places
import text_published

from perceiver_ar.errors import UserError

_PUBLISHED = {'pg19': text_published.pg19, 'wikitext': text_published.wikitext}
FORMATS = ('auto', 'folder', 'pg19', 'wikitext', 'jsonl')


def find(
  path: Path, *, format: str, held_out: float | None, text_key: str | None
) -> text_places.Texts:
  """Lists the texts below a path.

  Args:
    path: a folder, or a file of one of the formats.
    format: one of FORMATS.
    held_out: see `source_files.divide`.
    text_key: of JSONL, what the text of an object is called; None if the user
      has not said.
  """
  if not path.exists():
    raise UserError(
      f'--input={path} is no folder, and no file either; check the name'
    )
  if format == 'auto':
    format = _recognised(path)
  if format == 'jsonl':
    return _jsonl(path, held_out, 'text' if text_key is None else text_key)
  if text_key is not None:
    raise UserError(
      f'--text_key={text_key} is of JSONL, and --input={path} is none; leave '
      'it out'
    )
  if format in _PUBLISHED:
    source_files.refuse_held_out(held_out, path)
    return _PUBLISHED[format](path)
  return _folder(path, held_out)


def _recognised(path: Path) -> str:
  if path.is_file():
    if path.suffix == '.zip':
      return 'wikitext'
    if path.suffix in ('.jsonl', '.parquet'):
      return 'jsonl' if path.suffix == '.jsonl' else _parquet_format([path])
    raise UserError(
      f'--input={path} is no folder; give one with texts, or a .jsonl, '
      '.parquet or .zip file'
    )
  if text_published.wikitext_folder(path):
    return 'wikitext'
  if text_published.is_pg19(path):
    return 'pg19'
  endings = {
    os.path.splitext(name)[1].lower() for name in source_files.files_below(path)
  }
  if '.txt' not in endings:
    if '.parquet' in endings:
      return _parquet_format(text_published.parquet_files(path))
    if '.jsonl' in endings:
      return 'jsonl'
  return 'folder'


def _parquet_format(files: list[Path]) -> str:
  columns = text_parquet.columns(files[0])
  if {'text', 'url'} <= columns:
    return 'pg19'
  if columns == {'text'}:
    return 'wikitext'
  raise UserError(
    f'{files[0]} has the columns {", ".join(sorted(columns))}, which is '
    'neither PG-19 (text, url, ...) nor Wikitext (text); write its texts to '
    'a .jsonl file'
  )


# JSONL


def _named_split(name: str) -> str:
  """By its folder, or by its own name, such as train.jsonl."""
  stem = Path(name).stem.lower()
  return source_files.folder_split(name) or source_files.SPLIT_OF.get(stem, '')


def _jsonl(
  path: Path, held_out: float | None, text_key: str
) -> text_places.Texts:
  if path.is_file():
    base, named = path.parent, {path.name: ''}
  else:
    base, files = path, source_files.files_below(path)
    named = {n: _named_split(n) for n in files if n.endswith('.jsonl')}
  items = []
  for name, split in named.items():
    items += _json_lines(base / name, name, split, text_key)
  text_places.some(items, path, 'lines in .jsonl files')
  items, division = _divided(items, held_out, path)
  found = f'{path}: JSONL, {text_places.numbers(items)} documents'
  if division.num_outside:
    outside = sum(not split for split in named.values())
    division = division._replace(num_outside=outside)
  return _plain_texts(items, 1024, [found, *division.notes(path)])


def _json_lines(
  file: Path, name: str, split: str, text_key: str
) -> list[encoded_parts.Item]:
  stamp = source_files.stamp(file)
  items, at = [], 0
  with text_places.naming(file), file.open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        source = ('json', len(line), str(file), at, len(line), text_key)
        items.append(
          encoded_parts.Item(f'{name}:{number}', split, source, stamp)
        )
      at += len(line)
  return items


# Folders


def _folder(path: Path, held_out: float | None) -> text_places.Texts:
  if not path.is_dir():
    raise UserError(f'--input={path} is no folder; give one with .txt files')
  files = source_files.files_below(path)
  names = [name for name in files if name.lower().endswith('.txt')]
  if not names:
    raise UserError(
      f'--input={path} holds no .txt file; give a folder of plain text files'
    )
  items = [
    text_places.file_item(path / name, name, source_files.folder_split(name))
    for name in names
  ]
  items, division = _divided(items, held_out, path)
  notes = [f'{path}: {text_places.numbers(items)} .txt files']
  notes += division.notes(path)
  if others := len(files) - len(names):
    notes.append(f'{others:,} files in {path} are not .txt: ignored')
  return _plain_texts(items, 16, notes)


def _divided(
  items: list[encoded_parts.Item], held_out: float | None, path: Path
) -> tuple[list[encoded_parts.Item], source_files.Division]:
  """The items with their final splits, without those that have none."""
  named = {item.name: item.split for item in items}
  division = source_files.divide(named, held_out, path)
  return [
    dataclasses.replace(item, split=division.split_of[item.name])
    for item in items
    if item.name in division.split_of
  ], division


def _plain_texts(
  items: list[encoded_parts.Item], per_part: int, notes: list[str]
) -> text_places.Texts:
  return text_places.Texts(
    items=items,
    variant='',
    published={},
    per_part=per_part,
    ends_are_words=False,
    notes=notes,
  )
