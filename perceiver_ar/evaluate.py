"""Exact held-out likelihood: every token of every document scored once.

A document is cut into blocks of `stride` targets, counted from its end, so
that only the first block may be short. A block is predicted with as much left
context as fits, by its last `stride` latents; the others give those latents
their depth. Stride 1 is the exact likelihood under a full set of latents at
every token, and as slow as it sounds.

Sums are taken per document in float64 on the host, so the result does not
depend on the batch size.

Letters: B batch, M inputs, N latents, T tokens, P position axes.
"""

import dataclasses
import functools
import math
import time
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from perceiver_ar import losses, partitioning
from perceiver_ar.config import Config
from perceiver_ar.data import layouts
from perceiver_ar.data.copy import CopyDocuments
from perceiver_ar.data.pipeline import DocumentSource
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR
from perceiver_ar.progress import Progress
from perceiver_ar.train_step import Batch, Params, shift


@dataclasses.dataclass(frozen=True)
class Block:
  """The inputs before `end` of a document; its last `num_scored` are scored."""

  document: int
  end: int
  num_scored: int


@dataclasses.dataclass
class Totals:
  """Sums over one document, float64."""

  nats: float = 0.0
  correct: float = 0.0
  num_tokens: int = 0


def document_blocks(document: int, num_inputs: int, stride: int) -> list[Block]:
  """Blocks that score each of `num_inputs` targets once."""
  first = (num_inputs - 1) % stride + 1
  return [
    Block(document, end, first if end == first else stride)
    for end in range(first, num_inputs + 1, stride)
  ]


def chosen_documents(num_documents: int, max_examples: int) -> list[int]:
  """All documents, or `max_examples` of them evenly spread over the split."""
  if not max_examples or max_examples >= num_documents:
    return list(range(num_documents))
  return [i * num_documents // max_examples for i in range(max_examples)]


class Evaluator:
  """Evaluates parameters, again and again, on one split of a data set."""

  def __init__(self, config: Config, documents: DocumentSource, mesh: Mesh):
    self._config = config
    self._documents = documents
    self._mesh = mesh
    self._open = -1, np.zeros((0,), np.int32)
    how = config.evaluate
    partitioning.check_batch('evaluate.batch_size', how.batch_size, mesh)
    if isinstance(documents, CopyDocuments) and how.split == 'train':
      _check_endless(how.max_examples)
    lengths = documents.num_tokens
    self._chosen = chosen_documents(len(documents), how.max_examples)
    self._blocks = [
      block
      for i in self._chosen
      for block in document_blocks(i, int(lengths[i]) - 1, how.stride)
    ]
    self._step = jax.jit(
      functools.partial(_score, config=config, mesh=mesh),
      out_shardings=partitioning.replicated(mesh),
    )

  def run(self, params: Params, *, visible: bool) -> dict[str, Any]:
    """Scores all blocks; a dict of plain numbers that goes into JSON.

    Args:
      params: as the train state holds them.
      visible: whether this process shows progress.
    """
    start = time.monotonic()
    totals = {i: Totals() for i in self._chosen}
    batch_size = self._config.evaluate.batch_size
    waiting: tuple[list[Block], Any] | None = None
    with Progress(
      f'evaluate {self._config.evaluate.split}',
      len(self._blocks),
      'blocks',
      visible=visible,
    ) as progress:
      for first in range(0, len(self._blocks), batch_size):
        blocks = self._blocks[first : first + batch_size]
        scores = self._step(params, self._batch(blocks))
        # The device works on these while the host adds up those before.
        if waiting:
          _add(totals, *waiting)
        waiting = blocks, scores
        progress.advance(len(blocks))
      if waiting:
        _add(totals, *waiting)
    report = summarise(
      list(totals.values()), [self._documents.info(i) for i in self._chosen]
    )
    how = self._config.evaluate
    return report | {
      'split': how.split,
      'stride': how.stride,
      'num_latents': how.num_latents,
      'context_length': how.context_length,
      'seconds': round(time.monotonic() - start, 3),
    }

  def _batch(self, blocks: list[Block]) -> Batch:
    """Right-aligned rows, and empty ones up to the batch size."""
    how, layout = self._config.evaluate, self._documents.layout
    B, M, P = how.batch_size, how.context_length, layouts.num_axes(layout)
    tokens_BT = np.zeros((B, M + 1), np.int32)
    positions_BMP = np.zeros((B, M, P), np.int32)
    num_scored_B = np.zeros((B,), np.int32)
    for row, block in enumerate(blocks):
      if block.document != self._open[0]:
        # Kept, because the next batch goes on in the same document.
        self._open = block.document, self._documents[block.document]
      tokens = self._open[1]
      begin = max(0, block.end - M)
      num = block.end - begin
      tokens_BT[row, M - num :] = tokens[begin : block.end + 1]
      positions_BMP[row, M - num :] = layouts.positions(
        layout, np.arange(begin, block.end)
      )
      num_scored_B[row] = block.num_scored
    batch = {
      'tokens': tokens_BT,
      'positions': positions_BMP,
      'num_scored': num_scored_B,
    }
    return partitioning.global_batch(batch, self._mesh)


def _check_endless(max_examples: int) -> None:
  if not max_examples:
    raise UserError(
      'the train split of the copy task never ends; set '
      'evaluate.max_examples (--max_examples), or evaluate another split'
    )


def _score(
  params: Params, batch: Batch, *, config: Config, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Nats and hits of every scored latent, [B, N] float32, 0 elsewhere."""
  N = config.evaluate.num_latents
  inputs_BM, targets_BN, weights_BN = shift(batch['tokens'], N)
  with partitioning.activations(mesh, config.mesh.rules):
    logits_BNV = PerceiverAR(config.model).apply(
      {'params': params}, inputs_BM, batch['positions'], num_latents=N
    )
  assert isinstance(logits_BNV, jax.Array)
  loss_BN, _ = losses.softmax_cross_entropy(
    logits_BNV, targets_BN, z_loss=0.0, label_smoothing=0.0
  )
  from_end_N = N - jnp.arange(N)
  weights_BN *= from_end_N[None] <= batch['num_scored'][:, None]
  hits_BN = logits_BNV.argmax(-1) == targets_BN
  # A weight of zero must also silence what is not finite.
  return (
    jnp.where(weights_BN > 0, loss_BN, 0.0),
    hits_BN * weights_BN,
  )


def _add(totals: dict[int, Totals], blocks: list[Block], scores: Any) -> None:
  loss_BN, hits_BN = (np.asarray(x, np.float64) for x in scores)
  for row, block in enumerate(blocks):
    total = totals[block.document]
    total.nats += loss_BN[row].sum()
    total.correct += hits_BN[row].sum()
    total.num_tokens += block.num_scored


def summarise(totals: list[Totals], infos: list[Any]) -> dict[str, Any]:
  """Sums over documents in the units of the data, with standard errors."""
  nats = np.array([total.nats for total in totals])
  tokens = np.array([total.num_tokens for total in totals])
  num_bytes = np.array([info.num_bytes for info in infos])
  num_words = np.array([info.num_words for info in infos])
  report: dict[str, Any] = {
    'num_documents': len(totals),
    'num_tokens': int(tokens.sum()),
    'num_bytes': int(num_bytes.sum()),
    'num_words': int(num_words.sum()),
  }
  mean, error = ratio(nats, tokens)
  report |= {'nats_per_token': mean, 'nats_per_token_standard_error': error}
  correct = float(sum(total.correct for total in totals))
  report['accuracy'] = correct / report['num_tokens']
  if num_bytes.sum():
    bits, error = ratio(nats / math.log(2), num_bytes)
    report |= {'bits_per_byte': bits, 'bits_per_byte_standard_error': error}
  if num_words.sum():
    per_word, error = ratio(nats, num_words)
    perplexity = math.exp(min(per_word, 700.0))
    report |= {
      'word_perplexity': perplexity,
      'word_perplexity_standard_error': error and perplexity * error,
    }
  return report


def ratio(
  total_D: np.ndarray, count_D: np.ndarray
) -> tuple[float, float | None]:
  """sum(total) / sum(count) and its standard error over D documents.

  The error is that of a ratio estimator (Cochran 1977, section 6.4); None
  for a single document.
  """
  mean = total_D.sum() / count_D.sum()
  D = len(total_D)
  if D < 2:
    return float(mean), None
  spread = np.square(total_D - mean * count_D).sum() * D / (D - 1)
  return float(mean), float(math.sqrt(spread) / count_D.sum())
