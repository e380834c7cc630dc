"""One text per line of JSONL."""

import json

import pytest
from prepared_texts import jsonl_file, prepare_text, run, texts_of

from perceiver_ar.data import writer


def test_json_lines_are_documents(tmp_path):
  lines = [json.dumps(f'text {i}\n') for i in range(20)]
  lines[3:4] = ['', '{"text": "an object", "id": 7}']
  lines[9] = json.dumps('Émile', ensure_ascii=False)
  path = jsonl_file(tmp_path / 'in', lines)
  assert run(path, tmp_path / 'out') == 0
  texts = texts_of(tmp_path / 'out')
  assert [len(split) for split in texts.values()] == [19, 1]
  joined = texts['train'] | texts['validation']
  assert joined['mine.jsonl:1'] == b'text 0\n'
  assert joined['mine.jsonl:5'] == b'an object'
  assert joined['mine.jsonl:10'] == 'Émile'.encode()


def test_json_lines_that_someone_has_split_stay_so(tmp_path):
  for name in ('train', 'val', 'test'):
    jsonl_file(tmp_path / name, [json.dumps({'body': name})]).rename(
      tmp_path / f'{name}.jsonl'
    )
    (tmp_path / name).rmdir()
  options = [f'--output={tmp_path}.out', '--text_key=body', '--workers=1']
  assert prepare_text.main([f'--input={tmp_path}', *options]) == 0
  assert texts_of(tmp_path.with_name(f'{tmp_path.name}.out')) == {
    'train': {'train.jsonl:1': b'train'},
    'validation': {'val.jsonl:1': b'val'},
    'test': {'test.jsonl:1': b'test'},
  }


def test_json_lines_for_testing_are_not_trained_on(tmp_path, capsys):
  source = tmp_path / 'in'
  for name in ('train', 'test', 'other'):
    lines = [json.dumps(f'{name} {i}') for i in range(10)]
    path = jsonl_file(tmp_path / name, lines)
    source.mkdir(exist_ok=True)
    path.rename(source / f'{name}.jsonl')
  assert run(source, tmp_path / 'out', '--held_out=0.3') == 0
  texts = texts_of(tmp_path / 'out')
  assert f'1 files in {source} are not in' in capsys.readouterr().out
  assert len(texts['train']) == 7 and len(texts['validation']) == 3
  held = texts['train'] | texts['validation']
  assert all(text.startswith(b'train') for text in held.values())
  assert all(text.startswith(b'test') for text in texts['test'].values())


@pytest.mark.parametrize(
  ('line', 'said'),
  [
    (
      '{"text": 3}',
      'mine.jsonl:101: it is neither a string nor an object with',
    ),
    ('{"tex": "t"}', "a string 'text'; mend it, or name the key"),
    ('[1, 2', 'mine.jsonl:101: it is not JSON'),
    (r'"\ud800 half"', 'character 0 is half a surrogate pair'),
    (r'"nul \u0000"', 'it is no plain text: byte 4 is 0'),
    ('""', 'it has 0 tokens'),
    ('"t\xff"', 'not JSON'),
  ],
)
def test_a_bad_line_is_named_and_left_out(tmp_path, capsys, line, said):
  path = jsonl_file(tmp_path / 'in', [json.dumps(f'a {i}') for i in range(100)])
  with path.open('ab') as file:
    file.write(line.encode('latin-1') + b'\n')
  assert run(path, tmp_path / 'strict', '--strict') == 2
  assert said in capsys.readouterr().err
  assert run(path, tmp_path / 'out') == 0
  assert 'rejected.jsonl' in capsys.readouterr().out
  (bad,) = (tmp_path / 'out' / writer.REJECTED).read_text().splitlines()
  bad = json.loads(bad)
  assert said in f'{bad["name"]}: {bad["reason"]}'
