"""Every codec keeps every text or refuses it, and takes any ids."""

import pickle
import sys

import numpy as np
import pytest

from perceiver_ar.data import codecs, layouts, subwords, text
from perceiver_ar.data.tokens import EOS, NUM_RESERVED, PAD, SOS, Vocabulary
from perceiver_ar.errors import UserError

_HARD = (
  '',
  'plain words\n',
  '  two  blanks, \ttab, trailing \n\n\n',
  'CRLF\r\nand CR\r alone',
  '\ufeffmark, accents: Émile Brontë, 漢字, 🎹, <s> </s> <0x41> <unk> ▂',
  'digits 0123456789 \x01\x7f\u2028',
  '<|end|> is a special token, and \ufffd is a character',
)
_WORDS = ('the', 'whale', 'sea', 'captain', 'and', 'of', 'white', 'ship')


def _books() -> list[str]:
  rng = np.random.default_rng(0)
  return [' '.join(rng.choice(_WORDS, 400)) + '.\n' for _ in range(4)]


@pytest.fixture(scope='module')
def sentencepiece(tmp_path_factory) -> text.SentencePieceCodec:
  path = tmp_path_factory.mktemp('vocabulary') / text.SENTENCEPIECE_FILE
  path.write_bytes(subwords.train_sentencepiece(_books(), 285))
  return text.SentencePieceCodec(path)


@pytest.fixture(scope='module')
def tokenizer_json(tmp_path_factory):
  """Byte-level BPE with what a codec must not fall for."""
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers, trainers

  tokenizer = tokenizers.Tokenizer(models.BPE())
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  trainer = trainers.BpeTrainer(
    vocab_size=300,
    special_tokens=['<|end|>'],
    initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    show_progress=False,
  )
  tokenizer.train_from_iterator(_books(), trainer)
  tokenizer.enable_truncation(4)
  tokenizer.enable_padding(length=50, pad_token='<|end|>')
  tokenizer.model.dropout = 0.9
  path = tmp_path_factory.mktemp('vocabulary') / 'mine.json'
  tokenizer.save(str(path))
  return path


@pytest.fixture(params=['bytes', 'sentencepiece', 'tokenizers'])
def codec(request, sentencepiece, tokenizer_json) -> text.TextCodec:
  return {
    'bytes': text.ByteCodec(),
    'sentencepiece': sentencepiece,
    'tokenizers': text.TokenizersCodec(tokenizer_json),
  }[request.param]


@pytest.mark.parametrize('content', _HARD)
def test_any_text_survives_encoding_and_decoding(codec, content):
  ids = codec.encode(content)
  assert ids.dtype == np.int32
  assert codec.decode(ids) == content
  assert codec.read(content.encode()).tolist() == ids.tolist()
  assert codec.write(ids) == (content.encode(), 0)
  if len(ids):
    assert ids.min() >= NUM_RESERVED and ids.max() < codec.vocab_size
    assert not set(ids.tolist()) & {*codec.forbidden, EOS}


def test_any_ids_are_a_text_file(codec):
  rng = np.random.default_rng(0)
  for _ in range(50):
    ids = rng.integers(0, codec.vocab_size + 5, 64)
    data, num_repairs = codec.write(ids)
    content = data.decode()
    assert content == codec.decode(ids)
    out_of_place = {*codec.forbidden} - {PAD, EOS, SOS}
    assert num_repairs == (
      content.count('\ufffd')
      + sum(i in out_of_place or i >= codec.vocab_size for i in ids.tolist())
    )
  assert codec.write([SOS, EOS, PAD]) == (b'', 0)


def test_text_may_be_decoded_in_parts(codec):
  content = 'the white ship and\n the  captain '
  ids = codec.encode(content)
  for cut in range(len(ids)):
    parts = codec.decode(ids[:cut]) + codec.decode_further(ids[cut:])
    assert parts == content


def test_a_byte_is_three_below_its_id():
  assert text.ByteCodec().encode('aé').tolist() == [100, 0xC3 + 3, 0xA9 + 3]
  assert text.ByteCodec().write([0xC3 + 3, 100]) == ('\ufffda'.encode(), 1)


def test_subwords_join_frequent_characters(sentencepiece, tokenizer_json):
  for codec in (sentencepiece, text.TokenizersCodec(tokenizer_json)):
    assert len(codec.encode('the white whale and the sea')) < 14


def test_our_subwords_keep_the_reserved_ids(sentencepiece):
  assert sentencepiece.vocab_size == 285
  assert sentencepiece.forbidden == (0, 2, 3)


@pytest.fixture(scope='module')
def foreign(tmp_path_factory) -> text.SentencePieceCodec:
  """Of sentencepiece's own settings: other ids, blanks lost, no bytes."""
  import io

  import sentencepiece

  model = io.BytesIO()
  sentencepiece.SentencePieceTrainer.train(
    sentence_iterator=iter(_books()),
    model_writer=model,
    vocab_size=60,
    hard_vocab_limit=False,
    minloglevel=2,
  )
  path = tmp_path_factory.mktemp('vocabulary') / 'foreign.model'
  path.write_bytes(model.getvalue())
  return text.SentencePieceCodec(path)


def test_the_ids_of_a_foreign_model_are_three_higher(foreign):
  import sentencepiece

  processor = sentencepiece.SentencePieceProcessor(model_proto=foreign.model)
  content = 'the white whale'
  own = processor.encode(content)
  assert foreign.encode(content).tolist() == [i + NUM_RESERVED for i in own]
  assert foreign.vocab_size == processor.vocab_size() + NUM_RESERVED
  # unk, bos, eos: 0, 1, 2 of its own.
  assert foreign.forbidden == (PAD, SOS, 3, 4, 5)
  assert foreign.write([3, 4, 5, *foreign.encode('the')]) == (b'the', 3)
  ids = foreign.encode(content)
  for cut in range(1, len(ids)):
    parts = foreign.decode(ids[:cut]) + foreign.decode_further(ids[cut:])
    assert parts == content


@pytest.mark.parametrize(
  ('content', 'said'),
  [
    ('the  ship', r"character 4, ' ', does not survive the sentencepiece"),
    ('the ship\n', r"character 8, '\\n', does not"),
    ('the ζ', r"character 4, 'ζ', does not"),
  ],
)
def test_what_a_vocabulary_would_lose_is_refused(foreign, content, said):
  with pytest.raises(UserError, match=said):
    foreign.encode(content)


def test_the_blank_mark_of_sentencepiece_is_refused_by_name(sentencepiece):
  with pytest.raises(UserError, match=r'character 2, .▁., does not survive'):
    sentencepiece.encode('ab\u2581')


def test_no_special_token_is_encoded_or_sampled(tokenizer_json):
  codec = text.TokenizersCodec(tokenizer_json)
  assert codec.forbidden == (PAD, SOS, NUM_RESERVED)
  assert NUM_RESERVED not in codec.encode('<|end|>')
  assert codec.write([NUM_RESERVED]) == (b'', 1)


def test_text_that_is_no_utf8_is_refused(codec):
  with pytest.raises(UserError, match=r'not UTF-8: byte 5 is 0xeb; .* \(iconv'):
    codec.read('Brontë'.encode('cp1252'))


def test_ids_are_written_as_numbers():
  codec = text.IdsCodec(100)
  assert codec.encode(' 3 99\n50').tolist() == [3, 99, 50]
  assert codec.read(b' 3 99\n50').tolist() == [3, 99, 50]
  assert codec.write([2, 3, 99, 100, 1, 0]) == (b'3 99', 1)
  for wrong in ('100', '2', '-5', '3.0', 'three', '9' * 30):
    with pytest.raises(UserError, match='ids from 3 to 99'):
      codec.encode(wrong)


def test_codecs_can_be_sent_to_another_process(codec):
  copy = pickle.loads(pickle.dumps(codec))
  assert copy.encode('the ship').tolist() == codec.encode('the ship').tolist()


def test_a_data_set_opens_only_with_its_own_vocabulary(codec, tmp_path):
  right = codecs.save_codec(codec, tmp_path)
  opened = codecs.open_codec(right, layouts.INDEX, tmp_path)
  assert (opened.kind, opened.sha256) == (codec.kind, codec.sha256)
  for kind, size, sha256, match in (
    (
      codec.kind,
      codec.vocab_size + 1,
      codec.sha256,
      f'{codec.vocab_size}, not',
    ),
    (codec.kind, codec.vocab_size, '00' * 32, 'another checksum'),
    ('words', 259, '', "vocabulary 'words' is unknown"),
    ('sentencepiece', 285, '', 'cannot be read'),
    ('tokenizers', 285, '', 'cannot be read'),
  ):
    file = 'gone' if size == 285 and not sha256 else right.file
    wrong = Vocabulary(kind=kind, size=size, sha256=sha256, file=file)
    with pytest.raises(UserError, match=match):
      codecs.open_codec(wrong, layouts.INDEX, tmp_path)


def test_a_broken_vocabulary_file_is_refused(tmp_path):
  (tmp_path / 'file').write_bytes(b'nonsense \xff')
  with pytest.raises(UserError, match='file is no sentencepiece model'):
    text.SentencePieceCodec(tmp_path / 'file')
  with pytest.raises(UserError, match=r'file is no tokenizer\.json'):
    text.TokenizersCodec(tmp_path / 'file')


def test_missing_packages_name_the_extra(tmp_path, tokenizer_json, monkeypatch):
  for name, codec in (
    ('sentencepiece', text.SentencePieceCodec),
    ('tokenizers', text.TokenizersCodec),
  ):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(UserError, match=r'perceiver-ar\[prepare\]'):
      codec(tokenizer_json)


@pytest.mark.parametrize('size', [1, 2, 3, 7, 100])
def test_a_stream_writes_what_was_encoded(codec, tmp_path, size):
  content = 'the  white ship, 漢字 🎹 and\n the sea '
  ids = codec.encode(content)
  stream = text.TextStream(tmp_path / 'x', codec)
  for start in range(0, len(ids), size):
    stream.write(ids[start : start + size])
  stream.close()
  assert (tmp_path / 'x').read_text() == content


def test_a_stream_keeps_blanks_that_a_decoder_takes_off(foreign, tmp_path):
  content = 'the white ship and the sea'
  stream = text.TextStream(tmp_path / 'x', foreign)
  for token in foreign.encode(content):
    stream.write([token])
  stream.close()
  assert (tmp_path / 'x').read_text() == content
