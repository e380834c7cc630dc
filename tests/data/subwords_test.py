import pytest

from perceiver_ar.data import subwords, text
from perceiver_ar.errors import UserError


def test_lines_beyond_the_limit_of_sentencepiece_are_learnt_from(tmp_path):
  line = 'abcdefghij ' * 2_000
  path = tmp_path / 'model'
  path.write_bytes(subwords.train_sentencepiece([line], 280))
  codec = text.SentencePieceCodec(path)
  assert len(codec.encode(line)) < len(line) / 4


def test_vocabulary_sizes_out_of_reach_name_the_nearest():
  with pytest.raises(UserError, match=r'too large .* at most --vocab_size='):
    subwords.train_sentencepiece(['some words'] * 9, 32_000)
  with pytest.raises(UserError, match=r'too small .* at least --vocab_size='):
    subwords.train_sentencepiece(['some words'] * 9, 20)


def test_equal_texts_give_an_equal_model():
  texts = ['the white ship and the sea\n' * 9] * 4
  models = [subwords.train_sentencepiece(texts, 275) for _ in range(2)]
  assert models[0] == models[1]


def test_a_missing_sentencepiece_names_the_extra(monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'sentencepiece', None)
  with pytest.raises(UserError, match=r'perceiver-ar\[prepare\]'):
    subwords.train_sentencepiece(['words'], 300)
