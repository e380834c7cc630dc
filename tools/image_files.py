"""What reading images has in common: what was found, and bytes of files."""

import dataclasses

import encoded_parts

from perceiver_ar.errors import UserError

_MOST_BYTES = 2**28  # of one picture


@dataclasses.dataclass(frozen=True)
class Found:
  """Images, which published set they are ('' if none), and what to say."""

  items: list[encoded_parts.Item]
  variant: str
  notes: tuple[str, ...]


def read_bytes(path: str, offset: int, size: int) -> bytes:
  """So much of a file, or all that follows if `size` is below 0."""
  try:
    with open(path, 'rb') as file:
      file.seek(offset)
      data = file.read(size if 0 <= size <= _MOST_BYTES else _MOST_BYTES + 1)
  except OSError as error:
    raise UserError(
      f'this cannot be read ({error.strerror}); restore it'
    ) from error
  if len(data) > _MOST_BYTES:
    raise UserError(
      f'this has more than {_MOST_BYTES:,} bytes, which is no picture; leave '
      'it out'
    )
  return data
