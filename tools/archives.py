"""What a zip may hold: plain files of its own folder, and no bombs.

Nothing is ever unpacked, so a member can do harm by its name, where that is
believed, or by its size, where it is read.
"""

import stat
import zipfile
from pathlib import Path

import source_files

from perceiver_ar.errors import UserError

_FREE = 64 * 2**20  # bytes that any archive may unpack to
_RATIO = 100  # of what is unpacked to the archive; text comes to ten
_PLAIN = (0, stat.S_IFREG, stat.S_IFDIR)  # 0: of systems that do not say


def check_zip(path: Path, archive: zipfile.ZipFile, size: int) -> None:
  """Refuses a zip that no one would have made of data.

  Args:
    path: for messages.
    archive: opened; its members are no larger than they say, `zipfile` sees
      to that.
    size: of the archive, in bytes.

  Raises:
    UserError: a member leaves the folder, or is a link or a device, or they
      come to more than an archive of this size holds.
  """
  members = archive.infolist()
  source_files.check_members(path, [member.filename for member in members])
  for member in members:
    if stat.S_IFMT(member.external_attr >> 16) not in _PLAIN:
      raise UserError(
        f'{path} holds {member.filename!r}, which is a link or no plain file; '
        'get it again where it is published'
      )
  if sum(member.file_size for member in members) > _FREE + _RATIO * size:
    largest = max(members, key=lambda member: member.file_size)
    raise UserError(
      f'{path} has {size:,} bytes and would unpack to more than {_RATIO} times '
      f'as many, such as {largest.file_size:,} of {largest.filename!r}; do not '
      'trust this file, and get it again where it is published'
    )
