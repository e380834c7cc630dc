import sys

import pytest

from perceiver_ar.data import audio_render

_STUB = """#!{python}
import pathlib, sys
{body}
"""
_WORKS = """
arguments = sys.argv[1:]
target = arguments[arguments.index('-F') + 1]
midi = pathlib.Path(arguments[-1]).read_text()
pathlib.Path(target).write_text(f'{arguments[-2]} {midi}')
"""


@pytest.fixture
def synthesizer(tmp_path, monkeypatch):
  """Puts a program of that name, and nothing else, on PATH."""

  def install(body):
    folder = tmp_path / 'bin'
    folder.mkdir(exist_ok=True)
    path = folder / 'fluidsynth'
    path.write_text(_STUB.format(python=sys.executable, body=body))
    path.chmod(0o755)

  monkeypatch.setenv('PATH', str(tmp_path / 'bin'))
  (tmp_path / 'piano.sf2').write_text('')
  monkeypatch.setenv('SOUNDFONT', str(tmp_path / 'piano.sf2'))
  return install


def test_the_synthesizer_gets_the_font_and_the_file(synthesizer, tmp_path):
  synthesizer(_WORKS)
  midi, wav = tmp_path / 'a b.mid', tmp_path / 'a b.wav'
  midi.write_text('notes')
  assert audio_render.render_wav(midi, wav) == ''
  assert wav.read_text() == f'{tmp_path / "piano.sf2"} notes'


@pytest.mark.parametrize(
  ('body', 'said'),
  [
    ('sys.exit("no such preset")', 'fluidsynth failed (no such preset)'),
    ('pass', 'fluidsynth failed (status 0)'),
    (_WORKS + 'sys.exit(3)', 'fluidsynth failed (status 3)'),
  ],
)
def test_a_failure_is_said_and_leaves_nothing(
  synthesizer, tmp_path, body, said
):
  synthesizer(body)
  (tmp_path / 'a.mid').write_text('notes')
  before = sorted(tmp_path.iterdir())
  reason = audio_render.render_wav(tmp_path / 'a.mid', tmp_path / 'a.wav')
  assert said in reason and '\n' not in reason
  assert sorted(tmp_path.iterdir()) == before


def test_no_synthesizer_and_no_font_are_said(
  synthesizer, tmp_path, monkeypatch
):
  paths = tmp_path / 'a.mid', tmp_path / 'a.wav'
  paths[0].write_text('notes')
  assert 'fluidsynth is not installed' in audio_render.render_wav(*paths)
  synthesizer(_WORKS)
  monkeypatch.setenv('SOUNDFONT', str(tmp_path / 'gone.sf2'))
  assert 'gone.sf2 is no file' in audio_render.render_wav(*paths)
  monkeypatch.delenv('SOUNDFONT')
  monkeypatch.setattr(audio_render, '_FOLDERS', (str(tmp_path / 'fonts'),))
  assert 'no soundfont' in audio_render.render_wav(*paths)
  (tmp_path / 'fonts').mkdir()
  (tmp_path / 'fonts' / 'piano.SF3').write_text('')
  assert audio_render.render_wav(*paths) == ''
