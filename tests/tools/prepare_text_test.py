import hashlib
import os
import pathlib
import runpy
import subprocess
import sys

import numpy as np
import pytest

from perceiver_ar.data import records, text

_TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'prepare_text.py'


@pytest.fixture(scope='module')
def main():
  return runpy.run_path(str(_TOOL))['main']


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


def _run(main, books, output, *more: str) -> int:
  return main([f'--input={books}', f'--output={output}', *more])


def _content(folder: pathlib.Path) -> dict[str, bytes]:
  return {path.name: path.read_bytes() for path in folder.iterdir()}


@pytest.mark.parametrize(
  'options', [[], ['--vocabulary=sentencepiece', '--vocab_size=290']]
)
def test_documents_are_kept_to_the_byte(main, books, tmp_path, options):
  assert _run(main, books, tmp_path / 'out', *options) == 0
  names = set()
  for split in ('train', 'validation'):
    documents = records.Documents(str(tmp_path / 'out'), split)
    for index in range(len(documents)):
      tokens, info = documents[index], documents.info(index)
      content = (books / info.name).read_bytes()
      assert documents.codec.decode(tokens).encode() == content
      assert (tokens[0], tokens[-1]) == (text.SOS, text.EOS)
      assert info.num_tokens == len(tokens)
      assert info.num_bytes == len(content)
      assert info.num_words == len(content.decode().split())
      names.add(info.name)
  assert len(names) == 30


@pytest.mark.parametrize(
  'options', [[], ['--vocabulary=sentencepiece', '--vocab_size=290']]
)
def test_equal_texts_give_equal_files(main, books, tmp_path, options):
  assert _run(main, books, tmp_path / 'one', *options) == 0
  assert _run(main, books, tmp_path / 'two', *options) == 0
  assert _content(tmp_path / 'one') == _content(tmp_path / 'two')
  assert _run(main, books, tmp_path / 'one', *options) == 0  # in place
  assert _content(tmp_path / 'one') == _content(tmp_path / 'two')


@pytest.mark.parametrize(
  ('share', 'expected'), [(0.05, 2), (0.1, 3), (0.001, 1), (0.999, 29)]
)
def test_whole_documents_are_held_out_by_their_names(
  main, books, tmp_path, share, expected
):
  assert _run(main, books, tmp_path / 'out', f'--held_out={share}') == 0
  held = records.Documents(str(tmp_path / 'out'), 'validation')
  train = records.Documents(str(tmp_path / 'out'), 'train')
  held_names = {held.info(i).name for i in range(len(held))}
  train_names = {train.info(i).name for i in range(len(train))}
  assert len(held_names) == expected
  assert len(train_names) == 30 - expected and not held_names & train_names

  def digest(name: str) -> str:
    return hashlib.sha256(name.encode()).hexdigest()

  assert max(map(digest, held_names)) < min(map(digest, train_names))


def test_the_vocabulary_is_learnt_from_the_training_split_only(
  main, books, tmp_path
):
  options = ['--vocabulary=sentencepiece', '--vocab_size=290']
  assert _run(main, books, tmp_path / 'one', *options) == 0
  held = records.Documents(str(tmp_path / 'one'), 'validation')
  for index in range(len(held)):
    (books / held.info(index).name).write_text('zebra quagga okapi ' * 500)
  assert _run(main, books, tmp_path / 'two', *options) == 0
  vocabularies = [
    (tmp_path / name / 'sentencepiece.model').read_bytes()
    for name in ('one', 'two')
  ]
  assert vocabularies[0] == vocabularies[1]


def test_it_ends_with_a_summary_and_the_next_command(
  main, books, tmp_path, capsys
):
  (books / 'notes.md').write_text('not a book')
  output = tmp_path / 'my books'
  options = ['--vocabulary=sentencepiece', '--vocab_size=290']
  assert _run(main, books, output, *options) == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[0].startswith('1 files') and 'ignored' in lines[0]
  assert lines[1].split() == (
    ['split', 'documents', 'bytes', 'words', 'tokens', 'bytes/token']
  )
  assert lines[2].startswith('train') and lines[3].startswith('validation')
  assert lines[-1] == (
    'perceiver-ar train --config=configs/books.py:small '
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
    (_no_text, [], 'holds no .txt file'),
    (_one_only, [], 'holds one document, shelf'),
    (
      lambda b: (b / 'link.txt').symlink_to('nowhere'),
      [],
      'link.txt cannot be read (No such file',
    ),
    (
      lambda b: (b / 'latin.txt').write_bytes('Brontë'.encode('cp1252')),
      [],
      'latin.txt is not UTF-8: byte 5 is 0xeb; convert it (iconv',
    ),
    (
      lambda b: (b / 'wide.txt').write_bytes('ab'.encode('utf-16-le')),
      [],
      'wide.txt is no plain text: byte 1 is 0',
    ),
    (
      lambda b: (b / 'photo.txt').write_bytes(bytes(range(1, 256))),
      [],
      'photo.txt is not UTF-8: byte 127',
    ),
    (
      lambda b: (b / 'empty.txt').write_text(''),
      [],
      'empty.txt has 0 characters',
    ),
    (lambda b: (b / 'a.txt').write_text('a'), [], 'a.txt has 1 characters'),
    (
      lambda b: (b / 'mark.txt').write_text('ab\u2581'),
      ['--vocabulary=sentencepiece', '--vocab_size=290'],
      'mark.txt: character 2 is U+2581',
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
  ],
)
def test_a_mistake_ends_in_one_sentence(
  main, books, tmp_path, capsys, damage, options, said
):
  damage(books)
  before = sorted(path.name for path in tmp_path.iterdir())
  assert _run(main, books, tmp_path / 'out', *options) == 2
  message = capsys.readouterr().err
  assert message.startswith('prepare_text: ') and message.count('\n') == 1
  assert said in message
  assert sorted(path.name for path in tmp_path.iterdir()) == before


@pytest.mark.skipif(os.geteuid() == 0, reason='root may read every file')
def test_files_and_folders_that_may_not_be_read_are_named(
  main, books, tmp_path, capsys
):
  for path in (books / 'shelf 1', books / 'shelf 2' / '2.txt'):
    mode = path.stat().st_mode
    path.chmod(0)
    assert _run(main, books, tmp_path / 'out') == 2
    path.chmod(mode)
    assert f'{path} cannot be read (Permission' in capsys.readouterr().err


def test_a_missing_sentencepiece_names_the_extra(
  main, books, tmp_path, capsys, monkeypatch
):
  monkeypatch.setitem(sys.modules, 'sentencepiece', None)
  assert _run(main, books, tmp_path / 'out', '--vocabulary=sentencepiece') == 2
  message = capsys.readouterr().err
  assert 'perceiver-ar[prepare]' in message and message.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def test_the_script_itself_exits_with_status_2(tmp_path):
  result = subprocess.run(
    [sys.executable, str(_TOOL), f'--input={tmp_path}/no', '--output=o'],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
  )
  assert result.returncode == 2
  assert result.stderr.startswith('prepare_text: ')
  assert result.stderr.count('\n') == 1 and not result.stdout
