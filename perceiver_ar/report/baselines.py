"""What simple codes make of the same data: the bars that a model clears."""

import bz2
import functools
import gzip
import io
import lzma
from collections.abc import Iterable, Sequence

import numpy as np

from perceiver_ar.progress import Progress

_COMPRESSORS = {
  'gzip -9': functools.partial(gzip.compress, compresslevel=9, mtime=0),
  'bz2 -9': functools.partial(bz2.compress, compresslevel=9),
  'xz -9': functools.partial(lzma.compress, preset=9),
}
# Of the unigram's mass in a bigram: how many times each context is taken to
# have been seen before it was.
_PRIOR = 30.0


def bits_per_byte(data: bytes) -> dict[str, float]:
  """By name: the best code of single bytes (order 0), then the compressors.

  Order 0 is the entropy of the bytes' own histogram, which comes for free.
  """
  assert data
  shares = np.bincount(np.frombuffer(data, np.uint8)) / len(data)
  shares = shares[shares > 0]
  values = {'order 0': float((shares * np.log2(1 / shares)).sum())}
  with Progress('compare', len(_COMPRESSORS), 'compressors') as progress:
    for name, compress in _COMPRESSORS.items():
      values[name] = 8 * len(compress(data)) / len(data)
      progress.advance(1)
  return values


def nats_of_ngrams(
  train: Iterable[np.ndarray], held_out: Sequence[np.ndarray], vocab_size: int
) -> dict[str, float]:
  """Nats of the held-out documents, the first token of each given.

  The bigram is learned from the training split and falls back on the unigram
  where it has seen little.

  Args:
    train: documents as ids [T].
    held_out: the same, to be scored.
    vocab_size: V; the bigram takes 8 * V**2 bytes.
  """
  pairs_VV = np.zeros((vocab_size, vocab_size))
  for ids_T in train:
    np.add.at(pairs_VV, (ids_T[:-1], ids_T[1:]), 1)
  unigram_V = pairs_VV.sum(axis=0) + 1
  unigram_V /= unigram_V.sum()
  seen_V1 = pairs_VV.sum(axis=1, keepdims=True)
  bigram_VV = (pairs_VV + _PRIOR * unigram_V) / (seen_V1 + _PRIOR)
  nats = {'uniform': 0.0, 'unigram': 0.0, 'bigram': 0.0}
  for ids_T in held_out:
    nats['uniform'] += (len(ids_T) - 1) * float(np.log(vocab_size))
    nats['unigram'] -= float(np.log(unigram_V[ids_T[1:]]).sum())
    nats['bigram'] -= float(np.log(bigram_VV[ids_T[:-1], ids_T[1:]]).sum())
  return nats


def png_bits(pictures: Sequence[np.ndarray]) -> float:
  """Bits of pictures [H, W, C] uint8, each an optimised PNG file."""
  from PIL import Image

  bits = 0
  with Progress('compare', len(pictures), 'images') as progress:
    for picture in pictures:
      out = io.BytesIO()
      Image.fromarray(picture).save(out, 'png', optimize=True)
      bits += 8 * out.tell()
      progress.advance(1)
  return float(bits)
