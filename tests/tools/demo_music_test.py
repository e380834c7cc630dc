import io
import pathlib
import runpy
import subprocess
import tarfile

import pytest

_TOOL = pathlib.Path(__file__).parents[2] / 'tools' / 'demo_music.py'
_FOLDER = 'miditok-3.1.0/tests/MIDIs_one_track'


@pytest.fixture
def tool():
  return runpy.run_path(str(_TOOL))


@pytest.fixture
def pip(monkeypatch):
  """A pip that has an archive with these members, or none of them."""

  def install(names, stderr=''):
    def download(command, **_):
      (target,) = (a for a in command if a.startswith('--dest='))
      if names is None:
        return subprocess.CompletedProcess(command, 1, '', stderr)
      path = pathlib.Path(target.removeprefix('--dest=')) / 'a.tar.gz'
      with tarfile.open(path, 'w:gz') as file:
        for name in names:
          member = tarfile.TarInfo(name)
          member.size = len(name)
          file.addfile(member, io.BytesIO(name.encode()))
      return subprocess.CompletedProcess(command, 0, '', '')

    monkeypatch.setattr(subprocess, 'run', download)

  return install


_PIECES = [f'{_FOLDER}/Maestro_{i}.mid' for i in range(1, 11)]


def test_ten_performances_and_their_list_are_written(tool, pip, tmp_path):
  pip([*_PIECES, f'{_FOLDER}/empty.mid', '../../Maestro_2.mid'])
  for _ in range(2):  # it can be run again
    assert tool['collect'](tmp_path / 'out') == 10
  files = {path.name for path in (tmp_path / 'out').iterdir()}
  pieces = {f'Maestro_{i}.mid' for i in range(1, 11)}
  assert files == pieces | {'maestro-demo.csv'}
  rows = (tmp_path / 'out' / 'maestro-demo.csv').read_text().splitlines()
  held = [row.split(',')[1] for row in rows if row.startswith('validation,')]
  assert held == ['Maestro_1.mid', 'Maestro_3.mid', 'Maestro_9.mid']
  assert len(rows) == 11
  assert [path.name for path in tmp_path.iterdir()] == ['out']


def test_no_network_another_archive_and_a_full_folder_are_said(
  tool, pip, tmp_path, capsys
):
  run = lambda: tool['main']([f'--output={tmp_path}/out'])
  pip(None, 'WARNING: trying\nERROR: no route\n')
  assert run() == 2
  assert 'ERROR: no route); connect to the network' in (
    said := capsys.readouterr().err
  )
  assert said.count('\n') == 1
  pip(_PIECES[1:])
  assert run() == 2
  assert 'not the published one (9 performances)' in capsys.readouterr().err
  pip(_PIECES)
  (tmp_path / 'out').mkdir()
  (tmp_path / 'out' / 'mine.mid').write_bytes(b'')
  assert run() == 2
  assert 'out holds mine.mid' in capsys.readouterr().err
