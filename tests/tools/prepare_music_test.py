"""MAESTRO and other MIDI files, found, checked and encoded."""

import hashlib
import json
import pathlib
import shlex
import shutil
import subprocess
import sys
import zipfile

import numpy as np
import pytest

from perceiver_ar.data import midi, music, records, tokens

_TOOLS = pathlib.Path(__file__).parents[2] / 'tools'
_TOOL = _TOOLS / 'prepare_music.py'
sys.path.insert(0, str(_TOOLS))

import encoded_parts  # noqa: E402
import prepare_music  # noqa: E402

_SPLITS = {
  '2004/Étude, in C_wav--1.midi': 'train',
  '2004/b.midi': 'validation',
  '2018/c.midi': 'test',
}


def piece(seed, lowest=40, highest=90):
  rng = np.random.default_rng(seed)
  start_N = np.cumsum(rng.uniform(0, 0.3, 30))
  notes = midi.Notes(
    start_N,
    start_N + rng.uniform(0.01, 1.5, 30),
    rng.integers(lowest, highest + 1, 30).astype(np.int32),
    rng.integers(1, 128, 30).astype(np.int32),
  )
  return midi.write(notes, 1000)


def maestro(folder, form, edition='maestro-v3.0.0'):
  """Three pieces with their list, as the archive unpacks."""
  root = folder / edition
  rows = []
  for seed, (name, split) in enumerate(_SPLITS.items()):
    (root / name).parent.mkdir(parents=True, exist_ok=True)
    (root / name).write_bytes(piece(seed))
    title = 'Sonata, No. "1", Ré'
    rows.append(
      {'canonical_title': title, 'split': split, 'midi_filename': name}
    )
  if form == 'csv':
    lines = ['canonical_title,split,midi_filename']
    lines += [
      '"{}",{},"{}"'.format(row['canonical_title'].replace('"', '""'),
                            row['split'], row['midi_filename'])
      for row in rows
    ]  # fmt: skip
    content = '\n'.join(lines) + '\n'
  elif form == 'rows':
    content = json.dumps(rows)
  else:
    columns = {key: {} for key in rows[0]}
    for i, row in enumerate(rows):
      for key, value in row.items():
        columns[key][str(i)] = value
    content = json.dumps(columns)
  suffix = 'csv' if form == 'csv' else 'json'
  (root / f'{edition}.{suffix}').write_text(content)
  return root


def zipped(folder, path):
  with zipfile.ZipFile(path, 'w', zipfile.ZIP_DEFLATED) as file:
    for member in sorted(folder.parent.rglob('*')):
      if member.is_file() and member != path:
        file.write(member, member.relative_to(folder.parent))
  return path


def many(folder, number=30):
  for seed in range(number):
    path = (
      folder / f'shelf {seed % 3}' / f'{seed}.{"MID" if seed % 2 else "midi"}'
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(piece(seed))
  return folder


def run(source, output, *more):
  return prepare_music.main(
    [f'--input={source}', f'--output={output}', '--workers=1', *more]
  )


def content(folder):
  return {path.name: path.read_bytes() for path in folder.iterdir()}


def documents(output, split):
  found = records.Documents(str(output), split)
  return {found.info(i).name: found[i] for i in range(len(found))}


@pytest.mark.parametrize('form', ['csv', 'rows', 'columns'])
@pytest.mark.parametrize('is_zip', [False, True])
def test_maestro_has_its_published_splits(tmp_path, capsys, form, is_zip):
  root = source = maestro(tmp_path / 'in', form)
  if is_zip:
    source = zipped(root, tmp_path / 'maestro-v3.0.0-midi.zip')
  assert run(source, tmp_path / 'out') == 0
  manifest = records.Manifest.load(tmp_path / 'out')
  assert (manifest.kind, manifest.variant) == (
    'music', 'maestro-v3.0.0-partial'
  )  # fmt: skip
  codec = music.MusicCodec(388)
  for name, split in _SPLITS.items():
    tokens_T = documents(tmp_path / 'out', split)[name]
    expected = codec.read((root / name).read_bytes())
    assert (tokens_T[0], tokens_T[-1]) == (tokens.SOS, tokens.EOS)
    np.testing.assert_array_equal(tokens_T[1:-1], expected)
    counts = manifest.splits[split].counts
    assert counts == {'events': len(expected), 'notes': 30}
  said = capsys.readouterr().out
  assert 'this is a part of maestro-v3.0.0 (1 of 962 in train' in said


def test_a_complete_edition_keeps_its_name(tmp_path, monkeypatch):
  monkeypatch.setitem(
    prepare_music.music_sources._PUBLISHED, 'maestro-v3.0.0', (1, 1, 1)
  )
  assert run(maestro(tmp_path / 'in', 'csv'), tmp_path / 'out') == 0
  manifest = records.Manifest.load(tmp_path / 'out')
  assert manifest.variant == 'maestro-v3.0.0'


@pytest.mark.parametrize(
  ('edition', 'config'),
  [
    ('maestro-v1.0.0', 'maestro_v1'),
    ('maestro-v2.0.0', 'small'),  # nothing is published on it
    ('maestro-v3.0.0', 'maestro_v3'),
  ],
)
def test_the_next_command_has_the_published_config(
  tmp_path, capsys, edition, config
):
  root = maestro(tmp_path / 'in', 'csv', edition)
  assert run(root, tmp_path / 'an output') == 0
  said = capsys.readouterr().out
  command = said.splitlines()[-1]
  assert command.startswith('Next: perceiver-ar train ')
  assert f'--config=configs/music.py:{config} ' in command
  words = shlex.split(command)
  assert f'--config.data.path={tmp_path}/an output' in words
  assert run(many(tmp_path / 'many', 3), tmp_path / 'out') == 0
  assert 'configs/music.py:small ' in capsys.readouterr().out


def test_both_vocabularies_can_be_had(tmp_path, capsys):
  source = maestro(tmp_path / 'in', 'csv')
  assert run(source, tmp_path / 'out', '--vocabulary=308') == 0
  found = records.Documents(str(tmp_path / 'out'), 'train')
  assert found.codec.kind == 'events308' and found.vocab_size == 311
  assert '--config.model.vocab_size=311' in capsys.readouterr().out


def test_files_are_held_out_by_their_names(tmp_path, capsys):
  source = many(tmp_path / 'in')
  (source / 'notes.txt').write_text('not music')
  (source / '._0.mid').write_text('what some systems leave; hidden')
  assert run(source, tmp_path / 'out', '--held_out=0.1') == 0
  assert '1 files' in capsys.readouterr().out
  held = documents(tmp_path / 'out', 'validation')
  train = documents(tmp_path / 'out', 'train')
  assert len(held) == 3 and len(train) == 27

  def digest(name):
    return hashlib.sha256(name.encode()).hexdigest()

  assert max(map(digest, held)) < min(map(digest, train))
  zipped(source, tmp_path / 'in.zip')
  assert run(tmp_path / 'in.zip', tmp_path / 'two', '--held_out=0.1') == 0
  assert content(tmp_path / 'two') == content(tmp_path / 'out')


def split_folders(folder, *names):
  """Three pieces in each of the folders, and one in none of them."""
  for seed, name in enumerate(names):
    for i in range(3):
      path = folder / name / 'a' / f'{i}.mid'
      path.parent.mkdir(parents=True, exist_ok=True)
      path.write_bytes(piece(9 * seed + i))
  (folder / 'stray.mid').write_bytes(piece(99))
  return folder


@pytest.mark.parametrize('is_zip', [False, True])
@pytest.mark.parametrize('validation', ['validation', 'valid', 'val'])
def test_folders_that_are_named_like_splits_are_splits(
  tmp_path, capsys, validation, is_zip
):
  source = split_folders(tmp_path / 'in', 'train', validation, 'test', 'more')
  if is_zip:
    source = zipped(source, tmp_path / 'in.zip')
  assert run(source, tmp_path / 'out') == 0
  assert '4 files' in capsys.readouterr().out
  for split in ('train', 'validation', 'test'):
    folder = validation if split == 'validation' else split
    names = {f'{folder}/a/{i}.mid' for i in range(3)}
    assert set(documents(tmp_path / 'out', split)) == names
  assert run(source, tmp_path / 'two', '--held_out=0.1') == 2
  assert '--held_out=0.1 is for' in capsys.readouterr().err


def test_validation_is_held_out_of_nothing_but_the_training_folder(tmp_path):
  source = split_folders(tmp_path / 'in', 'train', 'test')
  assert run(source, tmp_path / 'out', '--held_out=0.1') == 0
  train, validation, test = (
    set(documents(tmp_path / 'out', split))
    for split in ('train', 'validation', 'test')
  )
  assert (len(train), len(validation), len(test)) == (2, 1, 3)
  assert all(name.startswith('train/') for name in train | validation)
  assert all(name.startswith('test/') for name in test)


def test_a_zip_may_have_its_splits_on_top(tmp_path):
  source = split_folders(tmp_path / 'in', 'train', 'test')
  (source / 'stray.mid').unlink()
  with zipfile.ZipFile(tmp_path / 'in.zip', 'w') as file:
    for path in sorted(source.rglob('*.mid')):
      file.write(path, path.relative_to(source))
  assert run(source, tmp_path / 'one') == 0
  assert run(tmp_path / 'in.zip', tmp_path / 'two') == 0
  assert content(tmp_path / 'one') == content(tmp_path / 'two')


def test_training_pieces_have_their_variants_and_no_others(tmp_path):
  root = maestro(tmp_path / 'in', 'csv')
  high = root / '2004/Étude, in C_wav--1.midi'
  high.write_bytes(piece(0, lowest=50, highest=107))
  assert run(root, tmp_path / 'out', '--augment') == 0
  train = documents(tmp_path / 'out', 'train')
  name = high.relative_to(root).as_posix()
  codec = music.MusicCodec(388)
  notes = midi.read(high.read_bytes())
  expected = {}
  for stretch in (0.95, 0.975, 1.0, 1.025, 1.05):
    for transpose in (-3, -2, -1, 0, 1, 2, 3):
      changed = music.augment(notes, stretch, transpose)
      if changed is not None:
        is_same = (stretch, transpose) == (1.0, 0)
        about = '' if is_same else f' x{stretch:g} {transpose:+d}'
        expected[name + about] = codec.encode(changed)
  assert 5 < len(expected) < 35
  assert set(train) == set(expected)
  for key, ids_T in expected.items():
    np.testing.assert_array_equal(train[key][1:-1], ids_T)
  for split in ('validation', 'test'):
    assert len(documents(tmp_path / 'out', split)) == 1


@pytest.mark.parametrize('kind', ['corrupt', 'out of range'])
def test_a_bad_piece_is_rejected_once_in_all_its_keys(
  tmp_path, monkeypatch, kind
):
  source = many(tmp_path / 'in', 6)
  bad = source / 'shelf 1' / '4.midi'
  # Three keys of it are on a piano, but not what was played.
  low = piece(4, lowest=18, highest=60)
  bad.write_bytes(piece(4)[:-9] if kind == 'corrupt' else low)
  times_read = []
  real = midi.read

  def read(data):
    times_read.append(data)
    return real(data)

  monkeypatch.setattr(prepare_music.music_sources.midi, 'read', read)
  options = ['--augment', '--vocabulary=308']
  # 1 of 6 files, whatever the number of their keys.
  assert run(source, tmp_path / 'out', *options) == 2
  monkeypatch.setattr(encoded_parts, 'MAX_REJECTED', 0.2)
  times_read.clear()
  assert run(source, tmp_path / 'out', *options) == 0
  lines = (tmp_path / 'out' / 'rejected.jsonl').read_text().splitlines()
  (line,) = map(json.loads, lines)
  assert (line['split'], line['name']) == ('train', 'shelf 1/4.midi')
  manifest = records.Manifest.load(tmp_path / 'out')
  assert manifest.splits['train'].num_rejected == 1
  assert not any('/4.midi' in n for n in documents(tmp_path / 'out', 'train'))
  # Parts that were encoded before are not read again.
  assert len(times_read) == len(set(times_read)) <= 6


def test_the_number_of_workers_does_not_matter(tmp_path):
  source = many(tmp_path / 'in', 80)
  one = run(source, tmp_path / 'one')
  four = run(source, tmp_path / 'four', '--workers=4')
  assert one == four == 0
  assert content(tmp_path / 'one') == content(tmp_path / 'four')


_BAD = {
  'corrupt': piece(0)[:-9],
  'empty': b'',
  'silent': music.MusicCodec(388).write([])[0],
  'huge': b'MThd' + bytes(midi.MAX_BYTES),
}


@pytest.mark.parametrize('is_zip', [False, True])
@pytest.mark.parametrize('kind', _BAD)
def test_a_bad_file_is_left_out_and_named(tmp_path, capsys, kind, is_zip):
  source = many(tmp_path / 'in', 120)
  bad = next(
    name for name in sorted(source.rglob('*.midi')) if name.stem == '60'
  )
  bad.write_bytes(_BAD[kind])
  if is_zip:
    source = zipped(source, tmp_path / 'in.zip')
  assert run(source, tmp_path / 'out') == 0
  lines = (tmp_path / 'out' / 'rejected.jsonl').read_text().splitlines()
  (line,) = map(json.loads, lines)
  assert '60.midi' in line['name'] and line['reason']
  manifest = records.Manifest.load(tmp_path / 'out')
  splits = manifest.splits.values()
  assert sum(split.num_documents for split in splits) == 119
  assert sum(split.num_rejected for split in splits) == 1
  assert run(source, tmp_path / 'strict', '--strict') == 2
  said = capsys.readouterr().err
  assert '60.midi' in said and said.count('\n') == 1
  assert not (tmp_path / 'strict').exists()


def test_more_than_one_percent_of_bad_files_stop_it(tmp_path, capsys):
  source = many(tmp_path / 'in', 120)
  for name in ('0.midi', '60.midi'):
    next(source.rglob(name)).write_bytes(b'MThd')
  assert run(source, tmp_path / 'out') == 2
  assert 'more than 1%' in capsys.readouterr().err
  assert not (tmp_path / 'out').exists()


def test_a_listed_file_that_is_missing_is_a_bad_one(tmp_path, capsys):
  root = maestro(tmp_path / 'in', 'csv')
  (root / '2018' / 'c.midi').unlink()
  (root / '2018' / 'other.midi').write_bytes(piece(9))
  assert run(root, tmp_path / 'out') == 2
  captured = capsys.readouterr()
  assert '2018/c.midi' in captured.err and 'cannot be read' in captured.err
  assert '1 MIDI files are not in' in captured.out


def _rewrite(root, old, new):
  path = next(root.glob('*.csv'))
  path.write_text(path.read_text().replace(old, new))


@pytest.mark.parametrize(
  ('damage', 'options', 'said'),
  [
    (shutil.rmtree, [], 'is not there'),
    (lambda r: _rewrite(r, 'midi_filename', 'file'), [], 'midi_filename'),
    (lambda r: _rewrite(r, ',test', ',exam'), [], "split 'exam'"),
    (lambda r: _rewrite(r, '2018/', '../'), [], 'no file beside it'),
    (lambda r: _rewrite(r, '2018/c', '2004/b'), [], 'twice'),
    (lambda r: next(r.glob('*.csv')).write_bytes(b'\xff'), [], 'not the list'),
    (lambda r: next(r.glob('*.csv')).write_text('a,b\n'), [], 'no perform'),
    (
      lambda r: next(r.glob('*.csv')).unlink(),
      *(['--held_out=2'], '--held_out=2.0 must lie'),
    ),
    (lambda r: None, ['--held_out=.1'], '--held_out=0.1 is for'),
    (lambda r: None, ['--workers=0'], '--workers=0'),
  ],
)
def test_a_mistake_ends_in_one_sentence(
  tmp_path, capsys, damage, options, said
):
  root = maestro(tmp_path / 'in', 'csv')
  damage(root)
  status = run(root, tmp_path / 'out', *options)
  message = capsys.readouterr().err
  assert status == 2 and said in message and message.count('\n') == 1
  assert message.startswith('prepare_music: ')
  assert not (tmp_path / 'out').exists()


@pytest.mark.parametrize(
  'name', ['../a.mid', '/a.mid', 'a/../../b.mid', 'C:/a']
)
def test_a_zip_that_leaves_its_folder_is_refused(tmp_path, capsys, name):
  with zipfile.ZipFile(tmp_path / 'in.zip', 'w') as file:
    file.writestr(name, piece(0))
    file.writestr('b.mid', piece(1))
  assert run(tmp_path / 'in.zip', tmp_path / 'out') == 2
  assert 'leaves its folder' in capsys.readouterr().err


def test_a_damaged_zip_is_said(tmp_path, capsys):
  (tmp_path / 'in.zip').write_bytes(b'PK\3\4 and so on')
  assert run(tmp_path / 'in.zip', tmp_path / 'out') == 2
  assert 'no zip file' in capsys.readouterr().err


def test_a_member_with_another_checksum_is_rejected(tmp_path, capsys):
  source = many(tmp_path / 'in', 3)
  with zipfile.ZipFile(tmp_path / 'in.zip', 'w') as file:
    for path in sorted(source.rglob('*.mid*')):
      file.write(path, path.name)
  data = bytearray((tmp_path / 'in.zip').read_bytes())
  data[data.index(b'MTrk') + 30] ^= 1
  (tmp_path / 'in.zip').write_bytes(data)
  assert run(tmp_path / 'in.zip', tmp_path / 'out') == 2
  assert 'CRC' in capsys.readouterr().err


@pytest.mark.parametrize('number', [0, 1])
def test_a_folder_needs_two_performances(tmp_path, capsys, number):
  (tmp_path / 'in').mkdir()
  assert run(many(tmp_path / 'in', number), tmp_path / 'out') == 2
  assert capsys.readouterr().err.count('\n') == 1


def test_tokens_of_one_file_are_printed_for_programs(tmp_path, capsys):
  path = tmp_path / 'a.mid'
  path.write_bytes(piece(0))
  for option, num_events in (([], 388), (['--vocabulary=308'], 308)):
    assert prepare_music.main(['--print_tokens', str(path), *option]) == 0
    ids = music.encode(midi.read(path.read_bytes()), num_events)
    assert json.loads(capsys.readouterr().out) == {
      'file': str(path),
      'num_notes': 30,
      'num_tokens': len(ids),
      'sha256_int32_le': hashlib.sha256(
        ids.astype('<i4').tobytes()
      ).hexdigest(),
    }
  path.write_bytes(b'MThd')
  assert prepare_music.main([f'--print_tokens={path}']) == 2
  assert f'{path}: this is no MIDI file' in capsys.readouterr().err
  assert prepare_music.main([f'--print_tokens={path}x']) == 2


def test_the_script_itself_exits_with_status_2(tmp_path):
  result = subprocess.run(
    [sys.executable, str(_TOOL), f'--input={tmp_path}/no', '--output=o'],
    capture_output=True,
    text=True,
    cwd=tmp_path,
    check=False,
  )
  assert result.returncode == 2 and not result.stdout
  assert result.stderr.startswith('prepare_music: ')
