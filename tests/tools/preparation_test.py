"""A data set's bytes follow from its input, whatever happened on the way."""

import json
import os
import pathlib
import signal
import subprocess
import sys
import time

import numpy as np
import pytest

from perceiver_ar.data import layouts, records, text, writer
from perceiver_ar.errors import UserError

_TOOLS = pathlib.Path(__file__).parents[2] / 'tools'
sys.path.insert(0, str(_TOOLS))

import encoded_parts  # noqa: E402
import preparation  # noqa: E402


class Encoder:
  """Words become documents; workers find it in this module by its name."""

  def __call__(self, item):
    what, size, log = item.source
    with open(log, 'a') as file:  # what was encoded, and so not kept
      file.write(item.name + '\n')
    if what == 'slow':
      time.sleep(0.2)
    if what == 'bad':
      raise UserError('two lines\nof reason')
    if what == 'no room':
      raise OSError(28, 'No space left on device', 'somewhere')
    if what == 'skip':
      return None
    ids_T = np.random.default_rng(size).integers(3, 259, size)
    return encoded_parts.Document(
      np.concatenate([[2], ids_T, [1]]), {'bytes': size}
    )


def make_items(tmp_path, kinds):
  log = str(tmp_path / 'log')
  return [
    encoded_parts.Item(
      f'{i:03d}', 'validation' if i % 10 == 9 else 'train', (kind, i, log), ''
    )
    for i, kind in enumerate(kinds)
  ]


def prepare(items, output, *, workers=1, strict=False, per_part=8, **job):
  return preparation.prepare(
    items,
    Encoder(),
    output=output,
    kind='text',
    variant='',
    codec=text.ByteCodec(),
    positions=layouts.INDEX,
    job=job,
    unit='documents',
    per_part=per_part,
    workers=workers,
    strict=strict,
    num_files=len(items),
    published={},
  )


def contents(folder):
  return {path.name: path.read_bytes() for path in sorted(folder.iterdir())}


def encoded(tmp_path):
  log = tmp_path / 'log'
  return log.read_text().split() if log.exists() else []


def names_of(tmp_path):
  return sorted(path.name for path in tmp_path.iterdir())


def leftovers(tmp_path):
  return [p.name for p in tmp_path.iterdir() if p.name.startswith('.')]


def test_the_bytes_are_those_of_any_number_of_workers_and_parts(tmp_path):
  kinds = ['good'] * 150 + ['bad'] + ['skip'] * 3 + ['good'] * 6
  items = make_items(tmp_path, kinds)
  prepare(items, tmp_path / 'one', workers=1)
  prepare(items, tmp_path / 'four', workers=4, per_part=5)
  assert contents(tmp_path / 'one') == contents(tmp_path / 'four')
  train = records.Documents(str(tmp_path / 'one'), 'train')
  held = records.Documents(str(tmp_path / 'one'), 'validation')
  assert len(train) + len(held) == 156
  assert [train.info(i).name for i in range(3)] == ['000', '001', '002']
  lines = (tmp_path / 'one' / writer.REJECTED).read_text().splitlines()
  assert [json.loads(line) for line in lines] == [
    {'split': 'train', 'name': '150', 'reason': 'two lines of reason'}
  ]
  assert leftovers(tmp_path) == []


def test_more_than_one_percent_of_bad_items_stop_it(tmp_path):
  items = make_items(tmp_path, ['good'] * 90 + ['bad'])
  with pytest.raises(UserError, match=r'1 of 91 are bad.*090: two lines'):
    prepare(items, tmp_path / 'set')
  assert not (tmp_path / 'set').exists()


def test_strict_stops_at_the_first_bad_item(tmp_path):
  items = make_items(tmp_path, ['good'] * 200 + ['bad'])
  with pytest.raises(UserError, match=r'^200: two lines'):
    prepare(items, tmp_path / 'set', strict=True)
  assert not (tmp_path / 'set').exists()
  prepare(items, tmp_path / 'set')
  assert records.Manifest.load(tmp_path / 'set').splits['train'].num_rejected


def test_what_is_encoded_is_not_encoded_again(tmp_path):
  items = make_items(tmp_path, ['good'] * 40 + ['no room'])
  with pytest.raises(OSError, match='No space'):
    prepare(items, tmp_path / 'set')
  assert not (tmp_path / 'set').exists()
  (tmp_path / 'log').unlink()
  # The one that had no room is another one now; its part is made again.
  prepare(make_items(tmp_path, ['good'] * 41), tmp_path / 'set')
  assert encoded(tmp_path) == ['040']
  prepare(make_items(tmp_path, ['good'] * 41), tmp_path / 'fresh')
  assert contents(tmp_path / 'set') == contents(tmp_path / 'fresh')


def test_other_settings_or_other_input_are_encoded_again(tmp_path):
  items = make_items(tmp_path, ['good'] * 16 + ['no room'])
  for order in ('rgb', 'planes'):
    with pytest.raises(OSError, match='No space'):
      prepare(items, tmp_path / 'set', order=order)
  changed = [
    encoded_parts.Item(i.name, i.split, i.source, 'new') for i in items
  ]
  with pytest.raises(OSError, match='No space'):
    prepare(changed, tmp_path / 'set', order='planes')
  assert len(encoded(tmp_path)) == 3 * 17


_KILLED = """
import sys, pathlib
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import preparation_test as t
if __name__ == '__main__':
  folder = pathlib.Path(sys.argv[3])
  items = t.make_items(folder, ['slow'] * 40)
  t.prepare(items, folder / 'set', workers=2, per_part=2)
"""


def test_a_killed_preparation_goes_on_and_gives_the_same_bytes(tmp_path):
  script = tmp_path / 'killed.py'
  script.write_text(_KILLED)
  here = pathlib.Path(__file__).parent
  process = subprocess.Popen(
    [sys.executable, script, here, _TOOLS, tmp_path],
    stderr=subprocess.DEVNULL,
    start_new_session=True,
  )
  parts = tmp_path / '.set.preparing' / 'parts'
  deadline = time.monotonic() + 60
  while not (parts.is_dir() and len(list(parts.glob('*.jsonl'))) > 3):
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  os.killpg(process.pid, signal.SIGKILL)
  process.wait()
  assert not (tmp_path / 'set').exists()
  done = len(list(parts.glob('*.jsonl')))
  (tmp_path / 'log').unlink()
  items = make_items(tmp_path, ['slow'] * 40)
  prepare(items, tmp_path / 'set', per_part=2)
  assert len(encoded(tmp_path)) == 40 - 2 * done
  quick = make_items(tmp_path, ['good'] * 40)
  prepare(quick, tmp_path / 'undisturbed')
  assert contents(tmp_path / 'set') == contents(tmp_path / 'undisturbed')
  assert leftovers(tmp_path) == []


_FULL = """
import pathlib, resource, sys
size = int(sys.argv[4])
resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
sys.path[:0] = [sys.argv[1], sys.argv[2]]
import preparation, preparation_test as t
if __name__ == '__main__':
  folder = pathlib.Path(sys.argv[3])
  items = t.make_items(folder, ['good'] * 4000)
  work = lambda: t.prepare(items, folder / 'set', workers=1, per_part=100)
  sys.exit(preparation.run('tool', work))
"""


@pytest.mark.parametrize('size', [2**18, 2**21])
def test_a_full_disk_is_said_in_one_sentence(tmp_path, size):
  """A limit on the size of a file: of a part, or of the records."""
  script = tmp_path / 'full.py'
  script.write_text(_FULL)
  here = pathlib.Path(__file__).parent
  command = [sys.executable, script, here, _TOOLS, tmp_path, str(size)]
  done = subprocess.run(command, capture_output=True, text=True)
  assert done.returncode == 2, done.stderr
  last = done.stderr.strip().splitlines()[-1]
  assert last.startswith('tool: ') and 'run it again' in last
  assert 'Traceback' not in done.stderr
  assert not (tmp_path / 'set').exists()


@pytest.mark.parametrize('damage', [b'', b'short', None])
def test_a_part_that_is_damaged_is_made_again(tmp_path, damage):
  items = make_items(tmp_path, ['good'] * 8 + ['no room'])
  with pytest.raises(OSError, match='No space'):
    prepare(items, tmp_path / 'set')
  (part,) = (tmp_path / '.set.preparing' / 'parts').glob('*.tokens')
  content = bytes(part.stat().st_size) if damage is None else damage
  part.write_bytes(content)
  items = make_items(tmp_path, ['good'] * 9)
  prepare(items, tmp_path / 'set')
  prepare(items, tmp_path / 'fresh')
  assert contents(tmp_path / 'set') == contents(tmp_path / 'fresh')


def test_workers_end_when_the_main_process_is_killed(tmp_path):
  script = tmp_path / 'killed.py'
  script.write_text(_KILLED)
  here = pathlib.Path(__file__).parent
  process = subprocess.Popen(
    [sys.executable, script, here, _TOOLS, tmp_path], stderr=subprocess.DEVNULL
  )
  deadline = time.monotonic() + 60
  while len(encoded(tmp_path)) < 3:
    assert process.poll() is None and time.monotonic() < deadline
    time.sleep(0.02)
  process.kill()
  process.wait()
  time.sleep(2.5)
  number = len(encoded(tmp_path))
  time.sleep(0.7)
  assert len(encoded(tmp_path)) == number < 40


@pytest.mark.parametrize('where', ['file/set', 'file'])
def test_an_output_that_cannot_be_is_refused_before_any_work(tmp_path, where):
  (tmp_path / 'file').write_text('mine')
  with pytest.raises(UserError, match='choose another'):
    preparation.work_folder(tmp_path / where)
  assert names_of(tmp_path) == ['file']


@pytest.mark.parametrize('output', ['in', 'in/put', 'in/a/b', 'else/../in/x'])
def test_an_output_within_the_input_is_refused(tmp_path, output):
  with pytest.raises(UserError, match='lies in --input'):
    preparation.check_apart(tmp_path / 'in', tmp_path / output)
  preparation.check_apart(tmp_path / 'in', tmp_path / 'input')


def test_two_preparations_of_one_output_do_not_mix(tmp_path):
  folder = preparation.work_folder(tmp_path / 'set')
  with preparation._locked(folder), pytest.raises(UserError, match='in use'):
    prepare(make_items(tmp_path, ['good'] * 3), tmp_path / 'set')


def test_a_name_that_is_there_twice_is_refused(tmp_path):
  items = make_items(tmp_path, ['good'] * 3)
  with pytest.raises(UserError, match='001 is there twice'):
    prepare([*items, items[1]], tmp_path / 'set')


def test_published_counts_are_those_of_complete_splits(tmp_path):
  def total(kinds, number):
    manifest = preparation.prepare(
      make_items(tmp_path, kinds),
      Encoder(),
      output=tmp_path / 'set',
      kind='text',
      variant='known',
      codec=text.ByteCodec(),
      positions=layouts.INDEX,
      job={},
      unit='documents',
      per_part=64,
      workers=1,
      strict=False,
      num_files=number,
      published={'train': (number, {'bytes': 12345})},
    )
    return manifest.splits['train'].counts['bytes']

  assert total(['good'] * 8, 8) == 12345
  assert total(['good'] * 7, 8) == sum(range(7))


def test_held_out_documents_stay_when_others_come():
  names = [f'{i}.txt' for i in range(100)]
  held = preparation.held_out(names, 0.1)
  assert len(held) == 10
  more = preparation.held_out([*names, *(f'{i}.md' for i in range(100))], 0.1)
  assert held & more
  assert preparation.held_out(['a', 'b'], 0.9) < {'a', 'b'}
