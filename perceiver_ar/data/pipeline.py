"""The one Grain graph: documents in, the batch of any step out.

Batch `step` is a function of (seed, step, row) alone: visits to documents,
shuffled anew in every epoch, one random crop per visit (of another document
where one is damaged and may be skipped), then the rows of this host. The
iterator's whole state is the step number, so a run may go on with any number
of hosts.
"""

import hashlib
import sys
from collections.abc import Generator, Mapping, Sequence
from typing import Any, Protocol

import grain
import numpy as np

from perceiver_ar.config import Config, DataConfig, ModelConfig
from perceiver_ar.data import copy, layouts, reading, records, tokens
from perceiver_ar.errors import UserError

# Independent random streams of one seed.
_SHUFFLE, _CROP = 0, 1


class DocumentSource(Protocol):
  """A split of a data set: complete token sequences, by index."""

  @property
  def kind(self) -> str: ...

  @property
  def variant(self) -> str: ...

  @property
  def vocab_size(self) -> int: ...

  @property
  def layout(self) -> dict[str, Any]: ...

  @property
  def fingerprint(self) -> str: ...

  @property
  def codec(self) -> tokens.Codec: ...

  @property
  def longest(self) -> int: ...

  @property
  def num_tokens(self) -> np.ndarray: ...

  @property
  def counts(self) -> dict[str, int]: ...

  def __len__(self) -> int: ...

  def __getitem__(self, index: int) -> np.ndarray: ...

  def info(self, index: int) -> records.DocumentInfo: ...


def open_documents(
  data: DataConfig, split: str, *, seed: int
) -> DocumentSource:
  if data.kind == 'copy':
    return copy.CopyDocuments(
      split,
      length=data.copy_length,
      offset=data.copy_offset,
      num_eval_documents=data.num_eval_documents,
      seed=seed,
    )
  return records.Documents(data.path, split)


def chosen_documents(num_documents: int, max_examples: int) -> list[int]:
  """All documents, or `max_examples` of them evenly spread over the split."""
  if not max_examples or max_examples >= num_documents:
    return list(range(num_documents))
  return [i * num_documents // max_examples for i in range(max_examples)]


def check_compatible(model: ModelConfig, documents: DocumentSource) -> None:
  """Raises unless the model has room for the data's ids and positions."""
  if model.vocab_size != documents.vocab_size:
    raise UserError(
      f'model.vocab_size {model.vocab_size} is not the vocabulary size '
      f'{documents.vocab_size} of the data; pass '
      f'--config.model.vocab_size={documents.vocab_size}'
    )
  if model.position_source != 'data':
    return
  num_axes = layouts.num_axes(documents.layout)
  if len(model.position_sizes) != num_axes:
    raise UserError(
      f'model.position_sizes {model.position_sizes} has '
      f'{len(model.position_sizes)} axes, and the positions of the data have '
      f'{num_axes}; give one size per axis'
    )
  # The last token of a document is never an input.
  largest = layouts.largest(documents.layout, documents.longest - 1)
  for size, last in zip(model.position_sizes, largest, strict=True):
    if size and last >= size:
      raise UserError(
        f'model.position_sizes {model.position_sizes} is too small for the '
        f'longest document, which needs {tuple(i + 1 for i in largest)}; '
        'raise it, or prepare shorter documents'
      )


def train_batches(
  config: Config,
  documents: DocumentSource,
  *,
  first_step: int,
  rows_b: Sequence[int] | np.ndarray,
) -> Generator[dict[str, np.ndarray]]:
  """Yields these rows of the batches first_step..num_steps-1.

  Each is {'tokens': int32 [b, M+1], padded with 0 on the left, 'positions':
  int32 [b, M, P] of the inputs, 0 on padding, 'bad_records': int32 [b], how
  many were damaged and skipped for a row}; `rows_b` are this host's of the
  global batch, in order.

  Raises:
    UserError: a record cannot be read, or too many are skipped.
  """
  host_rows = _HostRows(
    _rows(config, documents),
    batch_size=config.train.batch_size,
    first_step=first_step,
    num_steps=config.train.num_steps,
    rows_b=rows_b,
  )
  batches = (
    grain.MapDataset.source(host_rows)
    .to_iter_dataset(
      grain.ReadOptions(
        num_threads=config.data.num_read_threads,
        prefetch_buffer_size=config.data.prefetch,
      )
    )
    .batch(len(rows_b))
  )
  return _closing(iter(batches))


def _closing(batches: Any) -> Generator[dict[str, np.ndarray]]:
  # Grain's threads outlive an iterator that nobody closes.
  try:
    yield from batches
  finally:
    batches.close()


def _rows(config: Config, documents: DocumentSource) -> grain.MapDataset:
  """All rows of the run, in order: row i belongs to batch i // batch_size."""
  seed, model = config.train.seed, config.model
  visits = _visits(documents, config)
  rows = grain.MapDataset.source(range(len(visits)))
  if isinstance(visits, _Visits):  # else they are all alike: no order matters
    rows = rows.shuffle(_stream(seed, _SHUFFLE))
  reader = reading.Reader(documents, visits, skip=config.data.damaged == 'skip')
  crop = _Crop(
    reader, documents.layout, model.context_length, config.data.min_crop
  )
  return rows.repeat().random_map(crop, seed=_stream(seed, _CROP))


def _stream(seed: int, stream: int) -> int:
  # Grain adds the epoch to the seed of a shuffle, so that neighbouring seeds
  # would share whole epochs.
  return int(np.random.SeedSequence([stream, seed]).generate_state(1)[0])


class _Visits:
  """The visits of one epoch: the document that each of them reads.

  A document that is visited several times has that many visits in a row; only
  where each document's end is stored.
  """

  def __init__(self, counts: np.ndarray):
    self._ends = np.cumsum(counts)

  def __len__(self) -> int:
    return int(self._ends[-1])

  def __getitem__(self, index: int) -> int:
    return int(np.searchsorted(self._ends, index, side='right'))


def _visits(documents: DocumentSource, config: Config) -> reading.Indexed[int]:
  if isinstance(documents, copy.CopyDocuments):
    return range(len(documents))
  return _Visits(
    visit_counts(
      documents.num_tokens, config.data.visits, config.model.num_latents
    )
  )


def visit_counts(
  num_tokens: np.ndarray, visits: str, num_latents: int
) -> np.ndarray:
  """How often an epoch visits each document.

  By length, each token is a target about once per epoch, whatever the length
  of its document: a visit trains `num_latents` of them.
  """
  if visits == 'once':
    return np.ones_like(num_tokens)
  num_targets = num_tokens - 1
  return np.maximum(1, np.rint(num_targets / num_latents).astype(np.int64))


class _Crop(grain.transforms.RandomMap):
  """A visit as a row: a random crop, right-aligned, with its positions."""

  def __init__(
    self,
    reader: reading.Reader,
    layout: dict[str, Any],
    context_length: int,
    min_crop: int,
  ):
    self._reader = reader
    self._layout = layout
    self._num_axes = layouts.num_axes(layout)
    self._context_length = context_length
    self._min_crop = min_crop

  def random_map(
    self, element: int, rng: np.random.Generator
  ) -> dict[str, np.ndarray]:
    document_T, num_damaged = self._reader.read(element, rng)
    start, end = crop(
      len(document_T), rng, self._context_length + 1, self._min_crop + 1
    )
    tokens_T = np.zeros(self._context_length + 1, np.int32)
    positions_MP = np.zeros((self._context_length, self._num_axes), np.int32)
    tokens_T[start - end :] = document_T[start:end]
    inputs = np.arange(start, end - 1)
    positions_MP[len(positions_MP) - len(inputs) :] = layouts.positions(
      self._layout, inputs
    )
    return {
      'tokens': tokens_T,
      'positions': positions_MP,
      'bad_records': np.array(num_damaged, np.int32),
    }


def crop(
  length: int, rng: np.random.Generator, longest: int, shortest: int
) -> tuple[int, int]:
  """Where a crop of a document starts and ends.

  The end is uniform and as much as fits comes before it, so that every crop
  has all the context it can, and the first tokens are trained no more often
  than others.
  """
  shortest = min(max(shortest, 2), longest, length)
  end = int(rng.integers(shortest, length, endpoint=True))
  return max(0, end - longest), end


class _HostRows:
  """One host's rows, of one batch after the other."""

  def __init__(
    self,
    rows: Any,
    *,
    batch_size: int,
    first_step: int,
    num_steps: int,
    rows_b: Sequence[int] | np.ndarray,
  ):
    self._rows = rows
    self._batch_size = batch_size
    self._rows_b = [int(row) for row in rows_b]
    self._first_step = first_step
    self._num_batches = max(0, num_steps - first_step)

  def __len__(self) -> int:
    return self._num_batches * len(self._rows_b)

  def __getitem__(self, index: int) -> dict[str, np.ndarray]:
    batch, row = divmod(index, len(self._rows_b))
    step = self._first_step + batch
    at = step * self._batch_size + self._rows_b[row]
    assert at < sys.maxsize
    return self._rows[at]


def digest(
  batch: Mapping[str, np.ndarray], rows_b: Sequence[int] | np.ndarray
) -> int:
  """64 bits of some rows of a batch; of all rows they add up, modulo 2**64.

  Args:
    batch: as `train_batches` yields it.
    rows_b: what rows of the global batch these are.
  """
  total = 0
  for row, tokens_T, positions_MP in zip(
    rows_b, batch['tokens'], batch['positions'], strict=True
  ):
    hashed = hashlib.blake2b(int(row).to_bytes(8, 'little'), digest_size=8)
    hashed.update(tokens_T.astype('<i4').tobytes())
    hashed.update(positions_MP.astype('<i4').tobytes())
    total += int.from_bytes(hashed.digest(), 'little')
  return total % 2**64


def format_digest(value: int) -> str:
  return f'{value:016x}'
