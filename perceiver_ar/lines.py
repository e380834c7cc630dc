"""Files of JSON lines that outlive the process which writes them.

A bucket (gs://...) knows no appending: there a file is written as a whole, when
it is asked for. What a crash tore off at the end is as if never written.
"""

import contextlib
import io
import json
import math
import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, TypeAlias

from etils import epath

from perceiver_ar import paths
from perceiver_ar.errors import SaveError, UserError

Row: TypeAlias = dict[str, Any]


class Appender:
  """Adds lines to a file."""

  def __init__(self, path: epath.Path, kept: Sequence[bytes]):
    """Begins with the lines `kept`, whatever is in the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b''.join(line + b'\n' for line in kept)
    self._path = path
    if paths.is_bucket(path):
      self._file = io.BytesIO()
      self._file.write(content)
      return
    if kept and content != path.read_bytes():
      paths.write_whole(path, content)
    self._file = path.open('ab' if kept else 'wb')

  def write(self, row: Mapping[str, Any]) -> None:
    """Raises SaveError where it cannot: its disk is full."""
    with self._explained():
      self._file.write(json.dumps(row, allow_nan=False).encode() + b'\n')
      self._file.flush()

  def sync(self) -> None:
    """What is written outlives the machine, in a bucket too."""
    with self._explained():
      if isinstance(self._file, io.BytesIO):
        self._path.write_bytes(self._file.getvalue())
      else:
        os.fsync(self._file.fileno())

  def close(self) -> None:
    if isinstance(self._file, io.BytesIO):
      self.sync()
    with contextlib.suppress(OSError):  # what `write` has said
      self._file.close()

  @contextlib.contextmanager
  def _explained(self) -> Iterator[None]:
    try:
      yield
    except OSError as error:
      raise SaveError(
        f'{self._path} cannot be written ({error.strerror or error}); make '
        'room there or mend the storage, and run again'
      ) from error


def plain(value: Any) -> Any:
  """What JSON has words for; numbers that are not finite are strings."""
  if isinstance(value, Mapping):
    return {name: plain(item) for name, item in value.items()}
  if isinstance(value, list | tuple):
    return [plain(item) for item in value]
  if hasattr(value, 'item'):  # an array of NumPy or JAX
    value = value.item()
  assert isinstance(value, int | float | str | None), value
  if isinstance(value, float) and not math.isfinite(value):
    if math.isnan(value):
      return 'NaN'
    return 'Infinity' if value > 0 else '-Infinity'
  return value


def read(path: epath.Path, key: str) -> list[tuple[bytes, Row]]:
  """Lines and what they say; none where there is no file.

  Args:
    path: of the file.
    key: that every line has.

  Raises:
    UserError: a line before the last is broken.
  """
  if not path.exists():
    return []
  lines = [(x, _parse(x, key)) for x in path.read_bytes().splitlines()]
  while lines and lines[-1][1] is None:
    lines.pop()
  parsed = []
  for number, (line, row) in enumerate(lines, 1):
    if row is None:
      raise UserError(
        f'{path} line {number} is not a JSON object with {key!r}; repair or '
        'delete that line'
      )
    parsed.append((line, row))
  return parsed


def _parse(line: bytes, key: str) -> Row | None:
  try:
    row = json.loads(line)
  except (ValueError, RecursionError):
    return None
  return row if isinstance(row, dict) and key in row else None
