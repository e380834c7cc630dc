"""A workdir can be copied without its data, and never changes its run."""

import json
import os
import shutil
import types

import numpy as np
import pytest
from runs import contents, copy_config
from tiny import make_config

from perceiver_ar import config as config_lib
from perceiver_ar import workdir
from perceiver_ar.data import layouts, text
from perceiver_ar.data.subwords import train_sentencepiece
from perceiver_ar.errors import UserError

TABLE = layouts.validated({'kind': 'table', 'rows': [[1, 1], [1, 2], [2, 1]]})


class DataSet:
  def __init__(self, codec, layout, fingerprint='ab' * 32):
    self.codec = codec
    self.layout = layout
    self.fingerprint = fingerprint


@pytest.fixture(scope='module')
def subwords(tmp_path_factory):
  path = tmp_path_factory.mktemp('vocabulary') / text.SENTENCEPIECE_FILE
  model = train_sentencepiece(['a ship and the sea.\n' * 40] * 4, 272)
  path.write_bytes(model)
  return text.SentencePieceCodec(path)


@pytest.mark.parametrize('kind', ['bytes', 'sentencepiece', 'ids'])
@pytest.mark.parametrize('layout', [layouts.INDEX, TABLE])
def test_what_a_run_was_begun_on_is_read_back(tmp_path, subwords, kind, layout):
  codec = {
    'bytes': text.ByteCodec(),
    'sentencepiece': subwords,
    'ids': text.IdsCodec(77),
  }[kind]
  workdir.begin(tmp_path / 'run', copy_config(), DataSet(codec, layout))
  shutil.copytree(tmp_path / 'run', tmp_path / 'copy')
  shutil.rmtree(tmp_path / 'run')
  trained = workdir.read_trained(tmp_path / 'copy')
  assert trained.fingerprint == 'ab' * 32
  assert (trained.codec.kind, trained.codec.sha256) == (kind, codec.sha256)
  words = b'5 76' if kind == 'ids' else 'the sea, 漢'.encode()
  assert trained.codec.read(words).tolist() == codec.read(words).tolist()
  for index in range(3):
    at = np.array([index])
    assert (
      layouts.positions(trained.layout, at) == layouts.positions(layout, at)
    ).all()
  raw = workdir.read_config(tmp_path / 'copy')
  assert config_lib.resolve(raw) == copy_config()


def test_a_run_may_begin_again_and_change_what_it_does_not_compute(tmp_path):
  data = DataSet(text.ByteCodec(), layouts.INDEX)
  workdir.begin(tmp_path, copy_config(), data)
  workdir.begin(tmp_path, copy_config(), data)
  longer = copy_config(train__num_steps=99, sample__top_p=0.5, mesh__data=2)
  workdir.begin(tmp_path, longer, data)
  assert config_lib.resolve(workdir.read_config(tmp_path)) == longer
  assert not list(tmp_path.glob('*.tmp'))


@pytest.mark.parametrize(
  ('config', 'fingerprint', 'named'),
  [
    (make_config({}), 'ab' * 32, "data.kind: 'copy' -> 'prepared'"),
    (
      copy_config(),
      'cd' * 32,
      'abababababab, and data.path holds cdcdcdcdcdcd',
    ),
  ],
)
def test_another_run_is_refused_and_nothing_is_written(
  tmp_path, config, fingerprint, named
):
  codec = text.ByteCodec()
  workdir.begin(tmp_path, copy_config(), DataSet(codec, layouts.INDEX))
  before = contents(tmp_path)
  with pytest.raises(UserError, match=named):
    other = DataSet(codec, layouts.INDEX, fingerprint)
    workdir.begin(tmp_path, config, other)
  assert contents(tmp_path) == before


def test_another_vocabulary_is_refused(tmp_path, subwords):
  data = DataSet(text.ByteCodec(), layouts.INDEX)
  workdir.begin(tmp_path, copy_config(), data)
  elsewhere = DataSet(text.ByteCodec(), layouts.INDEX, 'cd' * 32)
  workdir.check_vocabulary(tmp_path, elsewhere)  # other data, the same ids
  with pytest.raises(UserError, match=r'bytes 259 .* sentencepiece 272'):
    workdir.check_vocabulary(tmp_path, DataSet(subwords, layouts.INDEX))


@pytest.mark.parametrize('left', [0.0, 0.5, None])
def test_a_vocabulary_that_a_crash_has_cut_is_healed(tmp_path, subwords, left):
  data = DataSet(subwords, layouts.INDEX)
  workdir.begin(tmp_path, copy_config(), data)
  file = tmp_path / 'vocabulary' / subwords.file
  file.unlink()
  if left is not None:
    file.write_bytes(subwords.model[: int(left * len(subwords.model))])
  workdir.check(tmp_path, copy_config(), data)  # of all processes
  workdir.begin(tmp_path, copy_config(), data)
  assert workdir.read_trained(tmp_path).codec.sha256 == subwords.sha256
  assert not list(tmp_path.rglob('*.tmp'))


@pytest.mark.parametrize(
  ('fingerprint', 'named'),
  [
    ('ab' * 32, r'trained with vocabulary sentencepiece 272 .* bytes 259'),
    ('cd' * 32, 'abababababab, and data.path holds cdcdcdcdcdcd'),
  ],
)
def test_another_vocabulary_heals_nothing(
  tmp_path, subwords, fingerprint, named
):
  workdir.begin(tmp_path, copy_config(), DataSet(subwords, layouts.INDEX))
  (tmp_path / 'vocabulary' / subwords.file).write_bytes(b'')
  before = contents(tmp_path)
  other = DataSet(text.ByteCodec(), layouts.INDEX, fingerprint)
  with pytest.raises(UserError, match=named):
    workdir.begin(tmp_path, copy_config(), other)
  assert contents(tmp_path) == before


def test_a_vocabulary_that_is_there_is_not_written_again(tmp_path, subwords):
  data = DataSet(subwords, layouts.INDEX)
  workdir.begin(tmp_path, copy_config(), data)
  file = tmp_path / 'vocabulary' / subwords.file
  os.utime(file, ns=(0, 0))
  before = file.stat()
  workdir.begin(tmp_path, copy_config(), data)
  after = file.stat()
  assert (after.st_ino, after.st_mtime_ns) == (before.st_ino, 0)


def test_a_disk_that_is_full_leaves_whole_files(
  tmp_path, subwords, monkeypatch
):
  def full(number):
    raise OSError(28, 'No space left on device')

  data = DataSet(subwords, layouts.INDEX)
  workdir.begin(tmp_path / 'old', copy_config(), data)
  before = contents(tmp_path)
  monkeypatch.setattr(os, 'fsync', full)
  for name in ('old', 'new'):
    with pytest.raises(OSError, match='No space'):
      workdir.begin(tmp_path / name, copy_config(train__num_steps=99), data)
  assert contents(tmp_path) == before


@pytest.mark.parametrize('name', ['config.json', 'dataset.json'])
def test_a_folder_that_is_no_run_is_named(tmp_path, name):
  data = DataSet(text.ByteCodec(), layouts.INDEX)
  workdir.begin(tmp_path, copy_config(), data)
  path = tmp_path / name
  read = {
    'config.json': workdir.read_config,
    'dataset.json': workdir.read_trained,
  }[name]
  path.write_text(path.read_text()[:-20])
  with pytest.raises(UserError, match=f'{name} is not JSON'):
    read(tmp_path)
  path.unlink()
  with pytest.raises(UserError, match=f'{name} does not exist'):
    read(tmp_path)


def test_files_are_plain_json(tmp_path):
  data = DataSet(text.ByteCodec(), TABLE)
  workdir.begin(tmp_path, copy_config(), data)
  about = json.loads((tmp_path / 'dataset.json').read_text())
  assert about['positions']['rows'] == [[1, 1], [1, 2], [2, 1]]
  assert about['vocabulary']['kind'] == 'bytes'


@pytest.mark.parametrize(
  ('platform', 'set_before', 'set_after'),
  [('cpu', None, None), ('tpu', None, '{}/compiled'), ('tpu', 'own', 'own')],
)
def test_compiled_programs_are_kept_for_all_hosts(
  tmp_path, monkeypatch, platform, set_before, set_after
):
  kept = {'jax_compilation_cache_dir': set_before}
  config = types.SimpleNamespace(**kept, update=kept.__setitem__)
  monkeypatch.setattr(workdir.jax, 'config', config)
  workdir.keep_compiled(tmp_path, platform)
  wanted = set_after and set_after.format(tmp_path)
  assert kept['jax_compilation_cache_dir'] == wanted
