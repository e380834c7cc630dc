"""What every kind of data agrees on: reserved ids, and what a codec is.

A symbol s (a byte, a pitch, a brightness) is the token s + NUM_RESERVED.
"""

import dataclasses
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from perceiver_ar.data import stated
from perceiver_ar.errors import UserError

PAD, EOS, SOS = 0, 1, 2
NUM_RESERVED = 3


@dataclasses.dataclass(frozen=True, kw_only=True)
class Vocabulary:
  """How a prepared data set names its codec."""

  kind: str
  size: int
  sha256: str
  file: str  # in its folder; '' if the kind says it all


def read_vocabulary(raw: Any, where: str) -> Vocabulary:
  """What JSON says of one; `where` is the file, for messages.

  Raises:
    UserError: it is of other fields or types, or of no size.
  """
  remedy = 'restore the file, or prepare the data set again'
  found = stated.read(Vocabulary, raw, where, remedy)
  if not NUM_RESERVED < found.size < 2**31:
    raise UserError(
      f'{where}: the vocabulary has the size {found.size}; {remedy}'
    )
  return found


class Codec(Protocol):
  """What turns an artifact (a text, a MIDI file, a PNG) into tokens and back.

  Tokens are without SOS and EOS. `forbidden` are the ids that a sampler must
  never emit, `suffix` is that of an artifact's file; `file` and `model` are
  name and content of the vocabulary's own file, if it has one.
  """

  kind: str
  vocab_size: int
  sha256: str
  forbidden: tuple[int, ...]
  suffix: str
  file: str
  model: bytes

  def read(self, data: bytes) -> np.ndarray:
    """The tokens [T] int32 of an artifact; a UserError if it is none."""
    ...

  def write(self, ids: Sequence[int] | np.ndarray) -> tuple[bytes, int]:
    """A valid artifact from any ids, and how many repairs that took."""
    ...


def vocabulary(codec: Codec) -> Vocabulary:
  return Vocabulary(
    kind=codec.kind,
    size=codec.vocab_size,
    sha256=codec.sha256,
    file=codec.file,
  )
