import os
import signal
import subprocess
import sys

import pytest

from perceiver_ar.data import layouts, records, text, writer
from perceiver_ar.errors import UserError

_BYTES = text.Vocabulary(
  kind='bytes', size=259, sha256=text.ByteCodec.sha256, file=''
)


def _write(path, content: str, fail: bool = False) -> None:
  with writer.Writer(path, kind='text', positions=layouts.INDEX) as target:
    target.set_vocabulary(_BYTES)
    tokens_T = text.ByteCodec().encode(content)
    target.add('train', tokens_T, name='a', num_bytes=1, num_words=1)
    if fail:
      raise RuntimeError('interrupted')


def test_a_write_that_fails_leaves_nothing(tmp_path):
  with pytest.raises(RuntimeError, match='interrupted'):
    _write(tmp_path / 'new', 'abc', fail=True)
  assert list(tmp_path.iterdir()) == []


def test_a_write_that_fails_leaves_the_old_data_set(tmp_path):
  _write(tmp_path / 'set', 'abc')
  before = records.Manifest.load(tmp_path / 'set')
  with pytest.raises(RuntimeError, match='interrupted'):
    _write(tmp_path / 'set', 'defgh', fail=True)
  assert records.Manifest.load(tmp_path / 'set') == before
  assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_a_killed_write_leaves_nothing_that_looks_complete(tmp_path):
  code = (
    'import sys, time; from pathlib import Path\n'
    'from perceiver_ar.data import layouts, text, writer\n'
    "with writer.Writer(Path(sys.argv[1]), kind='text',"
    ' positions=layouts.INDEX) as target:\n'
    "  target.set_vocabulary(text.Vocabulary(kind='bytes', size=259,"
    " sha256='', file=''))\n"
    "  target.add('train', text.ByteCodec().encode('abc'), name='a',"
    ' num_bytes=3, num_words=1)\n'
    "  print('added', flush=True); time.sleep(60)\n"
  )
  process = subprocess.Popen(
    [sys.executable, '-c', code, str(tmp_path / 'set')],
    stdout=subprocess.PIPE,
    text=True,
  )
  with process:
    assert process.stdout is not None
    assert process.stdout.readline() == 'added\n'
    os.kill(process.pid, signal.SIGKILL)
  assert not (tmp_path / 'set').exists()
  for left in tmp_path.iterdir():
    assert left.name.endswith('.partial')
    with pytest.raises(UserError, match='no prepared data set'):
      records.Manifest.load(left)
  _write(tmp_path / 'set', 'abc')  # what is left is in nobody's way


def test_a_data_set_is_replaced_as_a_whole(tmp_path):
  _write(tmp_path / 'set', 'abc')
  _write(tmp_path / 'set', 'defgh')
  assert len(records.Documents(str(tmp_path / 'set'), 'train')[0]) == 5
  assert [path.name for path in tmp_path.iterdir()] == ['set']


def test_an_empty_folder_is_filled(tmp_path):
  (tmp_path / 'set').mkdir()
  _write(tmp_path / 'set', 'abc')
  assert len(records.Documents(str(tmp_path / 'set'), 'train')) == 1


def test_anything_else_is_never_overwritten(tmp_path):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(UserError, match='file exists and is no prepared data'):
    _write(tmp_path / 'file', 'abc')
  (tmp_path / 'folder').mkdir()
  (tmp_path / 'folder' / 'thesis.txt').write_text('mine')
  with pytest.raises(UserError, match='folder exists and is no prepared data'):
    _write(tmp_path / 'folder', 'abc')
  _write(tmp_path / 'set', 'abc')
  (tmp_path / 'set' / 'notes.txt').write_text('mine')
  with pytest.raises(UserError, match=r'holds notes\.txt'):
    _write(tmp_path / 'set', 'abc')
  assert (tmp_path / 'set' / 'notes.txt').read_text() == 'mine'
  assert (tmp_path / 'file').read_text() == 'mine'


def test_a_place_that_cannot_be_written_is_named(tmp_path):
  (tmp_path / 'file').write_text('')
  with pytest.raises(UserError, match='cannot be created'):
    _write(tmp_path / 'file' / 'set', 'abc')


def test_folders_are_as_open_as_the_user_has_them(tmp_path):
  _write(tmp_path / 'a' / 'set', 'abc')
  (tmp_path / 'plain').mkdir()
  mode = (tmp_path / 'plain').stat().st_mode
  assert (tmp_path / 'a' / 'set').stat().st_mode == mode
