import json
import os
import signal
import subprocess
import sys

import numpy as np
import pytest

from perceiver_ar.data import layouts, records, text, writer
from perceiver_ar.errors import UserError


def _writer(path):
  return writer.Writer(
    path,
    kind='text',
    variant='',
    codec=text.ByteCodec(),
    positions=layouts.INDEX,
  )


def _write(path, content: str, fail: bool = False) -> None:
  with _writer(path) as target:
    tokens_T = text.ByteCodec().encode(content)
    target.add('train', tokens_T, name='a', counts={'bytes': len(tokens_T)})
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
    "with writer.Writer(Path(sys.argv[1]), kind='text', variant='',"
    ' codec=text.ByteCodec(), positions=layouts.INDEX) as target:\n'
    "  target.add('train', text.ByteCodec().encode('abc'), name='a',"
    " counts={'bytes': 3})\n"
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


def test_what_is_rejected_is_named_and_counted(tmp_path):
  with _writer(tmp_path / 'set') as target:
    target.add('train', np.array([2, 5, 1]), name='a', counts={'bytes': 1})
    target.reject('train', 'b', 'not UTF-8')
  manifest = records.Manifest.load(tmp_path / 'set')
  assert manifest.splits['train'].num_rejected == 1
  line = (tmp_path / 'set' / writer.REJECTED).read_text()
  assert json.loads(line) == {
    'split': 'train',
    'name': 'b',
    'reason': 'not UTF-8',
  }
  _write(tmp_path / 'set', 'abc')  # the list is a part of the data set


def test_published_counts_take_the_place_of_our_own(tmp_path):
  with _writer(tmp_path / 'set') as target:
    for name in 'ab':
      target.add('train', np.array([2, 5, 1]), name=name, counts={'words': 3})
    assert target.num_documents('train') == 2
    target.publish('train', {'words': 7})
  documents = records.Documents(str(tmp_path / 'set'), 'train')
  assert documents.counts == {'words': 7}
  assert documents.info(0).counts == {'words': 3}


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
