"""Damaged files are refused, whichever they are."""

import errno
import itertools
import os
import shutil
import socket

import pytest
from etils import epath
from states import CONFIG, make_mesh, make_state, same, sharded

from perceiver_ar import checkpoint, errors, host_memory, saved_step
from perceiver_ar.errors import UserError


def cut(content):
  return content[: len(content) // 2]


def empty(content):
  del content
  return b''


def delete(content):
  del content


def flip(share):
  def change(content):
    changed = bytearray(content)
    if changed:
      changed[int(share * (len(changed) - 1))] ^= 0x10
    return bytes(changed)

  return change


CHANGES = [cut, empty, delete, flip(0.05), flip(0.5)]


@pytest.fixture
def saved(tmp_path):
  with checkpoint.Checkpoints(tmp_path, CONFIG.checkpoint) as checkpoints:
    checkpoints.save(3, make_state(3), config=CONFIG, loss=None)
  return epath.Path(tmp_path / 'checkpoints' / '3')


def test_storage_that_does_not_answer_is_no_damage(saved, monkeypatch):
  def away(path):
    raise OSError(errno.ESTALE, os.strerror(errno.ESTALE), str(path))

  monkeypatch.setattr(type(saved), 'read_text', away)
  with pytest.raises(errors.PassingError) as raised:
    saved_step.restore(saved, make_state(3), '')
  sentence, status = errors.explain(raised.value)
  assert status == errors.RESTART
  assert sentence.startswith(str(saved)) and 'Stale file handle' in sentence


class BackendError(Exception):
  """As gcsfs has it."""

  code = 503


@pytest.mark.parametrize(
  'error',
  [
    TimeoutError('no answer'),
    socket.gaierror(socket.EAI_AGAIN, 'Temporary failure in name resolution'),
    OSError('Service Unavailable, 503'),  # as a bucket says it
    BackendError('Backend Error, 503'),
  ],
)
def test_a_bucket_that_does_not_answer_is_no_damage(saved, monkeypatch, error):
  def away(*args, **kwargs):
    raise error

  class Reader:
    restore = away

  for owner, name, value in (
    (type(saved), 'read_text', away),
    (host_memory, 'reader', lambda *_: Reader()),
  ):
    with monkeypatch.context() as patch:
      patch.setattr(owner, name, value)
      with pytest.raises(errors.PassingError):
        saved_step.restore(saved, make_state(3), '')


@pytest.mark.parametrize(
  'error',
  [
    PermissionError(errno.EACCES, os.strerror(errno.EACCES)),
    OSError('x does not have storage.objects.get access to the object'),
  ],
)
def test_who_may_not_read_makes_a_mistake(saved, monkeypatch, error):
  def forbidden(path):
    raise error

  monkeypatch.setattr(type(saved), 'read_text', forbidden)
  with pytest.raises(UserError, match='may not be read') as raised:
    saved_step.restore(saved, make_state(3), '')
  assert errors.explain(raised.value)[1] == errors.MISTAKE
  assert not isinstance(raised.value, saved_step.Damaged)


def test_a_host_without_memory_has_seen_no_damage(saved, monkeypatch):
  def full(path):
    raise MemoryError

  monkeypatch.setattr(type(saved), 'read_text', full)
  with pytest.raises(MemoryError):
    saved_step.restore(saved, make_state(3), '')


@pytest.mark.parametrize(
  ('said', 'kind'),
  [
    (
      'UNKNOWN: Error reading "d/1": [OS error 5: Input/output error]',
      errors.PassingError,
    ),
    ('NOT_FOUND: d/1 [OS error 24: Too many open files]', errors.PassingError),
    ('DEADLINE_EXCEEDED: d/1', errors.PassingError),
    ('PERMISSION_DENIED: d/1', UserError),
    (
      'DATA_LOSS: d/1 [CRC-32C checksum verification failed]',
      saved_step.Damaged,
    ),
  ],
)
def test_readers_say_which_it_is(saved, monkeypatch, said, kind):
  class Reader:
    def restore(self, *args, **kwargs):
      raise ValueError(said)

  monkeypatch.setattr(host_memory, 'reader', lambda *_: Reader())
  with pytest.raises(ValueError, match='d/1') as raised:
    saved_step.restore(saved, make_state(3), '')
  assert type(raised.value) is kind


@pytest.mark.slow  # the checkpoint's own tests have one damage of each kind
def test_no_damage_to_any_file_yields_a_wrong_value(tmp_path):
  expected = make_state(3)
  with checkpoint.Checkpoints(tmp_path, CONFIG.checkpoint) as checkpoints:
    checkpoints.save(3, expected, config=CONFIG, loss=None)
  abstract = sharded(make_mesh(4, 2), expected)
  folder = tmp_path / 'checkpoints' / '3'
  files = [p.relative_to(folder) for p in folder.rglob('*') if p.is_file()]
  num_damaged = dict.fromkeys(files, 0)
  for number, (name, change) in enumerate(itertools.product(files, CHANGES)):
    broken = tmp_path / f'broken{number}' / '3'
    shutil.copytree(folder, broken)
    content = change((folder / name).read_bytes())
    if content is None:
      (broken / name).unlink()
    else:
      (broken / name).write_bytes(content)
    try:
      state = saved_step.restore(epath.Path(broken), abstract, '')
      assert same(state, expected), name
    except saved_step.Damaged as error:
      assert error.step == 3
      assert '\n' not in str(error)
      num_damaged[name] += 1
  # No change of the manifest, the config or the index of arrays is harmless.
  assert sum(n >= len(CHANGES) - 1 for n in num_damaged.values()) >= 4
