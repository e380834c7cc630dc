"""What a sampling command has drawn so far, kept for the case that it ends.

SAMPLES/unfinished.npz holds tokens of every prompt, and a digest of all that
they are a function of. The same command, run again, goes on from there.
"""

import io
import time
import zlib

import jax
import numpy as np
from etils import epath

from perceiver_ar import distributed, paths

_NAME = 'unfinished.npz'
_EVERY_SECONDS = 5.0  # at most so many are lost by a crash


class Drawn:
  """The tokens of each prompt, [B, T] int32, on disk now and then.

  Attributes:
    parts_BT: of the prompts, in order, as far as they were drawn.
  """

  def __init__(self, folder: epath.Path, request: str):
    """Reads what is there of the same `request`, a digest."""
    self._path = folder / _NAME
    self._request = request
    self._told = time.monotonic()
    said, parts_BT = '', []
    if self._path.exists():
      said, parts_BT = _read(self._path.read_bytes())
    self.parts_BT = parts_BT if said == request else []

  def of(self, prompt: int, num_samples: int) -> np.ndarray:
    """What is drawn of a prompt, [B, T]."""
    if prompt < len(self.parts_BT):
      return self.parts_BT[prompt]
    return np.zeros((num_samples, 0), np.int32)

  def add(self, prompt: int, new_BT: np.ndarray) -> None:
    """Prompts come in order, and each in as many parts as it likes."""
    known_BT = self.of(prompt, len(new_BT))
    self.parts_BT[prompt:] = [np.concatenate([known_BT, new_BT], axis=1)]
    if time.monotonic() - self._told > _EVERY_SECONDS:
      self.write()

  def write(self) -> None:
    """All or nothing."""
    content = io.BytesIO()
    arrays = {str(i): part for i, part in enumerate(self.parts_BT)}
    np.savez_compressed(
      content, allow_pickle=False, request=np.array(self._request), **arrays
    )
    paths.write_whole(self._path, content.getvalue())
    self._told = time.monotonic()

  def remove(self) -> None:
    self._path.unlink(missing_ok=True)


def open_drawn(folder: epath.Path, request: str) -> Drawn:
  """On all processes alike, and says whether the command goes on.

  Args:
    folder: where the samples are.
    request: a digest of all that they are a function of.
  """
  there = (folder / _NAME).exists()
  drawn = Drawn(folder, request)
  sums = [zlib.crc32(part_BT.tobytes()) for part_BT in drawn.parts_BT]
  if len(set(distributed.exchange('sample', str(sums)))) > 1:
    drawn.parts_BT = []  # not all see the same folder
  if there and jax.process_index() == 0:
    num = sum(part_BT.size for part_BT in drawn.parts_BT)
    print(
      f'goes on after {num:,} tokens that are drawn'
      if num
      else f'begins anew: {folder / _NAME} is of another command, checkpoint '
      'or prompt'
    )
  return drawn


def _read(content: bytes) -> tuple[str, list[np.ndarray]]:
  """The request and the parts; an empty request if it is not what we write."""
  try:
    with np.load(io.BytesIO(content), allow_pickle=False) as file:
      parts_BT = [file[str(i)] for i in range(len(file.files) - 1)]
      return str(file['request']), parts_BT
  except Exception:  # whatever the readers of a damaged zip raise
    return '', []
