import numpy as np
import pytest

from perceiver_ar.data import copy, tokens
from perceiver_ar.errors import UserError


def _documents(split: str, **changes) -> copy.CopyDocuments:
  options = {'length': 34, 'offset': 0, 'num_eval_documents': 5, 'seed': 1}
  return copy.CopyDocuments(split, **options | changes)


def test_the_second_half_mirrors_the_first():
  for index in (0, 1, 2**31 - 2):
    tokens_T = _documents('train')[index]
    assert tokens_T.dtype == np.int32 and len(tokens_T) == 34
    assert (tokens_T[0], tokens_T[-1]) == (tokens.SOS, tokens.EOS)
    assert (tokens_T == tokens_T[::-1])[1:-1].all()
    assert tokens_T[1:-1].min() >= 3 and tokens_T[1:-1].max() <= 258


def test_documents_differ_by_index_split_and_seed_and_by_nothing_else():
  def key(tokens):
    return tuple(tokens.tolist())

  distinct = {
    key(documents[index])
    for documents in (
      _documents('train'),
      _documents('validation'),
      _documents('train', seed=2),
      _documents('train', seed=2**32 + 1),
    )
    for index in range(5)
  }
  assert len(distinct) == 20
  assert key(_documents('train')[3]) == key(_documents('train')[3])


def test_documents_share_no_stretch_of_noise():
  documents = _documents('train', length=2_002)
  words = [
    bytes((documents[index][at : at + 8] - 3).astype(np.uint8))
    for index in range(10)
    for at in range(1, 1_001, 8)
  ]
  assert len(set(words)) == len(words)


def test_symbols_are_uniform():
  tokens = _documents('train', length=200_002)[0][1:100_001]
  counts = np.bincount(tokens - 3, minlength=256)
  # 255 degrees of freedom: mean 255, standard deviation 22.6.
  chi_square = ((counts - 390.6) ** 2 / 390.6).sum()
  assert len(counts) == 256 and chi_square < 255 + 5 * 22.6


def test_lengths_of_endless_documents_take_no_memory():
  documents = _documents('train')
  assert len(documents) == len(documents.num_tokens) == 2**31 - 1
  assert documents.num_tokens.strides == (0,)
  assert len(_documents('validation')) == 5


def test_a_document_describes_itself():
  info = _documents('validation').info(4)
  assert (info.num_tokens, info.counts) == (34, {})
  assert info.name == 'validation 4'


def test_the_fingerprint_follows_what_is_trained_on():
  train = _documents('train').fingerprint
  assert train == _documents('validation').fingerprint
  assert train != _documents('train', seed=2).fingerprint
  assert train != _documents('train', length=36).fingerprint


def test_splits_that_do_not_exist_are_refused():
  with pytest.raises(UserError, match='it has train and validation'):
    _documents('test')
  with pytest.raises(UserError, match='num_eval_documents'):
    _documents('validation', num_eval_documents=0)
