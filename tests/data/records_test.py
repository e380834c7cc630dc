import dataclasses
import errno
import hashlib
import json
import os
import pathlib
import pickle
import shutil
import zlib
from concurrent import futures

import bad_records
import numpy as np
import pytest
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from perceiver_ar import errors
from perceiver_ar.data import records
from perceiver_ar.errors import PassingError, UserError


def _replace_record(path, index: int, payload: bytes, **listed) -> None:
  """Rewrites one record of the split train, and the manifest to match.

  `listed` is changed in its line of the list.
  """
  manifest = json.loads((path / records.MANIFEST).read_text())
  file = path / 'train.array_record'
  reader = array_record_module.ArrayRecordReader(str(file))
  payloads = reader.read_all()
  reader.close()
  payloads[index] = payload
  writer = array_record_module.ArrayRecordWriter(str(file), 'group_size:1')
  for content in payloads:
    writer.write(content)
  writer.close()
  lines = (path / 'train.jsonl').read_text().splitlines()
  lines[index] = json.dumps(json.loads(lines[index]) | listed)
  content = ''.join(f'{line}\n' for line in lines).encode()
  (path / 'train.jsonl').write_bytes(content)
  manifest['splits']['train'] |= {
    'file_size': file.stat().st_size,
    'list_sha256': hashlib.sha256(content).hexdigest(),
  }
  (path / records.MANIFEST).write_text(json.dumps(manifest))


def test_documents_come_back_as_they_were_written(write_data):
  documents = records.Documents(str(write_data([2, 5, 300])), 'train')
  assert documents.num_tokens.tolist() == [2, 5, 300]
  assert documents[0].tolist() == [2, 1]
  assert documents[1].tolist() == [2, 10, 11, 12, 1]
  assert documents[2].dtype == np.int32 and len(documents[2]) == 300
  assert documents.info(1) == records.DocumentInfo(
    name='1.txt', num_tokens=5, counts={'bytes': 3, 'words': 1}
  )
  assert (len(documents), documents.longest) == (3, 300)
  assert (documents.vocab_size, documents.codec.kind) == (259, 'bytes')


def test_documents_work_in_threads_and_other_processes(write_data):
  documents = records.Documents(str(write_data(range(2, 40))), 'train')
  documents[0]
  expected = [documents[i].tolist() for i in range(38)]
  sent = pickle.loads(pickle.dumps(documents))
  with futures.ThreadPoolExecutor(2) as pool:
    for copy in (documents, sent):
      assert [t.tolist() for t in pool.map(copy.__getitem__, range(38))] == (
        expected
      )


def test_the_manifest_sums_up_each_split(write_data):
  manifest = records.Manifest.load(write_data([4, 9]))
  train = manifest.splits['train']
  assert (train.num_documents, train.num_tokens, train.longest) == (2, 13, 9)
  assert train.counts == {'bytes': 9, 'words': 1}
  assert manifest.dtype == 'uint16'


def test_the_fingerprint_stands_for_the_content(write_data):
  one = records.Manifest.load(write_data([4, 9], name='one'))
  same = records.Manifest.load(write_data([4, 9], name='two'))
  other = records.Manifest.load(write_data([4, 10], name='three'))
  assert one.fingerprint == same.fingerprint != other.fingerprint
  table = {'kind': 'table', 'rows': [[1]] * 9}
  laid_out = records.Manifest.load(write_data([4, 9], table, name='four'))
  assert one.fingerprint != laid_out.fingerprint
  assert len(one.fingerprint) == 64


def test_the_manifest_survives_json(write_data):
  folder = write_data([4])
  manifest = records.Manifest.load(folder)
  again = records.Manifest.from_json(manifest.to_json(), folder)
  assert again == manifest and again.fingerprint == manifest.fingerprint


@pytest.mark.parametrize(
  ('change', 'match'),
  [
    (lambda raw: raw.update(colour='red'), 'colour unknown or missing'),
    (lambda raw: raw.pop('dtype'), 'dtype unknown or missing'),
    (lambda raw: raw['vocabulary'].pop('size'), 'size unknown or missing'),
    (lambda raw: raw['splits']['train'].update(x=1), 'x unknown or missing'),
    (lambda raw: raw.update(splits=[]), 'where an object belongs'),
    (lambda raw: raw.update(vocabulary=3), 'where an object belongs'),
    (lambda raw: raw.update(version=99), 'version 99'),
    (lambda raw: raw.update(dtype='O'), "dtype is 'O'"),
    (lambda raw: raw.update(kind=3), 'kind is 3 where a string belongs'),
    (
      lambda raw: raw['splits']['train'].update(longest=-1),
      'longest is -1 where a whole number belongs',
    ),
    (
      lambda raw: raw['splits'].update({'../x': raw['splits']['train']}),
      r"manifest\.json names the split '\.\./x'",
    ),
    (
      lambda raw: raw['splits'].update({'/etc/x': raw['splits']['train']}),
      "the split '/etc/x', which is no name of files beside it",
    ),
  ],
)
def test_a_manifest_of_another_form_is_refused(write_data, change, match):
  path = write_data([4]) / records.MANIFEST
  raw = json.loads(path.read_text())
  change(raw)
  path.write_text(json.dumps(raw))
  with pytest.raises(UserError, match=match):
    records.Manifest.load(path.parent)


@pytest.mark.parametrize(
  ('path', 'match'),
  [
    ('', r'data\.path is empty; .*tools/prepare_\*\.py .*--config\.data\.'),
    ('{tmp}/nowhere', 'there is no folder .*nowhere'),
    ('{tmp}', 'is no prepared data set'),
  ],
)
def test_a_path_without_data_says_how_to_get_some(tmp_path, path, match):
  with pytest.raises(UserError, match=match):
    records.Documents(path.format(tmp=tmp_path), 'train')


def test_a_bucket_is_refused_with_what_to_do():
  with pytest.raises(UserError, match=r'gs://b/x is in a bucket.*copy it'):
    records.Documents('gs://b/x', 'train')


def test_an_unknown_split_lists_those_there(write_data):
  with pytest.raises(UserError, match="'test'; it has train, validation"):
    records.Documents(str(write_data([4])), 'test')


def test_record_files_that_do_not_match_the_manifest_are_refused(write_data):
  path = write_data([4, 9])
  file = path / 'train.array_record'
  content = file.read_bytes()
  file.write_bytes(content[:-1])
  with pytest.raises(UserError, match=r'train\.array_record has .* bytes'):
    records.Documents(str(path), 'train')
  file.write_bytes(bytes(len(content)))
  with pytest.raises(UserError, match=r'train\.array_record cannot be opened'):
    records.Documents(str(path), 'train')
  file.unlink()
  with pytest.raises(UserError, match=r'train\.array_record is missing'):
    records.Documents(str(path), 'train')


@pytest.mark.parametrize('lines', ['', '{}\n{}\n', 'nonsense\n'])
def test_a_list_of_documents_that_does_not_match_is_refused(write_data, lines):
  path = write_data([4, 9])
  (path / 'train.jsonl').write_text(lines)
  with pytest.raises(UserError, match=r'train\.jsonl'):
    records.Documents(str(path), 'train')


def test_a_list_from_elsewhere_is_refused(tmp_path):
  path = bad_records.write_noise(tmp_path / 'one')
  other = bad_records.write_noise(tmp_path / 'two', seed=1)
  shutil.copy(other / 'train.jsonl', path / 'train.jsonl')
  with pytest.raises(UserError, match=r'train\.jsonl is not the one that'):
    records.Documents(str(path), 'train')


def test_a_corrupted_record_is_named_and_the_others_are_read(tmp_path):
  path = bad_records.write_noise(tmp_path / 'data')
  bad_records.flip(path, 4)
  documents = records.Documents(str(path), 'train')
  for index in range(len(documents)):
    if index != 4:
      assert len(documents[index]) == 102
  with pytest.raises(
    records.DamagedRecord,
    match=r'train\.array_record: record 4 \(4\.txt\) cannot .*; restore',
  ) as caught:
    documents[4]
  assert '\n' not in str(caught.value)


def test_no_flipped_bit_goes_unnoticed(tmp_path):
  """In records, their headers, the index and its header; or in padding."""
  path = bad_records.write_noise(tmp_path / 'data', num_documents=3)
  expected = records.Documents(str(path), 'train')
  expected = [expected[i].tolist() for i in range(3)]
  file, rng = path / 'train.array_record', np.random.default_rng()
  content = file.read_bytes()
  used = np.flatnonzero(np.frombuffer(content, np.uint8))
  num_refused = 0
  for at in rng.choice(used, 80, replace=False).tolist():
    flipped = bytearray(content)
    flipped[at] ^= 1 << int(rng.integers(8))
    file.write_bytes(flipped)
    try:
      documents = records.Documents(str(path), 'train')
      found = [documents[i].tolist() for i in range(3)]
    except UserError as error:
      assert 'train.array_record' in str(error)
      num_refused += 1
    else:
      assert found == expected, at
  assert num_refused > 40


def test_records_from_elsewhere_are_refused(tmp_path):
  """Of the same number and lengths, sound, under a manifest they match."""
  path = bad_records.write_noise(tmp_path / 'one')
  other = bad_records.write_noise(tmp_path / 'two', seed=1)
  bad_records.exchange(path, other)
  documents = records.Documents(str(path), 'train')
  with pytest.raises(
    records.DamagedRecord, match=r'record 0 .*not what was written'
  ):
    documents[0]


@pytest.mark.parametrize('payload', [b'\x02\0\x03\0\x01', b''])
def test_a_record_that_is_not_the_listed_one_is_named(write_data, payload):
  path = write_data([9, 4])
  _replace_record(path, 1, payload)
  documents = records.Documents(str(path), 'train')
  assert len(documents[0]) == 9
  with pytest.raises(records.DamagedRecord, match=r'record 1 .*not what was'):
    documents[1]


def test_a_record_of_another_vocabulary_is_named(write_data):
  path = write_data([9, 4])
  payload = b'\x02\0\x03\0\xff\xff\x01\0'
  _replace_record(path, 1, payload, crc32=zlib.crc32(payload))
  documents = records.Documents(str(path), 'train')
  with pytest.raises(UserError, match='record 1 has the token id 65535'):
    documents[1]


@pytest.mark.parametrize('after', ['open', 'read'])
def test_a_file_that_was_cut_while_it_is_read_is_no_damaged_record(
  write_data, after
):
  """All that follows would be skipped, and the next start refused."""
  documents = records.Documents(str(write_data([40_000] * 9)), 'train')
  if after == 'read':
    documents[0]
  file = documents.folder / 'train.array_record'
  file.write_bytes(b'')
  with pytest.raises(
    UserError, match=r'record 7 \(7\.txt\) .*has 0 bytes, and the manifest'
  ) as caught:
    documents[7]
  assert not isinstance(caught.value, records.DamagedRecord)


def test_a_file_that_is_removed_while_it_is_read(write_data):
  folder = write_data([40, 50, 60])
  one, other = (records.Documents(str(folder), 'train') for _ in range(2))
  one[0]
  (folder / 'train.array_record').unlink()
  assert len(one[2]) == 60  # its file is open, and whole
  with pytest.raises(UserError, match=r'record 2 .*array_record is missing'):
    other[2]


def test_a_manifest_that_was_edited_is_another_data_set(write_data):
  path = write_data([9]) / records.MANIFEST
  before = records.Manifest.load(path.parent).fingerprint
  for old, new in (('"bytes": 7', '"bytes": 8'), ('"train"', '"other"')):
    content = path.read_text()
    assert old in content
    path.write_text(content.replace(old, new))
    assert records.Manifest.load(path.parent).fingerprint != before
    path.write_text(content)
  path.write_text(json.dumps(json.loads(path.read_text())))
  assert records.Manifest.load(path.parent).fingerprint == before


def test_large_vocabularies_are_stored_in_four_bytes():
  assert records.token_dtype(65_536) == np.dtype('<u2')
  assert records.token_dtype(65_537) == np.dtype('<u4')


def test_all_fields_are_counted(write_data):
  """A new field of a split must come with a decision of what it means."""
  names = {field.name for field in dataclasses.fields(records.Split)}
  raw = json.loads((write_data([4]) / records.MANIFEST).read_text())
  assert set(raw['splits']['train']) == names


@pytest.mark.parametrize('file', ['../../secret', '/etc/passwd', ''])
def test_a_manifest_names_no_vocabulary_elsewhere(write_data, file):
  folder = write_data([4])
  raw = json.loads((folder / records.MANIFEST).read_text())
  raw['vocabulary'] |= {'kind': 'tokenizers', 'file': file}
  (folder / records.MANIFEST).write_text(json.dumps(raw))
  with pytest.raises(UserError, match='which is none of this folder') as caught:
    records.Documents(str(folder), 'train')
  assert str(folder) in str(caught.value) and repr(file) in str(caught.value)


def test_files_of_a_data_set_may_be_links(write_data, tmp_path):
  """To another disk: all that is read of them is checked."""
  folder = write_data([4, 9])
  expected = records.Documents(str(folder), 'train')[1]
  for name in ('train.array_record', 'train.jsonl', records.MANIFEST):
    (folder / name).rename(tmp_path / name)
    (folder / name).symlink_to(tmp_path / name)
  assert (records.Documents(str(folder), 'train')[1] == expected).all()


@pytest.mark.parametrize('name', [records.MANIFEST, 'train.jsonl'])
def test_a_pipe_is_not_waited_for(write_data, name):
  folder = write_data([4])
  (folder / name).unlink()
  os.mkfifo(folder / name)
  with pytest.raises(UserError, match=name.replace('.', r'\.')):
    records.Documents(str(folder), 'train')


@pytest.mark.parametrize('number', [errno.EIO, errno.ESTALE, errno.ETIMEDOUT])
def test_storage_that_may_answer_later_is_nobodys_mistake(
  write_data, monkeypatch, number
):
  folder = write_data([40, 50, 60])
  documents = records.Documents(str(folder), 'train')
  away = OSError(number, os.strerror(number))

  class Source:
    def __getitem__(self, index):
      raise RuntimeError(f'UNKNOWN: {away.strerror}; reading 40 bytes')

  monkeypatch.setattr(documents, '_source', Source())
  with pytest.raises(PassingError, match=f'record 1 .*{away.strerror}') as told:
    documents[1]
  assert not isinstance(told.value, records.DamagedRecord)
  assert errors.explain(told.value)[1] == errors.RESTART

  def fail(*args, **kwargs):
    raise away

  for name in ('open', 'stat'):
    with monkeypatch.context() as patch:
      patch.setattr(pathlib.Path, name, fail)
      with pytest.raises((PassingError, OSError)) as told:
        records.Documents(str(folder), 'train')
      assert errors.explain(told.value)[1] == errors.RESTART
