"""Prepares texts as a user would, and reads them back."""

import pathlib
import sys

from perceiver_ar.data import records

TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'prepare_text.py'
sys.path.insert(0, str(TOOL.parent))

import prepare_text  # noqa: E402  # pyright: ignore[reportMissingImports]
import text_parquet  # noqa: E402, F401  # pyright: ignore[reportMissingImports]
import text_published  # noqa: E402, F401  # pyright: ignore[reportMissingImports]


def run(source, output, *more: str) -> int:
  arguments = [f'--input={source}', f'--output={output}', '--workers=1', *more]
  return prepare_text.main(arguments)


def texts_of(folder: pathlib.Path) -> dict[str, dict[str, bytes]]:
  """Split, name, text of all the documents, in their order."""
  texts = {}
  for split in records.Manifest.load(folder).splits:
    documents = records.Documents(str(folder), split)
    texts[split] = {
      documents.info(i).name: documents.codec.write(documents[i])[0]
      for i in range(len(documents))
    }
  return texts


def jsonl_file(folder, lines):
  folder.mkdir()
  path = folder / 'mine.jsonl'
  path.write_text(''.join(f'{line}\n' for line in lines))
  return path
