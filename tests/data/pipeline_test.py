import threading

import bad_records
import numpy as np
import pytest

from perceiver_ar.data import pipeline, tokens
from perceiver_ar.errors import UserError

_LENGTHS = (2, 3, 9, 17, 18, 40, 60)  # 7 documents, 12 batches of 8: 13 epochs


@pytest.fixture
def open_train(make_config, write_data):
  """`open_train(changes, ...)`: a config, and the documents to train on."""

  def open_(changes=(), lengths=_LENGTHS, **options):
    path = write_data(lengths, **options)
    config = make_config({'data.path': str(path), **dict(changes)})
    seed = config.train.seed
    return config, pipeline.open_documents(config.data, 'train', seed=seed)

  return open_


def _batches(config, documents, first_step=0, rows_b=None):
  return list(
    pipeline.train_batches(
      config,
      documents,
      first_step=first_step,
      rows_b=rows_b or range(config.train.batch_size),
    )
  )


def _assert_same(one, other):
  assert len(one) == len(other)
  for a, b in zip(one, other, strict=True):
    assert a.keys() == b.keys() == {'tokens', 'positions', 'bad_records'}
    for name in a:
      np.testing.assert_array_equal(a[name], b[name])


def _differ(one, other) -> bool:
  return any(
    (a['tokens'] != b['tokens']).any() for a, b in zip(one, other, strict=True)
  )


def _document(tokens_T, positions_MP) -> int:
  """Which document of `write_data` a row with noise in it is from."""
  at = np.flatnonzero(tokens_T[:-1] >= tokens.NUM_RESERVED)[0]
  noise = int(tokens_T[at]) - 3 - (int(positions_MP[at, 0]) - 2)
  return noise % 256 // 7


@pytest.mark.parametrize('kind', ['prepared', 'copy'])
@pytest.mark.parametrize(
  'hosts', [[range(4), range(4, 8)], [[0, 1, 6, 7], [2], [3, 4, 5]]]
)
def test_hosts_share_the_rows_of_one_global_batch(open_train, kind, hosts):
  config, documents = open_train({'data.kind': kind, 'data.copy_length': 20})
  whole = _batches(config, documents)
  parts = [_batches(config, documents, 0, rows_b) for rows_b in hosts]
  for step, batch in enumerate(whole):
    shares = []
    for rows_b, part in zip(hosts, parts, strict=True):
      wanted = {k: v[list(rows_b)] for k, v in batch.items()}
      _assert_same([part[step]], [wanted])
      shares.append(pipeline.digest(part[step], rows_b))
    assert sum(shares) % 2**64 == pipeline.digest(batch, range(8))


def test_a_host_reads_documents_of_its_own_rows_alone(open_train, monkeypatch):
  config, documents = open_train()
  source, reads = type(documents), []
  read = source.__getitem__
  monkeypatch.setattr(
    source, '__getitem__', lambda self, i: (reads.append(i), read(self, i))[1]
  )
  for rows_b in ([1, 6], [0, 2, 3, 4, 5, 7]):
    reads.clear()
    batches = _batches(config, documents, 0, rows_b)
    assert len(reads) == len(batches) * len(rows_b)


@pytest.mark.parametrize('kind', ['prepared', 'copy'])
@pytest.mark.parametrize('first_step', [1, 5, 11, 12, 13])
def test_a_run_continues_at_any_step(open_train, kind, first_step):
  config, documents = open_train({'data.kind': kind, 'data.copy_length': 20})
  expected = _batches(config, documents)[first_step:]
  _assert_same(_batches(config, documents, first_step), expected)


def test_batches_depend_on_the_seed_and_not_on_how_they_are_read(open_train):
  config, documents = open_train()
  expected = _batches(config, documents)
  for changes in (
    {'train.num_steps': 20},
    {'data.num_read_threads': 4, 'data.prefetch': 1},
    {'train.num_microbatches': 4},
  ):
    same, _ = open_train(changes)
    _assert_same(_batches(same, documents)[:12], expected)
  other, _ = open_train({'train.seed': 2})
  assert _differ(_batches(other, documents), expected)


def test_neighbouring_seeds_share_no_epoch(open_train):
  lengths = [40] * 24  # an epoch of three batches
  config, documents = open_train({'data.visits': 'once'}, lengths)
  other, _ = open_train({'data.visits': 'once', 'train.seed': 2}, lengths)

  def orders(batches):
    visited = [
      _document(tokens_T, positions_MP)
      for batch in batches
      for tokens_T, positions_MP in zip(
        batch['tokens'], batch['positions'], strict=True
      )
    ]
    return {tuple(epoch.tolist()) for epoch in np.reshape(visited, (-1, 24))}

  first = orders(_batches(config, documents))
  assert len(first) == 4  # each epoch has an order of its own
  assert not first & orders(_batches(other, documents))


def test_an_epoch_visits_every_document_once(open_train):
  lengths = [40] * 24
  config, documents = open_train({'data.visits': 'once'}, lengths)
  batches = _batches(config, documents)
  for epoch in range(4):
    visited = [
      _document(tokens_T, positions_MP)
      for batch in batches[3 * epoch : 3 * epoch + 3]
      for tokens_T, positions_MP in zip(
        batch['tokens'], batch['positions'], strict=True
      )
    ]
    assert sorted(visited) == list(range(24))


def test_an_epoch_by_length_visits_long_documents_more_often(open_train):
  lengths = (3, 41, 22, 6)  # of 4 latents: 1, 10, 5 and 1 visits
  config, documents = open_train(
    {'data.visits': 'by_length', 'train.batch_size': 17}, lengths
  )
  counts = pipeline.visit_counts(documents.num_tokens, 'by_length', 4)
  assert counts.tolist() == [1, 10, 5, 1]
  for batch in _batches(config, documents):
    visited = [
      _document(tokens_T, positions_MP)
      for tokens_T, positions_MP in zip(
        batch['tokens'], batch['positions'], strict=True
      )
    ]
    assert np.bincount(visited).tolist() == [1, 10, 5, 1]


@pytest.mark.parametrize(
  'layout',
  [
    {'kind': 'index'},
    {'kind': 'table', 'rows': [[1 + i // 8, 1 + i % 8] for i in range(60)]},
  ],
)
def test_rows_are_right_aligned_and_keep_the_positions_of_their_document(
  open_train, layout
):
  config, documents = open_train(positions=layout)
  contents = [documents[d].tolist() for d in range(len(documents))]
  seen = set()
  for batch in _batches(config, documents):
    assert batch['tokens'].dtype == batch['positions'].dtype == np.int32
    assert batch['tokens'].shape == (8, 17)
    num_axes = 1 if layout['kind'] == 'index' else 2
    assert batch['positions'].shape == (8, 16, num_axes)
    for tokens_T, positions_MP in zip(
      batch['tokens'], batch['positions'], strict=True
    ):
      crop = tokens_T[tokens_T > 0].tolist()
      padding = 17 - len(crop)
      assert len(crop) >= 2 and not tokens_T[:padding].any()
      assert not positions_MP[:padding].any()
      ids = positions_MP[padding:].tolist()
      if layout['kind'] == 'index':
        start = ids[0][0] - 1
        expected = [[start + 1 + i] for i in range(len(ids))]
      else:
        start = layout['rows'].index(ids[0])
        expected = layout['rows'][start : start + len(ids)]
      assert len(ids) == len(crop) - 1 and ids == expected
      found = [c[start : start + len(crop)] == crop for c in contents]
      assert any(found)
      seen.add(found.index(True))
  assert seen == set(range(len(contents)))


def _ends(length: int, longest: int, shortest: int) -> np.ndarray:
  rng = np.random.default_rng(0)
  crops = [pipeline.crop(length, rng, longest, shortest) for _ in range(5_000)]
  assert {start for start, _ in crops} == {
    max(0, end - longest) for _, end in crops
  }
  return np.bincount([end for _, end in crops], minlength=length + 1)


def test_the_end_of_a_crop_is_uniform():
  counts = _ends(length=30, longest=17, shortest=5)
  assert not counts[:5].any()
  # 26 ends, so 192 each with a standard deviation of 13.6.
  assert np.abs(counts[5:] - 5_000 / 26).max() < 5 * 13.6


def test_first_tokens_are_targets_no_more_often_than_others():
  num_latents = 4
  ends = _ends(length=30, longest=17, shortest=num_latents + 1)
  visits = np.zeros(30)
  for end, count in enumerate(ends):
    visits[max(0, end - num_latents) : end] += count
  assert visits[0] == 0  # SOS is no target
  # All that N targets per crop leave to the ends is fewer, never more.
  assert visits.max() < 1.25 * visits[num_latents:-num_latents].mean()


@pytest.mark.parametrize('length', [2, 3, 5])
def test_short_documents_are_whole(length):
  ends = _ends(length, longest=17, shortest=5)
  assert ends[length] == 5_000


def test_a_short_context_bounds_the_shortest_crop():
  counts = _ends(length=30, longest=4, shortest=9)
  assert not counts[:4].any() and counts[4:].all()
  assert _ends(length=30, longest=17, shortest=0)[:3].tolist()[:2] == [0, 0]


def test_the_digest_knows_every_row_token_and_position(open_train):
  config, documents = open_train()
  batch = _batches(config, documents)[0]
  del batch['bad_records']
  digests = {
    pipeline.digest(batch, range(8)),
    pipeline.digest(batch, range(8, 16)),
  }
  for name in batch:
    changed = {k: v.copy() for k, v in batch.items()}
    changed[name][3, -1] += 1
    digests.add(pipeline.digest(changed, range(8)))
  swapped = {k: v[[1, 0, *range(2, 8)]] for k, v in batch.items()}
  digests.add(pipeline.digest(swapped, range(8)))
  assert len(digests) == 5
  assert all(0 <= value < 2**64 for value in digests)


def test_digests_are_written_with_sixteen_digits():
  assert pipeline.format_digest(255) == '00000000000000ff'
  assert pipeline.format_digest(2**64 - 1) == 'f' * 16


@pytest.fixture
def damaged(make_config, tmp_path):
  """A config and documents, two of which are damaged, and a sound copy."""

  def open_(path, damaged):
    config = make_config(
      {'data.path': str(path), 'data.damaged': damaged, 'train.num_steps': 40}
    )
    return config, pipeline.open_documents(config.data, 'train', seed=1)

  sound = bad_records.write_noise(tmp_path / 'sound', num_documents=90)
  path = bad_records.write_noise(tmp_path / 'damaged', num_documents=90)
  for index in (2, 5):
    bad_records.flip(path, index)
  return {
    'sound': open_(sound, 'stop'),
    'skip': open_(path, 'skip'),
    'stop': open_(path, 'stop'),
  }


def test_a_damaged_record_is_named_in_the_middle_of_training(damaged):
  with pytest.raises(
    UserError,
    match=r'train\.array_record: record (2|5) .*config\.data\.damaged=skip',
  ) as caught:
    _batches(*damaged['stop'])
  assert '\n' not in str(caught.value)


def test_rows_of_damaged_records_are_replaced_and_no_others(damaged):
  sound, found = _batches(*damaged['sound']), _batches(*damaged['skip'])
  num_bad = 0
  for a, b in zip(sound, found, strict=True):
    assert not a['bad_records'].any()
    for row, bad in enumerate(b['bad_records']):
      assert (a['tokens'][row] == b['tokens'][row]).all() == (bad == 0)
      num_bad += bad
  assert num_bad >= 40 * 8 // 90 * 2 - 2  # each of both once in an epoch


@pytest.mark.parametrize('first_step', [0, 7, 21])
def test_any_hosts_and_any_resumption_replace_them_alike(damaged, first_step):
  config, documents = damaged['skip']
  whole = _batches(config, documents)[first_step:]
  assert sum(int(batch['bad_records'].sum()) for batch in whole) > 1
  for rows_b in ([0, 5, 6], [1, 2, 3, 4, 7]):
    part = _batches(config, documents, first_step, rows_b)
    _assert_same(part, [{k: v[rows_b] for k, v in x.items()} for x in whole])


def test_a_file_that_is_cut_during_training_is_named(open_train):
  config, documents = open_train({'train.num_steps': 10_000}, [20_000] * 20)
  batches = pipeline.train_batches(
    config, documents, first_step=0, rows_b=range(config.train.batch_size)
  )
  next(batches)
  (documents.folder / 'train.array_record').write_bytes(b'')
  with pytest.raises(UserError, match=r'train\.array_record: record [0-9]+ '):
    for _ in batches:
      pass


def test_no_thread_outlives_its_iterator(open_train):
  config, documents = open_train()

  def readers():
    return [t for t in threading.enumerate() if 'grain' in t.name]

  batches = pipeline.train_batches(
    config, documents, first_step=0, rows_b=range(config.train.batch_size)
  )
  next(batches)
  running = readers()
  assert running
  batches.close()  # type: ignore[attr-defined]
  for thread in running:
    thread.join(timeout=5)
  assert not readers()


def test_data_must_fit_the_model(open_train):
  sizes = 'model.position_sizes'
  learned = {'model.position_encoding': 'learned', sizes: (60,)}
  for changes, match in (
    ({}, None),
    ({'model.vocab_size': 300}, '--config.model.vocab_size=259'),
    (learned, None),
    ({**learned, sizes: (59,)}, r'longest document, which needs \(60,\)'),
    ({**learned, sizes: (60, 4)}, '2 axes, and the positions of the data'),
    (
      {**learned, sizes: (17,), 'model.position_source': 'from_end'},
      None,
    ),
  ):
    config, documents = open_train(changes)
    if match is None:
      pipeline.check_compatible(config.model, documents)
    else:
      with pytest.raises(UserError, match=match):
        pipeline.check_compatible(config.model, documents)


def test_copy_documents_come_in_order_and_never_end(make_config):
  config = make_config(
    {
      'data.kind': 'copy',
      'data.copy_length': 18,
      'model.context_length': 17,
      'data.min_crop': 17,
    }
  )
  documents = pipeline.open_documents(config.data, 'train', seed=1)
  tokens = np.concatenate([b['tokens'] for b in _batches(config, documents)])
  expected = np.stack([documents[i] for i in range(96)])
  np.testing.assert_array_equal(tokens, expected)
