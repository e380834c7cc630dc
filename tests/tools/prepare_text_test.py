"""What is downloaded becomes a data set, kept to the byte or named."""

import hashlib
import json
import os
import pathlib
import subprocess
import sys
import time

import numpy as np
import pytest
from prepared_texts import TOOL, jsonl_file, run, texts_of

from perceiver_ar.data import records, tokens

_SUBWORDS = ['--vocabulary=sentencepiece', '--vocab_size=290']


@pytest.fixture
def books(tmp_path):
  """A folder of 30 small books, some below others."""
  folder = tmp_path / 'books'
  rng = np.random.default_rng(0)
  words = ['the', 'whale', 'sea', 'captain', 'and', 'Émile', '漢字', '\r\n']
  for number in range(30):
    path = folder / f'shelf {number % 3}' / f'{number}.txt'
    path.parent.mkdir(parents=True, exist_ok=True)
    content = ' '.join(rng.choice(words, 100 + number))
    path.write_bytes(content.encode())
  return folder


def _content(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize('options', [[], _SUBWORDS])
def test_documents_are_kept_to_the_byte(books, tmp_path, options):
  assert run(books, tmp_path / 'out', *options) == 0
  names = set()
  for split in ('train', 'validation'):
    documents = records.Documents(str(tmp_path / 'out'), split)
    for index in range(len(documents)):
      tokens_T, info = documents[index], documents.info(index)
      content = (books / info.name).read_bytes()
      assert documents.codec.write(tokens_T) == (content, 0)
      assert (tokens_T[0], tokens_T[-1]) == (tokens.SOS, tokens.EOS)
      assert info.num_tokens == len(tokens_T)
      assert info.counts == {
        'bytes': len(content),
        'words': len(content.decode().split()),
      }
      names.add(info.name)
  assert len(names) == 30


@pytest.mark.parametrize('options', [[], _SUBWORDS])
def test_equal_texts_give_equal_files(books, tmp_path, options):
  assert run(books, tmp_path / 'one', *options) == 0
  assert run(books, tmp_path / 'two', *options) == 0
  assert _content(tmp_path / 'one') == _content(tmp_path / 'two')
  assert run(books, tmp_path / 'one', *options) == 0  # in place
  assert _content(tmp_path / 'one') == _content(tmp_path / 'two')


@pytest.mark.parametrize(
  ('share', 'expected'), [(0.05, 2), (0.1, 3), (0.001, 1), (0.999, 29)]
)
def test_whole_documents_are_held_out_by_their_names(
  books, tmp_path, share, expected
):
  assert run(books, tmp_path / 'out', f'--held_out={share}') == 0
  held = records.Documents(str(tmp_path / 'out'), 'validation')
  train = records.Documents(str(tmp_path / 'out'), 'train')
  held_names = {held.info(i).name for i in range(len(held))}
  train_names = {train.info(i).name for i in range(len(train))}
  assert len(held_names) == expected
  assert len(train_names) == 30 - expected and not held_names & train_names

  def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

  assert max(map(digest, held_names)) < min(map(digest, train_names))


def test_the_vocabulary_is_learnt_from_the_training_split_only(books, tmp_path):
  options = _SUBWORDS
  assert run(books, tmp_path / 'one', *options) == 0
  held = records.Documents(str(tmp_path / 'one'), 'validation')
  for index in range(len(held)):
    (books / held.info(index).name).write_text('zebra quagga okapi ' * 500)
  assert run(books, tmp_path / 'two', *options) == 0
  vocabularies = [
    (tmp_path / name / 'sentencepiece.model').read_bytes()
    for name in ('one', 'two')
  ]
  assert vocabularies[0] == vocabularies[1]


def test_it_ends_with_a_summary_and_the_next_command(books, tmp_path, capsys):
  (books / 'notes.md').write_text('not a book')
  output = tmp_path / 'my books'
  options = _SUBWORDS
  assert run(books, output, *options) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0] == f'{books}: 28 train, 2 validation .txt files'
  assert lines[1] == f'1 files in {books} are not .txt: ignored'
  assert lines[2].startswith(
    'vocabulary: sentencepiece is trained on 28 of the 28 training documents'
  )
  assert lines[3].split() == (
    ['split', 'documents', 'rejected', 'tokens', 'bytes', 'words']
  )
  assert lines[4].startswith('train') and lines[5].startswith('validation')
  assert lines[-1] == (
    'Next: perceiver-ar train --config=configs/books.py:small '
    f"'--config.data.path={output}' --config.model.vocab_size=290 "
    '--workdir=runs/books'
  )


def _one_only(books):
  for path in list(books.rglob('*.txt'))[1:]:
    path.unlink()


def _no_text(books):
  _one_only(books)
  next(books.rglob('*.txt')).rename(books / 'book.pdf')


@pytest.mark.parametrize(
  ('damage', 'options', 'said'),
  [
    (lambda b: b.rename(b.parent / 'gone'), [], 'books is no folder'),
    (lambda b: None, ['--vocabulary=words'], '--vocabulary=words must be'),
    (lambda b: None, ['--vocabulary=no.model'], 'no.model cannot be read'),
    (lambda b: None, ['--workers=0'], '--workers=0 must be at least 1'),
    (
      lambda b: None,
      [*_SUBWORDS, '--vocab_megabytes=0'],
      '--vocab_megabytes=0 must be',
    ),
    (
      lambda b: None,
      ['--vocab_size=300'],
      '--vocab_size=300 is of --vocabulary=sentencepiece, and not of '
      '--vocabulary=bytes',
    ),
    (
      lambda b: None,
      ['--vocabulary=my.json', '--vocab_megabytes=2'],
      '--vocab_megabytes=2 is of',
    ),
    (lambda b: None, ['--text_key=body'], '--text_key=body is of JSONL'),
    (lambda b: None, ['--format=jsonl'], 'holds no lines in .jsonl files'),
    (lambda b: None, ['--format=pg19'], 'holds no books'),
    (lambda b: None, ['--format=wikitext'], 'holds no articles'),
    (_no_text, [], 'holds no .txt file'),
    (_one_only, [], 'holds one document to train on, shelf'),
    (
      lambda b: (b / 'link.txt').symlink_to('nowhere'),
      [],
      'link.txt cannot be read (No such file',
    ),
    (
      lambda b: (b / 'latin.txt').write_bytes('Brontë'.encode('cp1252')),
      [],
      'such as latin.txt: it is not UTF-8: byte 5 is 0xeb; convert it (iconv',
    ),
    (
      lambda b: (b / 'wide.txt').write_bytes('ab'.encode('utf-16-le')),
      [],
      'wide.txt: it is no plain text: byte 1 is 0',
    ),
    (
      lambda b: (b / 'photo.txt').write_bytes(bytes(range(1, 256))),
      [],
      'photo.txt: it is not UTF-8: byte 127',
    ),
    (
      lambda b: (b / 'empty.txt').write_text(''),
      [],
      'empty.txt: it has 0 tokens',
    ),
    (
      lambda b: (b / 'a.txt').write_text('a'),
      [],
      'a.txt: it has 1 tokens, and a document needs two',
    ),
    (
      lambda b: (b / 'mark.txt').write_text('ab\u2581'),
      _SUBWORDS,
      "mark.txt: its character 2, '▁', does not survive",
    ),
    (
      lambda b: None,
      ['--vocabulary=sentencepiece'],
      '--vocab_size=32000 is too large for this text; use at most',
    ),
    (
      lambda b: None,
      ['--vocabulary=sentencepiece', '--vocab_size=9'],
      '--vocab_size=9 is too small',
    ),
    (lambda b: None, ['--held_out=1.5'], '--held_out=1.5 must lie between'),
    (lambda b: None, ['--held_out=0'], '--held_out=0.0 must lie between'),
    (
      lambda b: (b.parent / 'out').write_text('mine'),
      [],
      'out exists and is no prepared data set',
    ),
    (
      lambda b: (b.parent / 'out' / 'mine').mkdir(parents=True),
      [],
      'out exists and is no prepared data set',
    ),
    (lambda b: (b.parent / 'out').write_text(''), [], 'out exists and is no'),
    (
      lambda b: (b / 'shelf 1').rename(b / 'test'),
      [],
      'has the split test and no train',
    ),
  ],
)
def test_a_mistake_ends_in_one_sentence(
  books, tmp_path, capsys, damage, options, said
):
  damage(books)
  existed = (tmp_path / 'out').exists()
  assert run(books, tmp_path / 'out', *options) == 2
  message = capsys.readouterr().err
  assert message.startswith('prepare_text: ') and message.count('\n') == 1
  assert said in message
  assert (tmp_path / 'out').exists() == existed
  assert not list(tmp_path.glob('.*.partial'))


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read every file')
def test_files_and_folders_that_may_not_be_read_are_named(
  books, tmp_path, capsys
):
  for path in (books / 'shelf 1', books / 'shelf 2' / '2.txt'):
    mode = path.stat().st_mode
    path.chmod(0)
    assert run(books, tmp_path / 'out') == 2
    path.chmod(mode)
    assert f'{path} cannot be read (Permission' in capsys.readouterr().err


def test_a_missing_sentencepiece_names_the_extra(
  books, tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  assert run(books, tmp_path / 'out', '--vocabulary=sentencepiece') == 2
  message = capsys.readouterr().err
  assert 'perceiver-ar[prepare]' in message and message.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_an_output_within_the_input_is_refused(books, capsys):
  assert run(books, books / 'out') == 2
  assert 'lies in --input' in capsys.readouterr().err


def test_the_script_itself_exits_with_status_2(tmp_path):
  result = subprocess.run(
    [sys.executable, str(TOOL), f'--input={tmp_path}/no', '--output=o'],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
  )
  assert result.returncode == 2
  assert result.stderr.startswith('prepare_text: ')
  assert result.stderr.count('\n') == 1 and not result.stdout


@pytest.mark.parametrize('validation', ['validation', 'valid', 'Val'])
def test_a_folder_that_someone_has_split_stays_so(
  books, tmp_path, capsys, validation
):
  (books / 'shelf 0').rename(books / validation)
  (books / 'shelf 1').rename(books / 'train')
  (books / 'shelf 2').rename(books / 'test')
  (books / 'README.txt').write_text('Where these books are from.')
  assert run(books, tmp_path / 'out') == 0
  assert f'1 files in {books} are not in the folders' in capsys.readouterr().out
  texts = texts_of(tmp_path / 'out')
  for split, folder in (
    ('train', 'train'),
    ('validation', validation),
    ('test', 'test'),
  ):
    names = {f'{folder}/{path.name}' for path in (books / folder).iterdir()}
    assert set(texts[split]) == names
  assert run(books, tmp_path / 'out', '--held_out=0.2') == 2
  assert '--held_out=0.2 is for inputs without' in capsys.readouterr().err


def test_validation_is_never_held_out_of_books_for_testing(books, tmp_path):
  (books / 'shelf 1').rename(books / 'train')
  (books / 'shelf 2').rename(books / 'test')
  assert run(books, tmp_path / 'out', '--held_out=0.3') == 0
  texts = texts_of(tmp_path / 'out')
  assert [len(texts[split]) for split in ('train', 'validation', 'test')] == [
    7,
    3,
    10,
  ]
  assert all(name.startswith('test/') for name in texts['test'])
  held = texts['train'] | texts['validation']
  assert all(name.startswith('train/') for name in held)


def _tokenizer_json(path):
  import tokenizers
  from tokenizers import decoders, models, pre_tokenizers

  alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
  model = models.BPE({token: i for i, token in enumerate(alphabet)}, [])
  tokenizer = tokenizers.Tokenizer(model)
  tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.decoder = decoders.ByteLevel()
  tokenizer.save(str(path))


def test_a_vocabulary_of_the_user_goes_into_the_data_set(books, tmp_path):
  assert run(books, tmp_path / 'trained', *_SUBWORDS) == 0
  (tmp_path / 'trained' / 'sentencepiece.model').rename(tmp_path / 'my.model')
  _tokenizer_json(tmp_path / 'my.json')
  for name, kind in (('my.model', 'sentencepiece'), ('my.json', 'tokenizers')):
    output = tmp_path / kind
    assert run(books, output, f'--vocabulary={tmp_path / name}') == 0
    manifest = records.Manifest.load(output)
    assert manifest.vocabulary.kind == kind
    file = output / manifest.vocabulary.file
    assert file.read_bytes() == (tmp_path / name).read_bytes()
    texts = texts_of(output)
    for book, content in (texts['train'] | texts['validation']).items():
      assert content == (books / book).read_bytes()


def test_a_large_split_is_sampled_by_the_names_of_its_documents(
  tmp_path, capsys
):
  rng = np.random.default_rng(0)
  words = ['ship', 'sea', 'whale', 'captain']
  lines = [json.dumps(' '.join(rng.choice(words, 20_000))) for _ in range(30)]
  path = jsonl_file(tmp_path / 'in', lines)
  size = ['--vocabulary=sentencepiece', '--vocab_size=285']
  assert run(path, tmp_path / 'one', *size, '--vocab_megabytes=1') == 0
  assert '9 of the 28 training documents, 1.' in capsys.readouterr().out
  # A document that is not in the sample may change.
  names = [f'mine.jsonl:{i}' for i in range(1, 31)]
  by_hash = sorted(names, key=lambda n: hashlib.sha256(n.encode()).digest())
  sample = by_hash[2:11]  # two are held out
  other = next(i for i in range(30) if names[i] not in sample)
  lines[other] = json.dumps('zebra ' * 500)
  path.write_text(''.join(f'{line}\n' for line in lines))
  assert run(path, tmp_path / 'two', *size, '--vocab_megabytes=1') == 0
  models = [
    (tmp_path / name / 'sentencepiece.model').read_bytes()
    for name in ('one', 'two')
  ]
  assert models[0] == models[1]
  lines[names.index(sample[0])] = json.dumps('zebra ' * 500)
  path.write_text(''.join(f'{line}\n' for line in lines))
  assert run(path, tmp_path / 'two', *size, '--vocab_megabytes=1') == 0
  assert (tmp_path / 'two' / 'sentencepiece.model').read_bytes() != models[0]


def _tool(*arguments: str, **more):
  return subprocess.Popen(
    [sys.executable, str(TOOL), *arguments],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
    **more,
  )


def test_killed_and_with_other_workers_it_gives_the_same_bytes(tmp_path):
  rng = np.random.default_rng(0)
  words = ['ship', 'sea', 'whale', 'captain', 'Émile', '漢字']
  folder = tmp_path / 'in'
  folder.mkdir()
  for number in range(240):
    content = ' '.join(rng.choice(words, 2_000))
    (folder / f'{number}.txt').write_text(content)
  options = ['--vocabulary=sentencepiece', '--vocab_size=280']
  options += ['--vocab_megabytes=1']
  assert run(folder, tmp_path / 'whole', *options) == 0
  arguments = [f'--input={folder}', f'--output={tmp_path / "out"}', *options]
  process = _tool(*arguments, '--workers=1')
  deadline = time.monotonic() + 60
  parts = tmp_path / '.out.preparing' / 'parts'
  while not list(parts.glob('*.jsonl')):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.01)
  process.kill()
  process.communicate()
  assert not (tmp_path / 'out').exists()
  assert 1 <= len(list(parts.glob('*.jsonl'))) < 15
  process = _tool(*arguments, '--workers=4')
  out, err = process.communicate(timeout=60)
  assert process.returncode == 0, err
  assert 'sentencepiece.model is trained' in out
  assert _content(tmp_path / 'out') == _content(tmp_path / 'whole')
  assert not parts.exists()
