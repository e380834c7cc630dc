"""What reading images has in common: what was found, and bytes of files."""

import dataclasses

import encoded_parts

from perceiver_ar.errors import UserError


@dataclasses.dataclass(frozen=True)
class Found:
  """Images, which published set they are ('' if none), and what to say."""

  items: list[encoded_parts.Item]
  variant: str
  notes: tuple[str, ...]


def read_bytes(path: str, offset: int, size: int) -> bytes:
  try:
    with open(path, 'rb') as file:
      file.seek(offset)
      return file.read(size)
  except OSError as error:
    raise UserError(
      f'this cannot be read ({error.strerror}); restore it'
    ) from error
