"""The same held-out data under codes that everybody knows."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from perceiver_ar.config import Config
from perceiver_ar.data import image, pipeline, text
from perceiver_ar.errors import UserError
from perceiver_ar.report import baselines

MODEL = 'this model'
_MAX_VOCABULARY = 5_000  # of a bigram: V**2 numbers


@dataclasses.dataclass(frozen=True)
class Comparison:
  """Losses in the unit of the data, lower is better; the model's comes first.

  `total` is what the unit counts: losses times it are bits, or nats.
  """

  title: str
  unit: str
  values: dict[str, float]
  total: int
  note: str


def compare(config: Config, report: Mapping[str, Any]) -> Comparison:
  """Scores what was evaluated again, without a model.

  Args:
    config: of the run.
    report: of the evaluate command.

  Raises:
    UserError: nothing is known to compare with, or the data has changed.
  """
  if 'bits_per_byte' in report:
    return _text(config, report)
  if 'bits_per_dim' in report:
    return _images(config, report)
  if 'nats_per_event' in report:
    return _events(config, report)
  raise UserError(
    'the evaluated tokens stand for no text, picture or performance that '
    'anything else could code'
  )


def _text(config: Config, report: Mapping[str, Any]) -> Comparison:
  documents, chosen = _evaluated(config, report, 'bytes')
  assert isinstance(documents.codec, text.TextCodec)
  texts = (documents.codec.decode(documents[i]) for i in chosen)
  data = b''.join(content.encode() for content in texts)
  ours = {MODEL: report['bits_per_byte']}
  return Comparison(
    'Against compressors',
    'bits per byte',
    ours | baselines.bits_per_byte(data),
    len(data),
    'All on the same held-out bytes, in a row; fewer is better. Order 0 is '
    'the entropy of their own histogram: no code that looks at one byte at a '
    'time does better. The model has read the training split before, the '
    'compressors start from nothing.',
  )


def _images(config: Config, report: Mapping[str, Any]) -> Comparison:
  documents, chosen = _evaluated(config, report, 'dims')
  assert isinstance(documents.codec, image.ImageCodec)
  pictures = [documents.codec.decode(documents[i])[0] for i in chosen]
  bits = baselines.png_bits(pictures)
  values = {MODEL: report['bits_per_dim'], 'PNG': bits / report['num_dims']}
  return Comparison(
    'Against PNG',
    'bits per dimension',
    values | {'raw': 8.0},
    report['num_dims'],
    'The same held-out images, each as a PNG file that Pillow optimised; '
    'fewer is better.',
  )


def _events(config: Config, report: Mapping[str, Any]) -> Comparison:
  documents, chosen = _evaluated(config, report, 'events')
  if documents.vocab_size > _MAX_VOCABULARY:
    raise UserError(
      f'a vocabulary of {documents.vocab_size} is too large for bigrams'
    )
  train = pipeline.open_documents(config.data, 'train', seed=config.train.seed)
  nats = baselines.nats_of_ngrams(
    (train[i] for i in range(len(train))),
    [documents[i] for i in chosen],
    documents.vocab_size,
  )
  values = {MODEL: report['nats_per_event']}
  values |= {name: n / report['num_events'] for name, n in nats.items()}
  return Comparison(
    'Against bigrams',
    'nats per event',
    values,
    report['num_events'],
    'The same held-out events; fewer is better. The bigram, learned from the '
    'training split as the model is, knows one event of context.',
  )


def _evaluated(
  config: Config, report: Mapping[str, Any], unit: str
) -> tuple[pipeline.DocumentSource, list[int]]:
  """The split, and which of its documents were evaluated."""
  documents = pipeline.open_documents(
    config.data, report['split'], seed=config.train.seed
  )
  chosen = pipeline.chosen_documents(len(documents), report['num_documents'])
  tokens = int(documents.num_tokens[chosen].sum()) - len(chosen)
  if tokens != report['num_tokens']:
    raise UserError(
      f'{report["num_tokens"]} tokens were evaluated, and data.path '
      f'{config.data.path} now has {tokens} in as many documents of '
      f'{report["split"]}; evaluate again'
    )
  assert f'num_{unit}' in report
  return documents, chosen
