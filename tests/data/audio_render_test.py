import shlex
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
pathlib.Path(target).write_text(' '.join(arguments[-2:]))
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
  wav = tmp_path / 'a b.wav'
  assert audio_render.render_wav(tmp_path / 'a b.mid', wav) == ''
  font, midi = tmp_path / 'piano.sf2', tmp_path / 'a b.mid'
  assert wav.read_text() == f'{font} {midi}', shlex.quote(str(wav))


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
  before = sorted(tmp_path.iterdir())
  reason = audio_render.render_wav(tmp_path / 'a.mid', tmp_path / 'a.wav')
  assert said in reason and '\n' not in reason
  assert sorted(tmp_path.iterdir()) == before


def test_no_synthesizer_and_no_font_are_said(
  synthesizer, tmp_path, monkeypatch
):
  paths = tmp_path / 'a.mid', tmp_path / 'a.wav'
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
