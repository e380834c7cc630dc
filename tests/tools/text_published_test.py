"""PG-19 and Wikitext-103, in every form they are downloaded in."""

import csv
import zipfile

import pyarrow as pa
import pytest
from prepared_texts import run, text_parquet, text_published, texts_of
from pyarrow import parquet

from perceiver_ar.data import records

_POEM = 'Tyger Tyger, burning bright,\r\nIn the forests of the night;\n\n'
_PG19 = {
  'train': {'1234.txt': 'A <DW> book.\n', '99.txt': _POEM * 3},
  'validation': {'5.txt': 'Émile\n'},
  'test': {'70.txt': '  two blanks\n'},
}


def _pg19_folder(folder, books=_PG19):
  rows = []
  for split, texts in books.items():
    (folder / split).mkdir(parents=True)
    for name, content in texts.items():
      (folder / split / name).write_bytes(content.encode())
      number = name.removesuffix('.txt')
      rows.append([number, 'A Title by An Author', 1900, f'http://x/{number}'])
  with (folder / 'metadata.csv').open('w', newline='') as file:
    csv.writer(file, lineterminator='\n').writerows(rows)
  return folder


def _pg19_parquet(folder):
  (folder / 'data').mkdir(parents=True)
  for split, texts in _PG19.items():
    table = pa.table(
      {
        'short_book_title': ['A Title'] * len(texts),
        'publication_date': pa.array([1900] * len(texts), pa.int32()),
        'url': [f'http://x/ebooks/{n.removesuffix(".txt")}' for n in texts],
        'text': list(texts.values()),
      }
    )
    name = f'{split}-00000-of-00001-abcdef0123456789.parquet'
    parquet.write_table(table, folder / 'data' / name, row_group_size=2)
  return folder


@pytest.mark.parametrize('write', [_pg19_folder, _pg19_parquet])
def test_pg19_keeps_its_splits_and_books(tmp_path, capsys, monkeypatch, write):
  monkeypatch.setattr(text_parquet, '_ROWS', 1)
  assert run(write(tmp_path / 'pg19'), tmp_path / 'out') == 0
  assert 'PG-19, 2 train, 1 validation, 1 test books' in capsys.readouterr().out
  texts = texts_of(tmp_path / 'out')
  assert texts == {
    split: {f'{split}/{name}': books[name].encode() for name in books}
    for split, books in _PG19.items()
  }
  # By number, whatever the order they come in.
  assert list(texts['train']) == ['train/99.txt', 'train/1234.txt']
  manifest = records.Manifest.load(tmp_path / 'out')
  assert manifest.variant == 'pg19-partial'
  assert manifest.splits['test'].counts == {'bytes': 13, 'words': 2}


def test_only_a_complete_split_has_the_published_words(tmp_path):
  books = dict(_PG19, validation={f'{i}.txt': 'A book.\n' for i in range(50)})
  assert run(_pg19_folder(tmp_path / 'pg19', books), tmp_path / 'out') == 0
  splits = records.Manifest.load(tmp_path / 'out').splits
  assert splits['validation'].counts == {'bytes': 400, 'words': 3_007_061}
  assert splits['test'].counts['words'] == 2


@pytest.mark.parametrize(
  ('published', 'variant'),
  [
    ((2, 1, 1), 'pg19'),
    ((2, 1, 2), 'pg19-partial'),
    ((3, 1, 1), 'pg19-partial'),
  ],
)
def test_pg19_is_called_so_if_what_is_there_is_complete(
  tmp_path, capsys, monkeypatch, published, variant
):
  numbers = {
    split: (number, {'words': 5})
    for split, number in zip(_PG19, published, strict=True)
  }
  monkeypatch.setattr(text_published, '_PG19_WORDS', numbers)
  folder = _pg19_folder(tmp_path / 'pg19')
  assert run(folder, tmp_path / 'out') == 0
  assert records.Manifest.load(tmp_path / 'out').variant == variant
  lines = capsys.readouterr().out.splitlines()
  said = f'2 of {published[0]} in train, 1 of 1 in validation'
  assert said in lines[1] and ('part' in lines[1]) == (variant != 'pg19')
  command = 'Next: perceiver-ar train --config=configs/books.py:pg19 '
  assert lines[-1].startswith(command)
  (folder / 'test' / '70.txt').unlink()
  assert run(folder, tmp_path / 'out') == 0
  without_test = records.Manifest.load(tmp_path / 'out').variant
  assert without_test == ('pg19-partial' if published[0] == 3 else 'pg19')


def test_pg19_is_known_by_the_names_of_its_books_alone(tmp_path, capsys):
  folder = _pg19_folder(tmp_path / 'pg19')
  (folder / 'metadata.csv').unlink()
  assert run(folder, tmp_path / 'out') == 0
  assert 'metadata.csv is missing: books are' in capsys.readouterr().out
  assert records.Manifest.load(tmp_path / 'out').variant == 'pg19-partial'
  assert run(folder, tmp_path / 'out', '--format=folder') == 0
  assert records.Manifest.load(tmp_path / 'out').variant == ''
  (folder / 'train' / 'a.txt').write_text('no number')
  assert run(folder, tmp_path / 'out') == 0
  assert records.Manifest.load(tmp_path / 'out').variant == ''


@pytest.mark.parametrize('option', ['--held_out=0.1', '--text_key=text'])
def test_published_sets_take_no_options_of_others(tmp_path, capsys, option):
  sources = _pg19_folder(tmp_path / 'pg19'), _wiki_folder(tmp_path / 'wiki')
  for source in sources:
    assert run(source, tmp_path / 'out', option) == 2
    message = capsys.readouterr().err
    assert f'{option} is' in message and message.count('\n') == 1


def test_books_and_metadata_that_do_not_match_are_named(tmp_path, capsys):
  folder = _pg19_folder(tmp_path / 'pg19')
  (folder / 'train' / '99.txt').rename(folder / 'train' / '98.txt')
  assert run(folder, tmp_path / 'out') == 0
  lines = capsys.readouterr().out.splitlines()
  assert lines[1:3] == ['not in metadata.csv: 98', 'in metadata.csv only: 99']


_WIKI = {
  'train': (
    ' \n = Robert Boulter = \n \n Robert is an actor . \n'
    ' = 3 = \n'  # no heading: no blank line before it
    ' \n = = Career = = \n \n In 2000 @-@ 2001 . \n'
    ' \n = Émile = = Zola = \n \n A writer . \n \n'
  ),
  'validation': ' \n = One = \n \n Text . \n \n = Two = \n \n',
  'test': ' \n = Three = \n \n Text . \n',
}


def _num_words(content):
  return len(content.split()) + content.count('\n')


def _wiki_folder(folder):
  folder.mkdir()
  for split, content in _WIKI.items():
    name = {'validation': 'valid'}.get(split, split)
    (folder / f'wiki.{name}.raw').write_bytes(content.encode())
  return folder


def _wiki_parent(folder):
  folder.mkdir()
  _wiki_folder(folder / 'wikitext-103-raw')
  return folder


def _wiki_zip(folder):
  path = folder.with_suffix('.zip')
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as archive:
    for file in _wiki_folder(folder).iterdir():
      archive.write(file, f'wikitext-103-raw/{file.name}')
  return path


def _wiki_parquet(folder):
  """As the mirror has it: '' for blank lines; train in two files."""
  mirror = folder / 'wikitext-103-raw-v1'
  mirror.mkdir(parents=True)
  (folder / 'wikitext-2-raw-v1').mkdir()
  (folder / 'wikitext-2-raw-v1' / 'train-00000-of-00001.parquet').touch()
  for split, content in _WIKI.items():
    rows = [
      line if line.strip() else '' for line in content.splitlines(keepends=True)
    ]
    cut = 7 if split == 'train' else len(rows)  # within an article
    for number, part in enumerate([rows[:cut], rows[cut:]]):
      if part:
        parquet.write_table(
          pa.table({'text': part}),
          mirror / f'{split}-{number:05d}-of-00002.parquet',
          row_group_size=3,
        )
  return folder


@pytest.mark.parametrize(
  'write', [_wiki_folder, _wiki_parent, _wiki_zip, _wiki_parquet]
)
def test_wikitext_is_cut_into_articles_that_join_to_the_file(
  tmp_path, capsys, write
):
  assert run(write(tmp_path / 'wiki'), tmp_path / 'out') == 0
  assert '2 train, 2 validation, 1 test articles' in capsys.readouterr().out
  texts = texts_of(tmp_path / 'out')
  assert {
    split: b''.join(texts[split].values()).decode() for split in texts
  } == (_WIKI)
  assert list(texts['train']) == [
    'train/00000 Robert Boulter',
    'train/00001 Émile = = Zola',
  ]
  assert texts['train']['train/00001 Émile = = Zola'].startswith(b' \n = \xc3')
  manifest = records.Manifest.load(tmp_path / 'out')
  assert manifest.variant == 'wikitext-103-raw-partial'
  # A line's end is a word, as in the published numbers.
  assert {
    split: about.counts['words'] for split, about in (manifest.splits.items())
  } == {split: _num_words(content) for split, content in _WIKI.items()}


@pytest.mark.parametrize('write', [_wiki_folder, _wiki_zip, _wiki_parquet])
def test_a_complete_wikitext_has_the_published_words(
  tmp_path, monkeypatch, write
):
  num_words = _num_words(_WIKI['test'])
  monkeypatch.setitem(
    text_published._WIKITEXT_WORDS, 'test', (60, {'words': num_words})
  )
  monkeypatch.setitem(
    text_published._WIKITEXT_WORDS, 'validation', (2, {'words': 77})
  )
  assert run(write(tmp_path / 'wiki'), tmp_path / 'out') == 0
  splits = records.Manifest.load(tmp_path / 'out').splits
  assert splits['test'].counts['words'] == num_words
  assert splits['validation'].counts['words'] == 77
  assert splits['train'].counts['words'] == _num_words(_WIKI['train'])
  train = (2, {'words': 88})
  monkeypatch.setitem(text_published._WIKITEXT_WORDS, 'train', train)
  source = tmp_path / 'wiki.zip' if write is _wiki_zip else tmp_path / 'wiki'
  assert run(source, tmp_path / 'out') == 0
  manifest = records.Manifest.load(tmp_path / 'out')
  assert manifest.variant == 'wikitext-103-raw'
  assert manifest.splits['train'].counts['words'] == 88


def _cut_short(path):
  path.write_bytes(path.read_bytes()[:-40])
  return path


@pytest.mark.parametrize(
  ('write', 'said'),
  [
    (lambda p: _cut_short(_wiki_zip(p)), 'cannot be unpacked'),
    (
      lambda p: (
        _cut_short(next(_pg19_parquet(p).rglob('train*.parquet'))).parent
      ),
      'cannot be read as parquet',
    ),
    (lambda p: _other_zip(p), 'has 0 members wiki.train.raw'),
    (lambda p: _other_zip(p, '../wiki.train.raw'), 'leaves its folder'),
    (lambda p: _other_parquet(p), 'has the columns body, id, which is neither'),
    (lambda p: _no_split(p), 'does not say which split it is'),
  ],
)
def test_a_download_that_is_not_right_ends_in_one_sentence(
  tmp_path, capsys, write, said
):
  assert run(write(tmp_path / 'in'), tmp_path / 'out') == 2
  message = capsys.readouterr().err
  assert said in message and message.count('\n') == 1
  assert not (tmp_path / 'out').exists()


def _other_zip(folder, name='other.txt'):
  path = folder.with_suffix('.zip')
  with zipfile.ZipFile(path, 'w') as archive:
    archive.writestr(name, 'x')
  return path


def _other_parquet(folder):
  folder.mkdir()
  table = pa.table({'id': [1], 'body': ['x']})
  parquet.write_table(table, folder / 'train.parquet')
  return folder


def _no_split(folder):
  folder.mkdir()
  parquet.write_table(pa.table({'text': ['x']}), folder / 'part-0.parquet')
  return folder
