"""The mirrored copy task: noise, then the same noise backwards.

Nothing is stored. A document is a function of (seed, split, index), so there
are as many as a run can read, and its second half is predicted only by a
model that looks back over its whole length.
"""

import hashlib
import json

import numpy as np

from perceiver_ar.data import layouts, records, text, tokens
from perceiver_ar.errors import UserError

_NUM_TRAIN = 2**31 - 1
_STREAMS = {'train': 0, 'validation': 1}


class CopyDocuments:
  """Documents SOS, half, its mirror image, EOS, of `length` tokens.

  Their codec writes ids, because the noise is no text.
  """

  kind = 'copy'
  variant = ''
  vocab_size = 256 + tokens.NUM_RESERVED

  def __init__(
    self,
    split: str,
    *,
    length: int,
    offset: int,
    num_eval_documents: int,
    seed: int,
  ):
    if split not in _STREAMS:
      raise UserError(
        f'the copy task has no split {split!r}; it has train and validation'
      )
    if split == 'validation' and num_eval_documents < 1:
      raise UserError(
        'data.num_eval_documents is 0; set it to the number of copy '
        'sequences to evaluate, such as --config.data.num_eval_documents=64'
      )
    self.split = split
    self.longest = length
    self.counts: dict[str, int] = {}  # noise is no bytes of anything
    # Short copies may stand where the middle of long ones does, so that what
    # is learned about positions holds when they grow.
    self.layout = layouts.INDEX | {'first': 1 + offset}
    self.codec: tokens.Codec = text.IdsCodec(self.vocab_size)
    about = {'kind': 'copy', 'length': length, 'seed': seed}
    if offset:
      about['offset'] = offset
    self.fingerprint = hashlib.sha256(
      json.dumps(about, sort_keys=True).encode()
    ).hexdigest()
    self._length = _NUM_TRAIN if split == 'train' else num_eval_documents
    self._key = np.random.SeedSequence([_STREAMS[split], seed]).generate_state(
      2, np.uint64
    )

  def __len__(self) -> int:
    return self._length

  def __getitem__(self, index: int) -> np.ndarray:
    num_noise = (self.longest - 2) // 2
    # The index in the counter's highest word gives every document 2**192
    # blocks of its own; raw words, because their values are the same in every
    # version of NumPy.
    bits = np.random.Philox(key=self._key, counter=[0, 0, 0, index])
    words = bits.random_raw(-(-num_noise // 8)).astype('<u8')
    noise = words.view(np.uint8)[:num_noise].astype(np.int32)
    tokens_T = np.empty(self.longest, np.int32)
    tokens_T[0], tokens_T[-1] = tokens.SOS, tokens.EOS
    tokens_T[1 : 1 + num_noise] = noise + tokens.NUM_RESERVED
    tokens_T[1 + num_noise : -1] = noise[::-1] + tokens.NUM_RESERVED
    return tokens_T

  @property
  def num_tokens(self) -> np.ndarray:
    """One length for each document, without memory for each."""
    return np.broadcast_to(np.int64(self.longest), len(self))

  def info(self, index: int) -> records.DocumentInfo:
    return records.DocumentInfo(
      name=f'{self.split} {index}',
      num_tokens=self.longest,
      counts={},
    )
