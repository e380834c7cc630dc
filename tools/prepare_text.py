"""Turns a folder of .txt files into a data set that the trainer reads.

  python tools/prepare_text.py --input=BOOKS --output=DATA

Every file is one document, kept to the byte. Some whole documents are held
out as the split `validation`, chosen by their names alone, so that the same
files give the same data set, byte for byte. Tokens are bytes, or subwords of
a vocabulary that is trained on the split `train` only.
"""

import argparse
import dataclasses
import hashlib
import math
import os
import shlex
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np

from perceiver_ar.data import layouts, records, text, writer
from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress


@dataclasses.dataclass(frozen=True)
class Document:
  """A text that can be read when it is needed; `origin` is for messages."""

  name: str
  split: str
  origin: str
  read: Callable[[], str]


def main(argv: Sequence[str] | None = None) -> int:
  args = _parse(argv)
  try:
    documents, num_ignored = folder_documents(
      Path(args.input), held_out=args.held_out
    )
    if num_ignored:
      print(f'{num_ignored} files in {args.input} are not .txt: ignored')
    output = Path(args.output)
    prepare(
      documents,
      output,
      vocabulary=args.vocabulary,
      vocab_size=args.vocab_size,
    )
  except UserError as error:
    print(f'prepare_text: {error}', file=sys.stderr)
    return 2
  _print_summary(records.Manifest.load(output), output)
  return 0


def folder_documents(
  folder: Path, *, held_out: float
) -> tuple[list[Document], int]:
  """The .txt files below a folder by name, and how many others there are."""
  if not 0 < held_out < 1:
    raise UserError(
      f'--held_out={held_out} must lie between 0 and 1: the share of the '
      'documents that are not trained on'
    )
  if not folder.is_dir():
    raise UserError(f'--input={folder} is no folder; give one with .txt files')
  files = _files_below(folder)
  names = sorted(name for name in files if name.lower().endswith('.txt'))
  if not names:
    raise UserError(
      f'--input={folder} holds no .txt file; give a folder of plain text files'
    )
  if len(names) == 1:
    raise UserError(
      f'--input={folder} holds one document, {names[0]}, and one is held out; '
      'add another, or cut it in two'
    )
  held = _held_out(names, held_out)
  documents = [
    Document(
      name=name,
      split='validation' if name in held else 'train',
      origin=str(folder / name),
      read=lambda path=folder / name: _read_text(path),
    )
    for name in names
  ]
  return documents, len(files) - len(names)


def prepare(
  documents: Sequence[Document],
  output: Path,
  *,
  vocabulary: str,
  vocab_size: int,
) -> None:
  """Writes the data set; `vocab_size` is that of sentencepiece."""
  with writer.Writer(output, kind='text', positions=layouts.INDEX) as target:
    _check(documents, vocabulary)
    codec = text.ByteCodec()
    file = ''
    if vocabulary == 'sentencepiece':
      file = text.MODEL_FILE
      texts = [document for document in documents if document.split == 'train']
      with Progress('read for the vocabulary', len(texts), 'documents') as bar:
        text.train_sentencepiece(
          _read_each(texts, bar), vocab_size, target.folder / file
        )
      codec = text.SentencePieceCodec(target.folder / file)
    target.set_vocabulary(
      text.Vocabulary(
        kind=codec.kind, size=codec.vocab_size, sha256=codec.sha256, file=file
      )
    )
    with Progress('write', len(documents), 'documents') as bar:
      for document in documents:
        _write(document, codec, target)
        bar.advance(1)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--input', required=True, help='folder with .txt files, at any depth'
  )
  parser.add_argument(
    '--output', required=True, help='folder of the data set, made or replaced'
  )
  parser.add_argument(
    '--vocabulary',
    choices=('bytes', 'sentencepiece'),
    default='bytes',
    help='what a token is (bytes)',
  )
  parser.add_argument(
    '--vocab_size',
    type=int,
    default=32_000,
    help='of sentencepiece (32000)',
  )
  parser.add_argument(
    '--held_out',
    type=float,
    default=0.05,
    help='share of the documents in the split validation (0.05)',
  )
  return parser.parse_args(argv)


def _files_below(folder: Path) -> list[str]:
  """Names of all files, relative to the folder, with / between the parts."""

  def refuse(error: OSError) -> None:
    raise UserError(
      f'{error.filename} cannot be read ({error.strerror}); allow it with '
      'chmod, or move it elsewhere'
    ) from error

  return [
    (Path(parent) / name).relative_to(folder).as_posix()
    for parent, _, names in os.walk(folder, onerror=refuse)
    for name in names
  ]


def _held_out(names: list[str], share: float) -> set[str]:
  """Which documents are validation: by name, so the rest may come and go."""
  by_hash = sorted(
    names, key=lambda name: hashlib.sha256(os.fsencode(name)).digest()
  )
  return set(by_hash[: min(math.ceil(share * len(names)), len(names) - 1)])


def _read_text(path: Path) -> str:
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror}); allow it with chmod, or '
      'move it elsewhere'
    ) from error
  if b'\0' in data:
    raise UserError(
      f'{path} is no plain text: byte {data.index(0)} is 0; convert it with '
      'iconv if it is UTF-16, else move it elsewhere'
    )
  try:
    return data.decode()
  except UnicodeDecodeError as error:
    raise UserError(
      f'{path} is not UTF-8: byte {error.start} is {data[error.start]:#04x}; '
      'convert it (iconv -f WINDOWS-1252 -t UTF-8, say), or move it elsewhere'
    ) from error


def _check(documents: Sequence[Document], vocabulary: str) -> None:
  """Reads everything once, so that a bad file is known before any work."""
  with Progress('check', len(documents), 'documents') as bar:
    for document in documents:
      content = document.read()
      if len(content.encode()) < 2:
        raise UserError(
          f'{document.origin} has {len(content)} characters, and a document '
          'needs two; move it elsewhere'
        )
      if vocabulary == 'sentencepiece' and text.SPACE_MARK in content:
        raise UserError(
          f'{document.origin}: character {content.index(text.SPACE_MARK)} is '
          'U+2581, which sentencepiece uses for a blank; replace it, or use '
          '--vocabulary=bytes'
        )
      bar.advance(1)


def _read_each(documents: Sequence[Document], bar: Progress) -> Iterator[str]:
  for document in documents:
    yield document.read()
    bar.advance(1, note='then they are fitted, which takes as long again')


def _write(
  document: Document, codec: text.Codec, target: writer.Writer
) -> None:
  content = document.read()
  tokens_T = codec.encode(content)
  if codec.decode(tokens_T) != content:
    raise UserError(
      f'{document.origin} does not survive {codec.kind}: its tokens decode to '
      'another text; use --vocabulary=bytes'
    )
  if len(tokens_T) < 2:
    raise UserError(
      f'{document.origin} is {len(tokens_T)} tokens long, and a document '
      'needs two; move it elsewhere, or use --vocabulary=bytes'
    )
  target.add(
    document.split,
    np.concatenate([[text.SOS], tokens_T, [text.EOS]]),
    name=document.name,
    num_bytes=len(content.encode()),
    num_words=len(content.split()),
  )


def _print_summary(manifest: records.Manifest, output: Path) -> None:
  columns = ('split', 'documents', 'bytes', 'words', 'tokens', 'bytes/token')
  print(f'{columns[0]:12}' + ''.join(f'{name:>14}' for name in columns[1:]))
  for name, split in sorted(manifest.splits.items()):
    counts = (
      split.num_documents,
      split.num_bytes,
      split.num_words,
      split.num_tokens,
    )
    ratio = split.num_bytes / split.num_tokens
    print(f'{name:12}' + ''.join(f'{n:14,}' for n in counts) + f'{ratio:14.2f}')
  command = [
    'perceiver-ar train --config=configs/books.py:small',
    shlex.quote(f'--config.data.path={output}'),
  ]
  if manifest.vocabulary.kind != 'bytes':
    command.append(f'--config.model.vocab_size={manifest.vocabulary.size}')
  print(f'{output} is complete. Next:')
  print(' '.join([*command, '--workdir=runs/books']))


if __name__ == '__main__':
  sys.exit(main())
