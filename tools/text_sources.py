"""Finds the texts in what people have downloaded.

Known are PG-19 and Wikitext-103 raw (see `text_published`), folders of .txt
files, and JSONL. What is found is where each text is, not the text.
"""

import dataclasses
import os
from pathlib import Path

import preparation
import text_parquet
import text_places
import text_published

from perceiver_ar.errors import UserError

FORMATS = ('auto', 'folder', 'pg19', 'wikitext', 'jsonl')


def find(
  path: Path, *, format: str, held_out: float, text_key: str
) -> text_places.Texts:
  """Lists the texts below a path.

  Args:
    path: a folder, or a file of one of the formats.
    format: one of FORMATS.
    held_out: share of the documents for validation where nobody has split.
    text_key: of JSONL, what the text of an object is called.
  """
  if not 0 < held_out < 1:
    raise UserError(
      f'--held_out={held_out} must lie between 0 and 1: the share of the '
      'documents that are not trained on'
    )
  if not path.exists():
    raise UserError(
      f'--input={path} is no folder, and no file either; check the name'
    )
  if format == 'auto':
    format = _recognised(path)
  if format == 'pg19':
    return text_published.pg19(path)
  if format == 'wikitext':
    return text_published.wikitext(path)
  if format == 'jsonl':
    return _jsonl(path, held_out, text_key)
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
  if (path / 'metadata.csv').is_file() and text_published.split_folders(path):
    return 'pg19'
  endings = {
    os.path.splitext(name)[1].lower() for name in text_places.files_below(path)
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


def _jsonl(path: Path, held_out: float, text_key: str) -> text_places.Texts:
  base = path.parent if path.is_file() else path
  files = [path]
  if path.is_dir():
    names = text_places.files_below(path)
    files = sorted(path / name for name in names if name.endswith('.jsonl'))
  items = []
  for file in files:
    items += _json_lines(file, file.relative_to(base).as_posix(), text_key)
  text_places.some(items, path, 'lines in .jsonl files')
  if len(files) == 1 or not all(item.split for item in items):
    items = _split_by_name(items, held_out, path)
  found = f'{path}: JSONL, {text_places.numbers(items)} documents'
  return text_places.Texts(items, '', {}, 1024, [found])


def _json_lines(file: Path, name: str, text_key: str) -> list[preparation.Item]:
  split = text_places.SPLIT_OF.get(file.stem, '')
  stamp = text_places.stamp(file)
  items, at = [], 0
  with text_places.naming(file), file.open('rb') as lines:
    for number, line in enumerate(lines, start=1):
      if line.strip():
        source = ('json', len(line), str(file), at, len(line), text_key)
        items.append(preparation.Item(f'{name}:{number}', split, source, stamp))
      at += len(line)
  return items


# Folders


def _folder(path: Path, held_out: float) -> text_places.Texts:
  if not path.is_dir():
    raise UserError(f'--input={path} is no folder; give one with .txt files')
  files = text_places.files_below(path)
  names = sorted(name for name in files if name.lower().endswith('.txt'))
  if not names:
    raise UserError(
      f'--input={path} holds no .txt file; give a folder of plain text files'
    )
  splits = [text_places.SPLIT_OF.get(name.split('/')[0], '') for name in names]
  items = [
    text_places.file_item(path / name, name, split)
    for name, split in zip(names, splits, strict=True)
  ]
  if not {'train', 'validation'} <= set(splits) or '' in splits:
    items = _split_by_name(items, held_out, path)
  notes = [f'{path}: {text_places.numbers(items)} .txt files']
  if ignored := len(files) - len(names):
    notes.append(f'{ignored} files in {path} are not .txt: ignored')
  return text_places.Texts(items, '', {}, 16, notes)


def _split_by_name(
  items: list[preparation.Item], held_out: float, path: Path
) -> list[preparation.Item]:
  if len(items) == 1:
    raise UserError(
      f'--input={path} holds one document, {items[0].name}, and one is held '
      'out; add another, or cut it in two'
    )
  held = preparation.held_out([item.name for item in items], held_out)
  return [
    dataclasses.replace(
      item, split='validation' if item.name in held else 'train'
    )
    for item in items
  ]
