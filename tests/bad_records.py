"""Damage to the files of a prepared data set."""

import json
import pathlib
import shutil

import numpy as np

from perceiver_ar.data import layouts, records, text, tokens, writer

_HEADER = 40  # bytes, of every chunk; the second 8 are its size


def write_noise(
  path: pathlib.Path, num_documents: int = 12, size: int = 100, seed: int = 0
) -> pathlib.Path:
  """Documents of random bytes; of two seeds all but the contents is alike."""
  rng = np.random.default_rng(seed)
  with writer.Writer(
    path,
    kind='text',
    variant='',
    codec=text.ByteCodec(),
    positions=layouts.INDEX,
  ) as target:
    for split in ('train', 'validation'):
      for d in range(num_documents):
        noise = rng.integers(3, 259, size)
        target.add(
          split,
          np.concatenate([[tokens.SOS], noise, [tokens.EOS]]),
          name=f'{d}.txt',
          counts={'bytes': size},
        )
  return path


def flip(path: pathlib.Path, index: int, split: str = 'train') -> None:
  """One bit in a record of a small data set: all in the first 64 KiB."""
  file = records.record_file(path, split)
  content = bytearray(file.read_bytes())
  at = 64  # the file has a header, and every chunk has a record
  for _ in range(index):
    at += _HEADER + int.from_bytes(content[at + 8 : at + 16], 'little')
  content[at + _HEADER + 9] ^= 1
  file.write_bytes(content)


def exchange(path: pathlib.Path, other: pathlib.Path) -> None:
  """The records of another data set, under the manifest of this one."""
  for split in ('train', 'validation'):
    file = records.record_file(path, split)
    shutil.copy(records.record_file(other, split), file)
    manifest = json.loads((path / records.MANIFEST).read_text())
    manifest['splits'][split]['file_size'] = file.stat().st_size
    (path / records.MANIFEST).write_text(json.dumps(manifest))
