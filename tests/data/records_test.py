import dataclasses
import json
import pickle
from concurrent import futures

import numpy as np
import pytest
from array_record.python import (
  array_record_module,  # pyright: ignore[reportAttributeAccessIssue]
)

from perceiver_ar.data import records
from perceiver_ar.errors import UserError


def _replace_record(path, index: int, payload: bytes) -> None:
  """Rewrites one record of the split train, and the manifest to match."""
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
  manifest['splits']['train']['file_size'] = file.stat().st_size
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


def test_a_corrupted_record_is_named_and_the_others_are_read(write_data):
  rng = np.random.default_rng(0)
  path = write_data([60_000, 60_000, 60_000])
  noise = rng.integers(3, 259, 60_000).astype('<u2').tobytes()
  _replace_record(path, 1, noise)
  file = path / 'train.array_record'
  content = bytearray(file.read_bytes())
  at = 60_000  # the noise fills 120,000 bytes from near the start
  content[at] ^= 0xFF
  file.write_bytes(content)
  documents = records.Documents(str(path), 'train')
  with pytest.raises(UserError, match=r'train\.array_record: record 1 cannot'):
    documents[1]
  assert len(documents[0]) == len(documents[2]) == 60_000


@pytest.mark.parametrize(
  ('payload', 'match'),
  [
    (b'\x02\0\x03\0\x01', 'record 1 has 5 bytes, not 8'),
    (b'', 'record 1 has 0 bytes, not 8'),
    (b'\x02\0\x03\0\xff\xff\x01\0', 'record 1 has the token id 65535'),
  ],
)
def test_a_record_that_does_not_fit_is_named(write_data, payload, match):
  path = write_data([9, 4])
  _replace_record(path, 1, payload)
  documents = records.Documents(str(path), 'train')
  assert len(documents[0]) == 9
  with pytest.raises(UserError, match=match):
    documents[1]


def test_large_vocabularies_are_stored_in_four_bytes():
  assert records.token_dtype(65_536) == np.dtype('<u2')
  assert records.token_dtype(65_537) == np.dtype('<u4')


def test_all_fields_are_counted(write_data):
  """A new field of a split must come with a decision of what it means."""
  names = {field.name for field in dataclasses.fields(records.Split)}
  raw = json.loads((write_data([4]) / records.MANIFEST).read_text())
  assert set(raw['splits']['train']) == names
