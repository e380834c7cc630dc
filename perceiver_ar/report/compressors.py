"""What general compressors make of some bytes: the bar a text model clears."""

import bz2
import functools
import gzip
import lzma

import numpy as np

from perceiver_ar.progress import Progress

_COMPRESSORS = {
  'gzip -9': functools.partial(gzip.compress, compresslevel=9, mtime=0),
  'bz2 -9': functools.partial(bz2.compress, compresslevel=9),
  'xz -9': functools.partial(lzma.compress, preset=9),
}


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
