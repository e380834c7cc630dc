import pickle

import numpy as np
import pytest

from perceiver_ar.data import text
from perceiver_ar.errors import UserError

_HARD = (
  '',
  'plain words\n',
  '  two  blanks, \ttab, trailing \n\n\n',
  'CRLF\r\nand CR\r alone',
  '\ufeffmark, accents: Émile Brontë, 漢字, 🎹, <s> </s> <0x41> <unk> ▂',
  'digits 0123456789 \x01\x7f\u2028',
)


@pytest.fixture(scope='module')
def subwords(tmp_path_factory) -> text.SentencePieceCodec:
  path = tmp_path_factory.mktemp('vocabulary') / 'sentencepiece.model'
  rng = np.random.default_rng(0)
  words = ['the', 'whale', 'sea', 'captain', 'and', 'of', 'white', 'ship']
  books = [' '.join(rng.choice(words, 400)) + '.\n' for _ in range(4)]
  text.train_sentencepiece(books, 285, path)
  return text.SentencePieceCodec(path)


@pytest.fixture(params=['bytes', 'sentencepiece'])
def codec(request, subwords) -> text.Codec:
  return text.ByteCodec() if request.param == 'bytes' else subwords


@pytest.mark.parametrize('content', _HARD)
def test_any_text_survives_encoding_and_decoding(codec, content):
  ids = codec.encode(content)
  assert ids.dtype == np.int32
  assert codec.decode(ids) == content
  if len(ids):
    assert ids.min() >= text.NUM_RESERVED and ids.max() < codec.vocab_size
    assert not set(ids.tolist()) & {*codec.forbidden, text.EOS}


def test_any_ids_decode(codec):
  rng = np.random.default_rng(0)
  for _ in range(50):
    ids = rng.integers(0, codec.vocab_size, 64)
    codec.decode(ids).encode()
  assert codec.decode([text.SOS, text.EOS, text.PAD]) == ''


def test_text_may_be_decoded_in_parts(codec):
  content = 'the white ship and\n the  captain '
  ids = codec.encode(content)
  for cut in range(len(ids)):
    assert codec.decode(ids[:cut]) + codec.decode(ids[cut:]) == content


def test_a_byte_is_three_below_its_id():
  assert text.ByteCodec().encode('aé').tolist() == [100, 0xC3 + 3, 0xA9 + 3]
  assert text.ByteCodec().decode([0xC3 + 3, 100]) == '\ufffda'


def test_subwords_join_frequent_characters(subwords):
  assert len(subwords.encode('the white whale and the sea')) < 14


def test_subwords_keep_the_reserved_ids(subwords):
  assert subwords.vocab_size == 285
  assert subwords.forbidden == (0, 2, 3)


def test_the_blank_mark_of_sentencepiece_is_refused_by_name(subwords):
  with pytest.raises(UserError, match=r'character 2 is U\+2581'):
    subwords.encode('ab\u2581')


def test_lines_beyond_the_limit_of_sentencepiece_are_learnt_from(tmp_path):
  line = 'abcdefghij ' * 2_000
  path = tmp_path / 'sentencepiece.model'
  text.train_sentencepiece([line], 280, path)
  codec = text.SentencePieceCodec(path)
  assert len(codec.encode(line)) < len(line) / 4


def test_vocabulary_sizes_out_of_reach_name_the_nearest(tmp_path):
  path = tmp_path / 'sentencepiece.model'
  with pytest.raises(UserError, match=r'too large .* at most --vocab_size='):
    text.train_sentencepiece(['some words'] * 9, 32_000, path)
  with pytest.raises(UserError, match=r'too small .* at least --vocab_size='):
    text.train_sentencepiece(['some words'] * 9, 20, path)
  assert not path.exists()


def test_a_missing_sentencepiece_names_the_extra(tmp_path, monkeypatch):
  monkeypatch.setitem(__import__('sys').modules, 'sentencepiece', None)
  with pytest.raises(UserError, match=r'perceiver-ar\[prepare\]'):
    text.train_sentencepiece(['words'], 300, tmp_path / 'model')


def test_ids_are_written_as_numbers():
  codec = text.IdsCodec(100)
  assert codec.encode(' 3 99\n50').tolist() == [3, 99, 50]
  assert codec.decode([2, 3, 99, 1, 0]) == '3 99'
  for wrong in ('100', '2', '-5', '3.0', 'three', '9' * 30):
    with pytest.raises(UserError, match='ids from 3 to 99'):
      codec.encode(wrong)


def test_codecs_can_be_sent_to_another_process(codec):
  copy = pickle.loads(pickle.dumps(codec))
  assert copy.encode('the ship').tolist() == codec.encode('the ship').tolist()


def test_a_data_set_opens_only_with_its_own_vocabulary(subwords, tmp_path):
  right = text.Vocabulary(
    kind='bytes', size=259, sha256=text.ByteCodec.sha256, file=''
  )
  assert text.open_codec(right, tmp_path).kind == 'bytes'
  for kind, size, sha256, match in (
    ('bytes', 260, text.ByteCodec.sha256, 'size 259, not 260'),
    ('bytes', 259, subwords.sha256, 'another checksum'),
    ('words', 259, '', "vocabulary 'words' is unknown"),
    ('sentencepiece', 285, subwords.sha256, 'cannot be read'),
  ):
    wrong = text.Vocabulary(kind=kind, size=size, sha256=sha256, file='model')
    with pytest.raises(UserError, match=match):
      text.open_codec(wrong, tmp_path)


def test_a_broken_vocabulary_file_is_refused(tmp_path):
  (tmp_path / 'model').write_bytes(b'nonsense')
  with pytest.raises(UserError, match='sentencepiece model'):
    text.SentencePieceCodec(tmp_path / 'model')
