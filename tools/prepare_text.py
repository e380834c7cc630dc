"""Turns texts into a data set that the trainer reads.

  python tools/prepare_text.py --input=BOOKS --output=DATA

The input is one of these, and is recognised:

  a folder with .txt files, at any depth
  PG-19: train/, validation/, test/ with NUMBER.txt, and metadata.csv
  Wikitext-103 raw: wikitext-103-raw-v1.zip, or its folder
  the parquet files of a mirror of either
  .jsonl files, a text a line: "..." or {"text": "..."}

Every text is one document, kept to the byte. If there is a folder train/ (or a
train.jsonl), the folders train/, validation/ and test/ are the splits and the
rest is ignored; where there is no validation/, some whole documents are held
out, chosen by their names alone. Tokens are bytes; or subwords of a vocabulary
that is trained on the split `train` only; or of one that you have. Equal input
gives an equal data set, byte for byte. Interrupted, it goes on where it was.
"""

import argparse
import contextlib
import dataclasses
import functools
import hashlib
import json
import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import encoded_parts
import numpy as np
import preparation
import source_files
import text_places
import text_sources

from perceiver_ar.data import codecs, layouts, records, subwords, text, tokens
from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress

_MEGABYTE = 1_000_000
_VOCAB_SIZE, _VOCAB_MEGABYTES = 32_000, 256  # of sentencepiece
_CONFIGS = {
  'pg19': 'configs/books.py:pg19',
  'wikitext-103-raw': 'configs/books.py:wikitext103',
}
_SMALL = 'configs/books.py:small'  # where nothing is published


@dataclasses.dataclass(frozen=True)
class VocabularyOptions:
  """What tokens are.

  Attributes:
    name: bytes, sentencepiece, or a file *.model or *.json.
    size: of sentencepiece.
    megabytes: of the training split, how much sentencepiece is trained on.
  """

  name: str
  size: int
  megabytes: int


@dataclasses.dataclass(frozen=True)
class TextEncoder:
  """Makes a document of a text, with the vocabulary in a folder."""

  vocabulary: tokens.Vocabulary
  folder: str
  ends_are_words: bool

  def __call__(self, item: encoded_parts.Item) -> encoded_parts.Document:
    data = _plain(text_places.read(item.source))
    tokens_T = _opened(self.vocabulary, self.folder).read(data)
    if len(tokens_T) < 2:
      raise UserError(
        f'it has {len(tokens_T)} tokens, and a document needs two; move it '
        'elsewhere'
      )
    num_words = text_places.num_words(data, self.ends_are_words)
    counts = {'bytes': len(data), 'words': num_words}
    whole_T = np.concatenate([[tokens.SOS], tokens_T, [tokens.EOS]])
    return encoded_parts.Document(whole_T, counts)


def main(argv: Sequence[str] | None = None) -> int:
  args = _parse(argv)

  def work() -> None:
    preparation.check_apart(args.input, args.output)
    vocabulary = _vocabulary_options(args)
    texts = text_sources.find(
      args.input,
      format=args.format,
      held_out=args.held_out,
      text_key=args.text_key,
    )
    print(*texts.notes, sep='\n')
    manifest = prepare(
      texts,
      args.output,
      vocabulary,
      workers=args.workers,
      strict=args.strict,
    )
    preparation.summary(manifest, args.output)
    _print_next(manifest, args.output)

  return preparation.run('prepare_text', work)


def prepare(
  texts: text_places.Texts,
  output: Path,
  vocabulary: VocabularyOptions,
  *,
  workers: int,
  strict: bool,
) -> records.Manifest:
  """Writes the data set, or goes on with one that was interrupted."""
  file = _vocabulary_file(texts.items, output, vocabulary)
  codec = _open_vocabulary(file)
  about = dataclasses.replace(
    tokens.vocabulary(codec), file=file.name if file else ''
  )
  return preparation.prepare(
    texts.items,
    TextEncoder(about, str(file.parent) if file else '', texts.ends_are_words),
    output=output,
    kind='text',
    variant=texts.variant,
    codec=codec,
    positions=layouts.INDEX,
    job={'ends_are_words': texts.ends_are_words},
    unit='documents',
    per_part=texts.per_part,
    workers=workers,
    strict=strict,
    num_files=len(texts.items),
    published=texts.published,
  )


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--input', required=True, type=Path, help='what to read, see above'
  )
  preparation.add_arguments(parser)
  parser.add_argument(
    '--format',
    choices=text_sources.FORMATS,
    default='auto',
    help='what the input is, if it is not recognised (auto)',
  )
  parser.add_argument(
    '--vocabulary',
    default='bytes',
    help='what a token is: bytes, sentencepiece (trained here), or a file:\n'
    '*.model of sentencepiece, or a Hugging Face tokenizer.json (bytes)',
  )
  parser.add_argument(
    '--vocab_size',
    type=int,
    help=f'of sentencepiece ({_VOCAB_SIZE})',
  )
  parser.add_argument(
    '--vocab_megabytes',
    type=int,
    help='of the training split, what sentencepiece is trained on '
    f'({_VOCAB_MEGABYTES})',
  )
  parser.add_argument(
    '--held_out',
    type=float,
    help='share in the split validation, where there is none '
    f'({source_files.HELD_OUT})',
  )
  parser.add_argument(
    '--text_key',
    help='of JSONL: which string of an object is its text (text)',
  )
  return parser.parse_args(argv)


def _vocabulary_options(args: argparse.Namespace) -> VocabularyOptions:
  values = {'vocab_size': _VOCAB_SIZE, 'vocab_megabytes': _VOCAB_MEGABYTES}
  for name in values:
    if (value := getattr(args, name)) is None:
      continue
    if args.vocabulary != 'sentencepiece':
      raise UserError(
        f'--{name}={value} is of --vocabulary=sentencepiece, and not of '
        f'--vocabulary={args.vocabulary}; leave it out'
      )
    values[name] = value
  return VocabularyOptions(
    args.vocabulary, values['vocab_size'], values['vocab_megabytes']
  )


def _plain(data: bytes) -> bytes:
  if b'\0' in data:
    raise UserError(
      f'it is no plain text: byte {data.index(0)} is 0; convert it with iconv '
      'if it is UTF-16, else move it elsewhere'
    )
  return data


@functools.lru_cache(1)
def _opened(vocabulary: tokens.Vocabulary, folder: str) -> tokens.Codec:
  return codecs.open_codec(vocabulary, layouts.INDEX, folder)


def _open_vocabulary(file: Path | None) -> tokens.Codec:
  if file is None:
    return text.ByteCodec()
  if file.suffix == '.json':
    return text.TokenizersCodec(file)
  return text.SentencePieceCodec(file)


def _vocabulary_file(
  items: Sequence[encoded_parts.Item], output: Path, options: VocabularyOptions
) -> Path | None:
  """The user's own, or one that is trained unless it is there; None: bytes."""
  if options.name == 'bytes':
    return None
  if options.name == 'sentencepiece':
    return _trained(items, output, options)
  file = Path(options.name)
  if file.suffix not in ('.model', '.json'):
    raise UserError(
      f'--vocabulary={options.name} must be bytes, sentencepiece, or a file '
      'that ends in .model (sentencepiece) or .json (tokenizer.json)'
    )
  return file


def _trained(
  items: Sequence[encoded_parts.Item], output: Path, options: VocabularyOptions
) -> Path:
  """Trains on the training split, or a part of it that its names decide."""
  if options.megabytes < 1:
    raise UserError(f'--vocab_megabytes={options.megabytes} must be at least 1')
  train = [item for item in items if item.split == 'train']
  sample = _sample(train, options.megabytes * _MEGABYTE)
  about = [(item.name, item.source, item.stamp) for item in sample]
  key = hashlib.sha256(json.dumps([options.size, about]).encode()).hexdigest()
  name = f'{text.SENTENCEPIECE_FILE}'
  file = preparation.work_folder(output) / f'vocabulary-{key[:16]}' / name
  if file.exists():
    print(f'vocabulary: {file} is trained')
    return file
  size = sum(text_places.size(item.source) for item in sample) / _MEGABYTE
  print(
    f'vocabulary: sentencepiece is trained on {len(sample):,} of the '
    f'{len(train):,} training documents, {size:,.1f} MB'
  )
  with Progress('read for the vocabulary', len(sample), 'documents') as bar:
    model = subwords.train_sentencepiece(_read_each(sample, bar), options.size)
  file.parent.mkdir(exist_ok=True)
  temporary = file.with_suffix('.tmp')
  temporary.write_bytes(model)
  temporary.replace(file)
  return file


def _sample(
  items: Sequence[encoded_parts.Item], budget: int
) -> Sequence[encoded_parts.Item]:
  """All of them, or as many as fill the budget, by the hashes of their names.

  They stay in order, which is the cheapest to read them in.
  """
  left = budget
  chosen = set()
  for item in sorted(
    items,
    key=lambda item: hashlib.sha256(os.fsencode(item.name)).digest(),
  ):
    if left <= 0:
      break
    chosen.add(item.name)
    left -= text_places.size(item.source)
  return [item for item in items if item.name in chosen]


def _read_each(
  items: Sequence[encoded_parts.Item], bar: Progress
) -> Iterator[str]:
  """The texts; those that are none are rejected when they are encoded."""
  for item in items:
    with contextlib.suppress(UserError):
      yield text.as_text(_plain(text_places.read(item.source)))
    bar.advance(1, note='then they are fitted, which takes as long again')


def _print_next(manifest: records.Manifest, output: Path) -> None:
  edition = manifest.variant.removesuffix(source_files.PARTIAL)
  command = [
    f'perceiver-ar train --config={_CONFIGS.get(edition, _SMALL)}',
    shlex.quote(f'--config.data.path={output}'),
  ]
  if manifest.vocabulary.kind != 'bytes' or edition in _CONFIGS:
    command.append(f'--config.model.vocab_size={manifest.vocabulary.size}')
  print('Next:', *command, '--workdir=runs/books')


if __name__ == '__main__':
  sys.exit(main())
