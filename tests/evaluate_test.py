"""Every held-out token is scored once, with the context it should have."""

import dataclasses
import json
import math
from typing import Any

import bad_records
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tiny import make_config, make_params, score

from perceiver_ar import evaluate, partitioning
from perceiver_ar.data import copy, layouts, pipeline, records
from perceiver_ar.errors import UserError
from perceiver_ar.evaluate import Block, Totals, document_blocks


class Documents:
  """A split held in memory, with what an evaluator asks of one."""

  layout = layouts.INDEX
  kind, variant = 'text', ''

  def __init__(self, lengths):
    rng = np.random.default_rng(0)
    self._tokens = [
      np.concatenate([[2], rng.integers(3, 31, length - 1)]).astype(np.int32)
      for length in lengths
    ]
    self.num_tokens = np.array(lengths, np.int64)

  def __len__(self):
    return len(self._tokens)

  def __getitem__(self, index):
    return self._tokens[index]

  def info(self, index):
    num = len(self._tokens[index])
    return records.DocumentInfo(
      name=str(index),
      num_tokens=num,
      counts={'bytes': 2 * num, 'words': num // 3},
    )

  @property
  def counts(self):
    num_tokens = self.num_tokens
    num_words = int((num_tokens // 3).sum())
    return {'bytes': int(2 * num_tokens.sum()), 'words': num_words}


def make_evaluator(documents, num_devices=1, changes=(), **how):
  flat = {f'evaluate.{name}': value for name, value in how.items()}
  config = make_config({'model.num_layers': 1, **flat, **dict(changes)})
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:num_devices])
  source: Any = documents
  return config, evaluate.Evaluator(config, source, mesh)


def run(documents, num_devices=1, **how):
  config, evaluator = make_evaluator(documents, num_devices, **how)
  return evaluator.run(make_params(config.model), visible=False)


def plain_nats(documents, M, N, S):
  """The definition, one window after the other, without any padding."""
  model = make_config(
    {'model.num_layers': 1, 'model.attention': 'reference'}
  ).model
  params, total = make_params(model), 0.0
  for tokens in (documents[i] for i in range(len(documents))):
    end = len(tokens) - 1
    while end > 0:
      begin = max(0, end - M)
      logits_NV = score(model)(
        params,
        jnp.asarray(tokens[None, begin:end]),
        jnp.arange(begin + 1, end + 1)[None, :, None],
        num_latents=min(N, end - begin),
      )[0]
      log_probs_NV = np.asarray(jax.nn.log_softmax(logits_NV), np.float64)
      scored = min(S, end)
      for back in range(scored):
        total -= log_probs_NV[-1 - back, tokens[end - back]]
      end -= scored
  return total


def test_blocks_score_every_target_once():
  for num_inputs in range(1, 40):
    for stride in range(1, 14):
      blocks = document_blocks(7, num_inputs, stride)
      scored = [
        target
        for block in blocks
        for target in range(block.end - block.num_scored, block.end)
      ]
      assert scored == list(range(num_inputs))
      assert all(block.num_scored == stride for block in blocks[1:])
      assert {block.document for block in blocks} == {7}


def test_blocks_are_the_published_ones():
  blocks = document_blocks(0, 10, 3)
  assert blocks == [
    Block(0, end, scored) for end, scored in ((1, 1), (4, 3), (7, 3), (10, 3))
  ]
  # With six inputs of context: [0:1], [0:4], [1:7], [4:10].
  assert [max(0, block.end - 6) for block in blocks] == [0, 0, 1, 4]


def test_a_host_reads_documents_of_its_own_rows_alone(monkeypatch):
  documents = Documents([5] * 8)
  _, evaluator = make_evaluator(documents, batch_size=4)
  rows = partitioning.HostRows(np.array([1, 3]), np.array([True, True]))
  monkeypatch.setattr(partitioning, 'host_rows', lambda mesh, total: rows)
  monkeypatch.setattr(partitioning, 'global_batch', lambda batch, *_: batch)
  read, reads = Documents.__getitem__, []
  monkeypatch.setattr(
    Documents,
    '__getitem__',
    lambda self, i: (reads.append(i), read(self, i))[1],
  )
  for first in (0, 4):
    batch = evaluator._batch(evaluator._blocks[first : first + 4])
    assert batch['tokens'].shape[0] == 2
  assert reads == [1, 3, 5, 7]


# The model was made for M = 24 and N = 8.
@pytest.mark.parametrize(
  ('M', 'N', 'S'),
  [
    (6, 4, 3),
    pytest.param(5, 2, 1, marks=pytest.mark.slow),
    pytest.param(30, 12, 5, marks=pytest.mark.slow),
  ],
)
def test_nats_are_those_of_the_definition(M, N, S):
  documents = Documents([2, 14])
  report = run(documents, context_length=M, num_latents=N, stride=S)
  assert report['num_tokens'] == 1 + 13
  assert report['nats_per_token'] * report['num_tokens'] == pytest.approx(
    plain_nats(documents, M, N, S), rel=1e-6
  )


@pytest.mark.parametrize('stride', [5, 20])
def test_the_stride_is_nothing_to_latents_that_see_everything(stride):
  documents = Documents([2, 21, 9, 20])
  wide = {'context_length': 20, 'num_latents': 20}
  exact = run(documents, stride=1, **wide)
  blocks = run(documents, stride=stride, **wide)
  assert blocks['num_tokens'] == exact['num_tokens'] == 1 + 20 + 8 + 19
  for name in ('nats_per_token', 'accuracy', 'bits_per_byte'):
    assert blocks[name] == pytest.approx(exact[name], rel=1e-6)


def test_the_batch_and_the_devices_are_nothing_to_the_result():
  documents = Documents([2, 50, 25, 8, 33])
  one = run(documents, batch_size=1, stride=3)
  for other in (
    run(documents, batch_size=7, stride=3),
    run(documents, batch_size=8, stride=3, num_devices=8),
  ):
    for name in ('nats_per_token', 'accuracy', 'word_perplexity'):
      assert other[name] == pytest.approx(one[name], rel=1e-6), name
    assert other['num_tokens'] == one['num_tokens'] == 113


def test_nothing_leaks_out_of_rows_that_are_padding():
  changes = {
    'model.position_encoding': 'learned',
    'model.position_sizes': (40,),
  }
  documents = Documents([10])
  config, evaluator = make_evaluator(documents, changes=changes, batch_size=4)
  batch = evaluator._batch(document_blocks(0, 9, 8))
  positions = np.array(batch['positions'])
  positions[2:] = 99  # not in the table, so that these rows are NaN
  tokens = np.array(batch['tokens'])
  tokens[2:, -3:] = 5
  batch |= {'positions': jnp.asarray(positions), 'tokens': jnp.asarray(tokens)}
  loss_BN, hits_BN = evaluator._step(make_params(config.model), batch)
  assert np.isfinite(loss_BN).all()
  assert (np.asarray(loss_BN[:2]) > 0).sum() == 9
  assert not np.asarray(loss_BN[2:]).any()
  assert not np.asarray(hits_BN[2:]).any()


def test_chosen_documents_are_spread_over_the_split():
  for num in range(1, 30):
    for limit in range(1, num + 3):
      chosen = pipeline.chosen_documents(num, limit)
      assert len(chosen) == min(num, limit)
      assert sorted(set(chosen)) == chosen
      assert set(np.diff(chosen)) <= {num // limit, num // limit + 1, 1}
      assert chosen[0] >= 0 and chosen[-1] < num
    assert pipeline.chosen_documents(num, 0) == list(range(num))


def test_the_copy_task_is_only_trained_on_without_end():
  documents = copy.CopyDocuments(
    'train', length=32, offset=0, num_eval_documents=4, seed=1
  )
  how = {'split': 'train', 'batch_size': 8}
  with pytest.raises(UserError, match='max_examples'):
    make_evaluator(documents, **how)
  _, evaluator = make_evaluator(documents, **how, max_examples=3)
  assert len(evaluator._blocks) == 3 * 4


def totals_of(nats, hits, tokens):
  totals = Totals(len(nats), longest=max(tokens) + 1, num_latents=4)
  totals.by_document[:] = np.stack([nats, hits, tokens], axis=-1)
  return totals


def counts_of(**each):
  return {u: (np.array(n), int(np.sum(n))) for u, n in each.items()}


def test_sums_come_in_the_units_of_the_data():
  totals = totals_of([20.0, 50.0], [3.0, 4.0], [10, 25])
  counts = counts_of(bytes=[40, 100], words=[7, 13], events=[5, 9], dims=[2, 3])
  report = evaluate.summarise(totals, counts)
  assert report['num_documents'] == 2
  assert report['num_tokens'] == 35
  assert report['accuracy'] == pytest.approx(7 / 35)
  assert report['nats_per_token'] == pytest.approx(70 / 35)
  assert report['bits_per_byte'] == pytest.approx(70 / math.log(2) / 140)
  assert report['bits_per_dim'] == pytest.approx(70 / math.log(2) / 5)
  assert report['nats_per_event'] == pytest.approx(70 / 14)
  assert report['word_perplexity'] == pytest.approx(math.exp(70 / 20))
  # Both documents have 2 nats a token, so nothing is uncertain about that.
  assert report['nats_per_token_standard_error'] == pytest.approx(0)
  assert report['word_perplexity_standard_error'] > 0


def test_published_counts_are_what_a_loss_is_divided_by():
  totals = totals_of([20.0, 50.0], [3.0, 4.0], [10, 25])
  report = evaluate.summarise(totals, {'words': (np.array([7, 13]), 40)})
  assert report['num_words'] == 40
  assert report['word_perplexity'] == pytest.approx(math.exp(70 / 40))
  own = evaluate.summarise(totals, counts_of(words=[7, 13]))
  assert report['word_perplexity_standard_error'] / report[
    'word_perplexity'
  ] == pytest.approx(
    own['word_perplexity_standard_error'] / own['word_perplexity'] / 2
  )


def test_units_that_the_data_lacks_are_left_out():
  totals = totals_of([20.0], [3.0], [10])
  report = evaluate.summarise(totals, counts_of(bytes=[0], words=[0]))
  assert 'bits_per_byte' not in report
  assert 'word_perplexity' not in report
  assert report['nats_per_token_standard_error'] is None


def test_the_standard_error_is_the_spread_of_repeated_evaluations():
  rng = np.random.default_rng(0)
  means, errors = [], []
  for _ in range(2000):
    count_D = rng.integers(20, 200, 40)
    total_D = count_D * rng.normal(2.0, 0.3, 40)
    mean, error = evaluate.ratio(total_D, count_D, count_D.sum())
    means.append(mean)
    errors.append(error)
  assert np.mean(errors) == pytest.approx(np.std(means), rel=0.06)


def test_word_perplexity_errs_as_its_logarithm():
  rng = np.random.default_rng(0)
  values, errors = [], []
  for _ in range(1000):
    words_D = rng.integers(200, 2000, 60)
    nats_D = words_D * rng.normal(4.0, 0.3, 60)
    totals = totals_of(nats_D, 0 * words_D, 5 * words_D)
    report = evaluate.summarise(totals, counts_of(words=words_D))
    values.append(report['word_perplexity'])
    errors.append(report['word_perplexity_standard_error'])
  assert np.mean(errors) == pytest.approx(np.std(values), rel=0.08)


def test_a_report_is_plain_json_and_says_how_it_was_made():
  config, evaluator = make_evaluator(Documents([5, 9]), stride=4)
  report = evaluator.run(make_params(config.model), visible=False)
  json.dumps(report, allow_nan=False)
  for name in ('split', 'stride', 'num_latents', 'context_length'):
    assert report[name] == dataclasses.asdict(config.evaluate)[name]


def test_buckets_of_positions_and_of_latents_hold_every_token_once():
  documents = Documents([5, 9, 30, 2])
  config, evaluator = make_evaluator(documents, stride=4)
  report = evaluator.run(make_params(config.model), visible=False)
  for name in ('by_position', 'by_latent'):
    buckets = report[name]
    assert sum(bucket['num_tokens'] for bucket in buckets) == 42
    nats = sum(b['num_tokens'] * b['nats_per_token'] for b in buckets)
    assert nats / 42 == pytest.approx(report['nats_per_token'])
  first = {b['first']: b['num_tokens'] for b in report['by_position']}
  # Indices of targets: 1; 2 and 3; 4 to 7; 8 to 15; 16 to 29.
  assert first == {1: 4, 2: 6, 4: 9, 8: 9, 16: 14}
  # The last 4 of 8 latents are scored.
  assert all(bucket['first'] >= 4 for bucket in report['by_latent'])


def test_copies_are_judged_by_their_second_half():
  documents = copy.CopyDocuments(
    'validation', length=32, offset=0, num_eval_documents=4, seed=1
  )
  config, evaluator = make_evaluator(
    documents, stride=8, changes={'model.vocab_size': 259}
  )
  report = evaluator.run(make_params(config.model), visible=False)
  # 15 mirrored tokens and EOS, of each.
  assert report['second_half']['num_tokens'] == 4 * 16
  last = report['by_position'][-1]
  assert last['first'] == 16
  assert report['second_half']['accuracy'] == last['accuracy']


def test_a_damaged_record_ends_an_evaluation_that_would_skip_in_training(
  tmp_path,
):
  path = bad_records.write_noise(tmp_path / 'data', size=40)
  changes = {
    'model.vocab_size': 259,
    'data.path': str(path),
    'data.damaged': 'skip',
  }
  bad_records.flip(path, 5, 'validation')
  documents = records.Documents(str(path), 'validation')
  config, evaluator = make_evaluator(documents, changes=changes, stride=8)
  with pytest.raises(
    UserError, match=r'validation\.array_record: record 5 \(5\.txt\)'
  ):
    evaluator.run(make_params(config.model), visible=False)
