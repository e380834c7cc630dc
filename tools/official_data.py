"""The inputs that come with published weights, here and as a data set.

Published sequences are left-aligned, ours are right-aligned. In both, latent n
of N is the n-th of the last N tokens, and the latents that a short sequence
has no tokens for come first.

Letters: B examples, M inputs, N latents, P position axes, T tokens.
"""

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from official_files import Published

from perceiver_ar.config import ModelConfig
from perceiver_ar.data import layouts, records, text, tokens, writer
from perceiver_ar.errors import UserError


@dataclasses.dataclass(frozen=True, kw_only=True)
class Examples:
  """Left-aligned, as published; 0 is padding.

  Attributes:
    inputs_BM: ids.
    lengths_B: of the inputs.
    positions_BMP: 0 where the model does not take positions from the data;
      None if the file should have them and does not.
    targets_BM: the next ids; None if the file has none.
  """

  inputs_BM: np.ndarray
  lengths_B: np.ndarray
  positions_BMP: np.ndarray | None
  targets_BM: np.ndarray | None


def read(published: Published, model: ModelConfig) -> Examples | None:
  """The examples of the file, checked; None if it has no inputs."""
  arrays, path = published.examples, published.path
  if 'inputs' not in arrays:
    return None
  B, M = len(np.atleast_1d(arrays['inputs'])), model.context_length
  inputs_BM = _ids(arrays, 'inputs', (B, M), model.vocab_size, path)
  is_padding_BM = inputs_BM == 0
  lengths_B = np.where(is_padding_BM.any(1), is_padding_BM.argmax(1), M)
  lengths = checked({'lengths': lengths_B} | arrays, 'lengths', (B,), path)
  if (lengths != lengths_B).any():
    raise UserError(
      f"{path}: 'lengths' is {lengths.tolist()}, and the inputs end "
      f'with their first 0 at {lengths_B.tolist()}; make them agree'
    )
  targets_BM = None
  if 'targets' in arrays:
    targets_BM = _ids(arrays, 'targets', (B, M), model.vocab_size, path)
  return Examples(
    inputs_BM=inputs_BM,
    lengths_B=lengths_B,
    positions_BMP=_positions(arrays, lengths_B, model, path),
    targets_BM=targets_BM,
  )


def right_aligned(x_BM: np.ndarray, lengths_B: np.ndarray) -> np.ndarray:
  """The same rows with their padding on the left; [B, M, ...]."""
  aligned_BM = np.zeros_like(x_BM)
  for row, length in enumerate(lengths_B):
    if length:
      aligned_BM[row, -length:] = x_BM[row, :length]
  return aligned_BM


def checked(
  arrays: Mapping[str, np.ndarray],
  name: str,
  shape: tuple[int, ...],
  path: Path,
) -> np.ndarray:
  if arrays[name].shape != shape:
    raise UserError(
      f'{path}: {name!r} is {arrays[name].shape}, and its inputs and config '
      f'need {shape}; make them agree'
    )
  return arrays[name]


def _ids(
  arrays: Mapping[str, np.ndarray],
  name: str,
  shape: tuple[int, ...],
  size: int,
  path: Path,
) -> np.ndarray:
  ids = checked(arrays, name, shape, path)
  if (
    ids.dtype.kind not in 'iu' or ids.min(initial=0) < 0 or (ids >= size).any()
  ):
    raise UserError(
      f'{path}: {name!r} must hold integers from 0 to {size - 1}; it holds '
      f'{ids.dtype} up to {ids.max(initial=0)}'
    )
  return ids.astype(np.int32)


def _positions(
  arrays: Mapping[str, np.ndarray],
  lengths_B: np.ndarray,
  model: ModelConfig,
  path: Path,
) -> np.ndarray | None:
  shape = (len(lengths_B), model.context_length, len(model.position_sizes))
  if model.position_source != 'data':
    return np.zeros(shape, np.int32)
  if 'input_idxs' not in arrays:
    return None
  ids_BMP = checked(arrays, 'input_idxs', shape, path)
  is_input_BM = np.arange(shape[1]) < lengths_B[:, None]
  for axis, size in enumerate(model.position_sizes):
    limit = size or 2**31  # int32
    column = {'input_idxs': np.where(is_input_BM, ids_BMP[..., axis], 0)}
    _ids(column, 'input_idxs', shape[:2], limit, path)
  return ids_BMP.astype(np.int32)


# As a data set.


def codec(model: ModelConfig) -> tokens.Codec:
  """What the ids mean, as far as their number tells."""
  if model.vocab_size == text.ByteCodec.vocab_size:
    return text.ByteCodec()
  return text.IdsCodec(model.vocab_size)


def documents(examples: Examples | None) -> list[np.ndarray]:
  """Every example as one document: its inputs and its last target.

  Raises:
    UserError: it is no document; the sentence says why.
  """
  if examples is None or examples.targets_BM is None:
    raise UserError('the file has no inputs with their targets')
  found = []
  for row, length in enumerate(examples.lengths_B):
    inputs_T = examples.inputs_BM[row, :length]
    targets_T = examples.targets_BM[row, :length]
    if (inputs_T[1:] != targets_T[:-1]).any():
      raise UserError(f'the targets of row {row} are not its next inputs')
    tokens_T = np.concatenate([inputs_T, targets_T[-1:]])
    tokens_T = tokens_T[tokens_T != tokens.PAD]
    if len(tokens_T) < 2:
      raise UserError(f'row {row} has {len(tokens_T)} tokens')
    found.append(tokens_T)
  if not found:
    raise UserError('the file has no rows')
  return found


def layout(examples: Examples, model: ModelConfig) -> dict[str, Any]:
  """How positions follow from the index of a token.

  Raises:
    UserError: they do not; the sentence says why.
  """
  if model.position_source != 'data':
    return layouts.INDEX
  if examples.positions_BMP is None:
    raise UserError('the file has no input_idxs')
  known_BMP = [
    ids[:length]
    for ids, length in zip(
      examples.positions_BMP, examples.lengths_B, strict=True
    )
  ]
  longest_TP = max(known_BMP, key=len)
  for row, ids_TP in enumerate(known_BMP):
    if (ids_TP != longest_TP[: len(ids_TP)]).any():
      raise UserError(
        f'the positions of row {row} are not those of the longest row'
      )
  if longest_TP.shape[1] == 1:
    count_T1 = np.arange(1, len(longest_TP) + 1)[:, None]
    if (longest_TP == count_T1).all():
      return layouts.INDEX
  if longest_TP.min(initial=1) < 1:
    raise UserError('position 0 is for padding, and tokens have it')
  return {'kind': 'table', 'rows': longest_TP.tolist()}


def unknown_layout(model: ModelConfig) -> dict[str, Any]:
  """Where the file does not tell: counting, or with several axes no more than
  the first token, so that whoever places a second one is told.
  """
  num_axes = len(model.position_sizes)
  if num_axes == 1 or model.position_source != 'data':
    return layouts.INDEX
  return {'kind': 'table', 'rows': [[1] * num_axes]}


def write(
  folder: Path,
  documents: list[np.ndarray],
  layout: dict[str, Any],
  codec: tokens.Codec,
) -> records.Manifest:
  """Writes the split `validation`."""
  with writer.Writer(
    folder, kind='text', variant='', codec=codec, positions=layout
  ) as target:
    for row, tokens_T in enumerate(documents):
      counts = {}  # of ids, which stand for no text
      if isinstance(codec, text.ByteCodec):
        content = codec.decode(tokens_T)
        counts = {'bytes': len(content.encode()), 'words': len(content.split())}
      target.add('validation', tokens_T, name=f'row {row}', counts=counts)
  return records.Manifest.load(folder)
