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
import itertools
import math
import time
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh

from perceiver_ar import (
  distributed,
  host_reports,
  logical,
  mesh_checks,
  partitioning,
)
from perceiver_ar.config import Config
from perceiver_ar.data import copy, layouts, pipeline
from perceiver_ar.errors import UserError
from perceiver_ar.gradients import Batch, score_latents, shift
from perceiver_ar.parameters import Params
from perceiver_ar.progress import Progress
from perceiver_ar.stopping import Interrupted


@dataclasses.dataclass(frozen=True)
class Block:
  """The inputs before `end` of a document; its last `num_scored` are scored.

  `document` counts those that are evaluated.
  """

  document: int
  end: int
  num_scored: int


class Totals:
  """Sums of nats, of hits and of tokens, float64, in three ways.

  By document [D, 3], by the index of a token in its document [T, 3] and by
  latent, counted from the first [N, 3].
  """

  def __init__(self, num_documents: int, longest: int, num_latents: int):
    self.by_document = np.zeros((num_documents, 3))
    self.by_position = np.zeros((longest, 3))
    self.by_latent = np.zeros((num_latents, 3))

  def add(self, block: Block, loss_N: np.ndarray, hits_N: np.ndarray) -> None:
    """Adds the scored latents of a block, the last `num_scored` ones."""
    S = block.num_scored
    sums_S3 = np.stack([loss_N[-S:], hits_N[-S:], np.ones(S)], axis=-1)
    self.by_document[block.document] += sums_S3.sum(axis=0)
    # The input before `end` predicts the token at `end`.
    self.by_position[block.end + 1 - S : block.end + 1] += sums_S3
    self.by_latent[-S:] += sums_S3


def document_blocks(document: int, num_inputs: int, stride: int) -> list[Block]:
  """Blocks that score each of `num_inputs` targets once."""
  first = (num_inputs - 1) % stride + 1
  return [
    Block(document, end, first if end == first else stride)
    for end in range(first, num_inputs + 1, stride)
  ]


class Evaluator:
  """Evaluates parameters, again and again, on one split of a data set."""

  def __init__(
    self, config: Config, documents: pipeline.DocumentSource, mesh: Mesh
  ):
    self._config = config
    self._documents = documents
    self._mesh = mesh
    self._open = -1, np.zeros((0,), np.int32)
    self._exchange = host_reports.Exchange(mesh)
    self._error: UserError | None = None
    how = config.evaluate
    mesh_checks.check_evaluate(config, mesh)
    if isinstance(documents, copy.CopyDocuments) and how.split == 'train':
      _check_endless(how.max_examples)
    lengths = documents.num_tokens
    self._chosen = pipeline.chosen_documents(len(documents), how.max_examples)
    self._blocks = [
      block
      for at, i in enumerate(self._chosen)
      for block in document_blocks(at, int(lengths[i]) - 1, how.stride)
    ]
    self._step = make_score(config, mesh)

  def run(
    self,
    params: Params,
    *,
    visible: bool,
    asked: Callable[[], int] = lambda: 0,
  ) -> dict[str, Any]:
    """Scores all blocks; a dict of plain numbers that goes into JSON.

    Args:
      params: as the train state holds them.
      visible: whether this process shows progress.
      asked: is called with every batch, and gives the signal that asks this
        process to end, or 0.

    Raises:
      Interrupted: some process is asked to end; on all after the same batch.
      UserError: a record cannot be read: fewer of them have another score.
    """
    start = time.monotonic()
    how = self._config.evaluate
    longest = int(self._documents.num_tokens[self._chosen].max())
    totals = Totals(len(self._chosen), longest, how.num_latents)
    batch_size = how.batch_size
    waiting: tuple[list[Block], Any, Any] | None = None
    with Progress(
      f'evaluate {how.split}',
      len(self._blocks),
      'blocks',
      visible=visible,
    ) as progress:
      for first in range(0, len(self._blocks), batch_size):
        blocks = self._blocks[first : first + batch_size]
        batch = self._batch(blocks)
        distributed.collective(f'scores of blocks from {first}')
        scores = self._step(params, batch)
        sent = self._exchange.send(
          host_reports.Report(stop=asked(), failed=self._error is not None),
          f'blocks from {first}',
        )
        # The device works on these while the host adds up those before.
        if waiting:
          self._check(waiting[2])
          _add(totals, *waiting[:2])
        waiting = blocks, scores, sent
        progress.advance(len(blocks))
      if waiting:
        self._check(waiting[2])
        _add(totals, *waiting[:2])
    report = summarise(totals, self._counts())
    if isinstance(self._documents, copy.CopyDocuments):
      # What the task is about: the first half is noise.
      half = totals.by_position[longest // 2 :].sum(axis=0)
      report['second_half'] = _means(half)
    return report | {
      'split': how.split,
      'kind': self._documents.kind,
      'variant': self._documents.variant,
      'stride': how.stride,
      'num_latents': how.num_latents,
      'context_length': how.context_length,
      'seconds': round(time.monotonic() - start, 3),
    }

  def _check(self, sent: Any) -> None:
    """Ends all processes together where one must."""
    reports = self._exchange.read(sent)
    if number := max(report.stop for report in reports):
      raise Interrupted(number)
    if any(report.failed for report in reports):
      if self._error is not None:
        raise self._error
      distributed.barrier('data')  # which says who has left

  def _counts(self) -> dict[str, tuple[np.ndarray, int]]:
    """Of every unit: how many each document has, and how many there are.

    The whole split may have another number than its documents: the one that
    published results are divided by.
    """
    documents = self._documents
    infos = [documents.info(i) for i in self._chosen]
    counts = {}
    for unit in infos[0].counts:
      each_D = np.array([info.counts[unit] for info in infos])
      total = int(each_D.sum())
      if len(infos) == len(documents):
        total = documents.counts[unit]
      counts[unit] = each_D, total
    return counts

  def _batch(self, blocks: list[Block]) -> Batch:
    """Right-aligned rows, and empty ones up to the batch size.

    A process reads only the documents of its own rows.
    """
    how, layout = self._config.evaluate, self._documents.layout
    B, M, P = how.batch_size, how.context_length, layouts.num_axes(layout)
    rows_b = partitioning.host_rows(self._mesh, B).rows_b
    tokens_bT = np.zeros((len(rows_b), M + 1), np.int32)
    positions_bMP = np.zeros((len(rows_b), M, P), np.int32)
    num_scored_b = np.zeros((len(rows_b),), np.int32)
    for at, row in enumerate(rows_b[rows_b < len(blocks)]):
      block = blocks[row]
      try:
        tokens = self._tokens(block.document)
      except UserError as error:
        self._error = error
        break
      begin = max(0, block.end - M)
      num = block.end - begin
      tokens_bT[at, M - num :] = tokens[begin : block.end + 1]
      positions_bMP[at, M - num :] = layouts.positions(
        layout, np.arange(begin, block.end)
      )
      num_scored_b[at] = block.num_scored
    batch = {
      'tokens': tokens_bT,
      'positions': positions_bMP,
      'num_scored': num_scored_b,
    }
    return partitioning.global_batch(batch, self._mesh, B)

  def _tokens(self, document: int) -> np.ndarray:
    if document != self._open[0]:
      # Kept, because the next batch goes on in the same document.
      self._open = document, self._documents[self._chosen[document]]
    return self._open[1]


def _check_endless(max_examples: int) -> None:
  if not max_examples:
    raise UserError(
      'the train split of the copy task never ends; set '
      'evaluate.max_examples (--max_examples), or evaluate another split'
    )


def make_score(
  config: Config, mesh: Mesh
) -> Callable[[Params, Batch], tuple[jax.Array, jax.Array]]:
  """The compiled function (params, batch with `num_scored` [B]) -> scores."""

  def score(params: Params, batch: Batch) -> tuple[jax.Array, jax.Array]:
    return _score(params, batch, config=config, mesh=mesh)

  return jax.jit(score, out_shardings=partitioning.replicated(mesh))


def _score(
  params: Params, batch: Batch, *, config: Config, mesh: Mesh
) -> tuple[jax.Array, jax.Array]:
  """Nats and hits of every scored latent, [B, N] float32, 0 elsewhere."""
  N = config.evaluate.num_latents
  inputs_BM, targets_BN, weights_BN = shift(batch['tokens'], N)
  with logical.activations(
    mesh, config.mesh.rules, num_rows=len(inputs_BM), num_latents=N
  ):
    scores = score_latents(
      params,
      inputs_BM,
      batch['positions'],
      targets_BN,
      config.model,
      z_loss=0.0,
      label_smoothing=0.0,
    )
  from_end_N = N - jnp.arange(N)
  weights_BN *= from_end_N[None] <= batch['num_scored'][:, None]
  # A weight of zero must also silence what is not finite.
  return (
    jnp.where(weights_BN > 0, scores['loss'], 0.0),
    scores['correct'] * weights_BN,
  )


def _add(totals: Totals, blocks: list[Block], scores: Any) -> None:
  loss_BN, hits_BN = (np.asarray(x, np.float64) for x in scores)
  for row, block in enumerate(blocks):
    totals.add(block, loss_BN[row], hits_BN[row])


# What a loss is per, by what a data set counts: its name, and the nats of one.
_UNITS = {
  'bytes': ('bits_per_byte', math.log(2)),
  'dims': ('bits_per_dim', math.log(2)),
  'events': ('nats_per_event', 1.0),
}


def summarise(
  totals: Totals, counts: dict[str, tuple[np.ndarray, int]]
) -> dict[str, Any]:
  """Sums over documents in the units of the data, with standard errors.

  Args:
    totals: of all blocks.
    counts: by unit, the number in each document [D] and the total to divide
      by.
  """
  nats_D, hits_D, tokens_D = totals.by_document.T
  num_tokens = int(tokens_D.sum())
  report: dict[str, Any] = {
    'num_documents': len(nats_D),
    'num_tokens': num_tokens,
  }
  report |= {f'num_{unit}': total for unit, (_, total) in counts.items()}
  report |= _with_error('nats_per_token', *ratio(nats_D, tokens_D, num_tokens))
  report['accuracy'] = float(hits_D.sum() / num_tokens)
  for unit, (each_D, total) in counts.items():
    if not total:
      continue
    if unit in _UNITS:
      name, nats = _UNITS[unit]
      report |= _with_error(name, *ratio(nats_D / nats, each_D, total))
    if unit == 'words':
      per_word, error = ratio(nats_D, each_D, total)
      perplexity = math.exp(min(per_word, 700.0))
      error = error and perplexity * error
      report |= _with_error('word_perplexity', perplexity, error)
  return report | {
    'by_position': _buckets(totals.by_position, _doubling),
    'by_latent': _buckets(totals.by_latent, _sixteenths),
  }


def _with_error(
  name: str, value: float, error: float | None
) -> dict[str, float | None]:
  return {name: value, f'{name}_standard_error': error}


def _buckets(
  sums_T3: np.ndarray, edges: Callable[[int], list[int]]
) -> list[dict[str, Any]]:
  """Means of ranges [first, end), without those where nothing is scored."""
  bounds = edges(len(sums_T3))
  return [
    {'first': first, 'end': end} | _means(sums_T3[first:end].sum(axis=0))
    for first, end in itertools.pairwise(bounds)
    if sums_T3[first:end, 2].any()
  ]


def _doubling(length: int) -> list[int]:
  """0, 1, 2, 4, ... and the length."""
  return [0, *(1 << i for i in range((length - 1).bit_length())), length]


def _sixteenths(length: int) -> list[int]:
  return sorted({i * length // 16 for i in range(17)})


def _means(sums_3: np.ndarray) -> dict[str, Any]:
  nats, hits, num = (float(x) for x in sums_3)
  return {
    'num_tokens': int(num),
    'nats_per_token': nats / num,
    'accuracy': hits / num,
  }


def ratio(
  total_D: np.ndarray, count_D: np.ndarray, count: int
) -> tuple[float, float | None]:
  """sum(total) / count and its standard error over D documents.

  The error is that of a ratio estimator (Cochran 1977, section 6.4); None
  for a single document.

  Args:
    total_D: what is measured, of each document.
    count_D: how much of it there is, of each document.
    count: the sum of `count_D`, or what is published in its place.
  """
  mean = total_D.sum() / count
  D = len(total_D)
  if D < 2:
    return float(mean), None
  own = total_D.sum() / count_D.sum()
  spread = np.square(total_D - own * count_D).sum() * D / (D - 1)
  return float(mean), float(math.sqrt(spread) / count)
