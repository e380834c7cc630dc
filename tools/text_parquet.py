"""Texts in parquet files, as the mirrors of PG-19 and Wikitext have them."""

import contextlib
import functools
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

from perceiver_ar.errors import UserError

_ROWS = 64  # decoded together: books are half a megabyte each


class Span(NamedTuple):
  """Neighbouring rows of a row group."""

  path: str
  group: int
  start: int
  count: int
  size: int  # in bytes of text, roughly
  is_lines: bool  # rows are lines whose end may have been taken off


def columns(path: Path) -> set[str]:
  with _naming(path):
    return set(_parquet().ParquetFile(path).schema_arrow.names)


def books(path: Path) -> Iterator[tuple[str, Span]]:
  """The url and the place of every text; texts are not read."""
  with _naming(path):
    file = _parquet().ParquetFile(path)
    for group in range(file.num_row_groups):
      about = file.metadata.row_group(group)
      urls = file.read_row_group(group, columns=['url'])['url'].to_pylist()
      size = _text_size(about) // max(len(urls), 1)
      for row, url in enumerate(urls):
        yield str(url), Span(str(path), group, row, 1, size, False)


def lines(path: Path) -> Iterator[tuple[int, list[bytes]]]:
  """Every row group, its rows as lines of the file that they came from."""
  with _naming(path):
    file = _parquet().ParquetFile(path)
    for group in range(file.num_row_groups):
      rows = file.read_row_group(group, columns=['text'])['text']
      yield group, [_line(text) for text in rows.to_pylist()]


def joined(rows: list[Span]) -> list[Span]:
  """The same rows in as few spans as possible."""
  spans: list[Span] = []
  for row in rows:
    last = spans[-1] if spans else None
    if last and (last.path, last.group) == (row.path, row.group):
      spans[-1] = last._replace(
        count=last.count + row.count, size=last.size + row.size
      )
    else:
      spans.append(row)
  return spans


def read(spans: list[Any]) -> bytes:
  parts = []
  for span in map(Span._make, spans):
    with _naming(span.path):
      changed = Path(span.path).stat().st_mtime_ns
      opened = _opened(span.path, span.group, changed)
      rows = opened.read(span.start, span.count)
    if span.is_lines:
      parts += [_line(text) for text in rows]
    else:
      parts += [_text(text).encode() for text in rows]
  return b''.join(parts)


class _Rows:
  """The texts of a row group, for reading forwards: it is not held whole."""

  def __init__(self, path: str, group: int):
    # Its pages are read as they are needed, too.
    self._file = _parquet().ParquetFile(
      path, pre_buffer=False, buffer_size=1 << 20
    )
    self._group = group
    self._rewind()

  def _rewind(self) -> None:
    self._batches = self._file.iter_batches(
      _ROWS, row_groups=[self._group], columns=['text']
    )
    self._batch: list[str | None] = []
    self._first = 0

  def read(self, start: int, count: int) -> list[str | None]:
    if start < self._first:
      self._rewind()
    rows: list[str | None] = []
    while len(rows) < count:
      at = start + len(rows) - self._first
      if at < len(self._batch):
        rows += self._batch[at : at + count - len(rows)]
      else:
        self._first += len(self._batch)
        self._batch = next(self._batches)['text'].to_pylist()
    return rows


@functools.lru_cache(1)
def _opened(path: str, group: int, changed: int) -> _Rows:
  del changed  # another file of that name is opened anew
  return _Rows(path, group)


def _text(text: str | None) -> str:
  if text is None:
    raise UserError('its row has no text; mend or remove it')
  return text


def _line(text: str | None) -> bytes:
  # The mirrors have '' for what is a blank between line ends in the file.
  line = _text(text) or ' '
  return (line if line.endswith('\n') else f'{line}\n').encode()


def _text_size(group: Any) -> int:
  for number in range(group.num_columns):
    column = group.column(number)
    if column.path_in_schema == 'text':
      return column.total_uncompressed_size
  return 0


def _parquet() -> Any:
  try:
    from pyarrow import parquet
  except ImportError as error:
    raise UserError(
      '.parquet files need the package pyarrow; install it with pip install '
      "'perceiver-ar[prepare]'"
    ) from error
  return parquet


@contextlib.contextmanager
def _naming(path: Path | str) -> Iterator[None]:
  """Errors of reading a file, as sentences with its name."""
  _parquet()
  import pyarrow as pa

  try:
    yield
  except (
    *(pa.ArrowException, OSError, KeyError, StopIteration),
    UnicodeDecodeError,  # a text that is none
  ) as error:
    first = (str(error).strip() or 'it ends too early').splitlines()[0]
    raise UserError(
      f'{path} cannot be read as parquet ({first}); download it again'
    ) from error
