"""MIDI files as sound, where this machine has a synthesizer for that."""

import os
import shutil
import subprocess
import tempfile
from collections.abc import Sequence
from pathlib import Path

from etils import epath

_FOLDERS = ('/usr/share/sounds/sf2', '/usr/share/soundfonts')
_SUFFIXES = ('.sf2', '.sf3')
_GAIN = '0.8'  # of one piano; the default is meant for an orchestra
_TIMEOUT = 600.0  # seconds; two minutes of music take two


def render_wav(midi: epath.PathLike, wav: epath.PathLike) -> str:
  """Writes `wav`; returns '' or, in a sentence, why there is none."""
  synthesizer = shutil.which('fluidsynth')
  if synthesizer is None:
    return 'there is no sound because fluidsynth is not installed'
  font = _soundfont()
  if isinstance(font, str):
    return font
  with tempfile.TemporaryDirectory() as scratch:  # on a disk, which both need
    local = Path(scratch) / 'a.mid'
    local.write_bytes(epath.Path(midi).read_bytes())
    made = local.with_suffix('.wav')
    command = [
      synthesizer, '-n', '-i', '-q', '-r', '44100', '-g', _GAIN, '-T', 'wav',
      '-F', str(made), str(font), str(local),
    ]  # fmt: skip
    if reason := _run(command, made):
      return f'there is no sound because fluidsynth {reason}'
    # Half a file must never look like all of it.
    partial = epath.Path(wav).parent / f'.{epath.Path(wav).name}.partial'
    partial.write_bytes(made.read_bytes())
    partial.replace(wav)
  return ''


def _run(command: Sequence[str], made: Path) -> str:
  """Runs the synthesizer; '' or what went wrong."""
  try:
    done = subprocess.run(
      command,
      stdin=subprocess.DEVNULL,
      capture_output=True,
      timeout=_TIMEOUT,
      check=False,
    )
  except subprocess.TimeoutExpired:
    return f'took over {_TIMEOUT:.0f} s'
  except OSError as error:
    return f'cannot run ({error.strerror})'
  if done.returncode or not made.exists():
    said = done.stderr.decode(errors='replace').strip().splitlines()
    return f'failed ({said[-1] if said else f"status {done.returncode}"})'
  return ''


def _soundfont() -> Path | str:
  """A soundfont, or why there is none."""
  chosen = os.environ.get('SOUNDFONT')
  if chosen:
    if Path(chosen).is_file():
      return Path(chosen)
    return f'there is no sound because SOUNDFONT={chosen} is no file'
  for folder in map(Path, _FOLDERS):
    if folder.is_dir():
      for path in sorted(folder.iterdir()):
        if path.suffix.lower() in _SUFFIXES and path.is_file():
          return path
  return (
    f'there is no sound because {" and ".join(_FOLDERS)} have no soundfont; '
    'install one, or name one with SOUNDFONT=FILE.sf2'
  )
