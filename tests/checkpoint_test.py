"""Saved states come back bit for bit, or not at all."""

import dataclasses
import os
import shutil
import signal
import subprocess
import sys
import threading
import time

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp
import pytest
from states import CONFIG, ROOT, make_mesh, make_state, same, sharded

from perceiver_ar import checkpoint, distributed, inspection, saved_step
from perceiver_ar import config as config_lib
from perceiver_ar.errors import SaveError, UserError

KEEP = config_lib.CheckpointConfig(
  init_from='',
  save_every=1,
  save_minutes=0.0,
  keep_latest=2,
  keep_best=1,
  keep_every=0,
  max_host_gb=0.0,
)


def save(workdir, steps, losses=None, keep=KEEP):
  with checkpoint.Checkpoints(workdir, keep) as checkpoints:
    for step in steps:
      loss = (losses or {}).get(step)
      checkpoints.save(step, make_state(step), config=CONFIG, loss=loss)


def damage(workdir, step):
  """Flips one bit of the largest file, which Orbax does not notice."""
  folder = workdir / 'checkpoints' / str(step)
  files = [path for path in folder.rglob('*') if path.is_file()]
  path = max(files, key=lambda path: path.stat().st_size)
  content = bytearray(path.read_bytes())
  content[len(content) // 2] ^= 1
  path.write_bytes(content)


@pytest.mark.parametrize('shape', [(4, 2), (1, 8), (2, 1), (1, 1)])
def test_a_state_returns_bit_for_bit_on_any_mesh(tmp_path, shape):
  save(tmp_path, [7])
  abstract = sharded(make_mesh(*shape), make_state(7))
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    state = checkpoints.restore(7, abstract)
  assert same(state, make_state(7))
  for array, wanted in zip(
    jax.tree.leaves(state), jax.tree.leaves(abstract), strict=True
  ):
    assert array.sharding == wanted.sharding


def test_nan_payloads_and_negative_zeros_survive(tmp_path):
  bits_2 = jnp.array([0x7FC12345, 0x80000000], jnp.uint32)
  tree = {'x': jax.lax.bitcast_convert_type(bits_2, jnp.float32)}
  tree = jax.device_put(tree, jax.devices()[0])
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    checkpoints.save(1, tree, config=CONFIG, loss=None)
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
      tree,
    )
    assert same(checkpoints.restore(1, abstract), tree)


def test_the_newest_and_the_best_are_kept(tmp_path):
  losses = {1: 3.0, 2: 1.0, 3: 2.0, 5: float('nan')}
  save(tmp_path, range(1, 7), losses)
  assert checkpoint.saved_steps(tmp_path) == [2, 5, 6]
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    assert checkpoints.latest() == 6
    # The losses of earlier runs count.
    checkpoints.save(7, make_state(7), config=CONFIG, loss=1.5)
    assert checkpoints.steps() == [2, 6, 7]


def test_a_step_without_an_evaluation_is_never_the_best(tmp_path):
  keep = dataclasses.replace(KEEP, keep_latest=1, keep_best=3)
  with checkpoint.Checkpoints(tmp_path, keep) as checkpoints:
    assert checkpoints.latest() is None
    for step in (1, 2):
      checkpoints.save(step, make_state(step), config=CONFIG, loss=None)
    assert checkpoints.steps() == [2]


def test_keeping_no_best_keeps_the_newest_alone(tmp_path):
  keep = dataclasses.replace(KEEP, keep_best=0)
  save(tmp_path, range(1, 5), dict.fromkeys(range(1, 5), 1.0), keep)
  assert checkpoint.saved_steps(tmp_path) == [3, 4]


def test_the_newest_the_best_and_every_nth_are_kept_together(tmp_path):
  keep = dataclasses.replace(KEEP, keep_every=4)
  save(tmp_path, range(1, 12), {2: 3.0, 5: 1.0, 7: 2.0}, keep)
  assert checkpoint.saved_steps(tmp_path) == [4, 5, 8, 10, 11]


def test_temporary_steps_go_when_the_next_is_there_and_some_stay(tmp_path):
  keep = dataclasses.replace(KEEP, save_every=3, keep_best=0, keep_every=6)
  there = []
  with checkpoint.Checkpoints(tmp_path, keep) as checkpoints:
    for step in (2, 3, 4, 5, 6, 9, 11, 12, 15, 16):
      checkpoints.save(step, make_state(step), config=CONFIG, loss=None)
      there.append(checkpoints.steps())
  assert there[:5] == [[2], [3], [3, 4], [3, 5], [3, 6]]
  assert there[5:] == [
    [6, 9],
    [6, 9, 11],
    [6, 9, 12],
    [6, 12, 15],
    [6, 12, 15, 16],
  ]


def test_saving_a_step_again_leaves_it_as_it_is(tmp_path):
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    checkpoints.save(1, make_state(1), config=CONFIG, loss=None)
    checkpoints.save(1, make_state(2), config=CONFIG, loss=None)
    abstract = sharded(make_mesh(4, 2), make_state())
    assert same(checkpoints.restore(1, abstract), make_state(1))


@pytest.mark.parametrize(
  ('change', 'named'),
  [
    (lambda p: p | {'extra': p['embed']}, 'params/extra/table is absent there'),
    (lambda p: {'embed': p['embed']}, 'params/layers/kernel is'),
    (
      lambda p: p | {'embed': {'table': jnp.zeros((48, 64))}},
      'params/embed/table is float32[64,48] there and float32[48,64] here',
    ),
    (
      lambda p: p | {'embed': {'table': jnp.zeros((64, 48), jnp.bfloat16)}},
      'params/embed/table is float32[64,48] there and bfloat16[64,48] here',
    ),
  ],
)
def test_another_model_is_the_users_mistake_and_not_damage(
  tmp_path, change, named
):
  save(tmp_path, [1])
  state = make_state()
  other = state.replace(params=change(state.params))
  abstract = sharded(make_mesh(4, 2), other)
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    for call in (
      lambda: checkpoints.restore(1, abstract),
      lambda: checkpoints.restore_newest(abstract),
      lambda: checkpoint.restore_params(tmp_path, abstract.params, None),
    ):
      with pytest.raises(UserError) as error:
        call()
      assert not isinstance(error.value, checkpoint.Damaged)
      assert named in str(error.value)
  assert checkpoint.saved_steps(tmp_path) == [1]


def test_an_empty_folder_and_a_renamed_step_are_damaged(tmp_path):
  save(tmp_path, [3])
  folder = tmp_path / 'checkpoints'
  (folder / '3').rename(folder / '4')
  (folder / '5').mkdir()
  (folder / '6.orbax-checkpoint-tmp').mkdir()
  rows = inspection.verify(tmp_path)
  assert [(row['step'], row['ok']) for row in rows] == [(4, False), (5, False)]
  assert 'saved as step 3' in rows[0]['reason']


def test_a_damaged_step_is_set_aside_and_the_one_before_is_used(
  tmp_path, caplog
):
  abstract = sharded(make_mesh(4, 2), make_state())
  for number in (1, 2):
    save(tmp_path, [2, 3])
    damage(tmp_path, 3)
    with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
      restored = checkpoints.restore_newest(abstract)
      assert restored is not None
      assert restored[0] == 2
      assert same(restored[1], make_state(2))
      assert checkpoints.steps() == [2]
    place = tmp_path / 'damaged' / f'3-{number}'
    assert (place / '_CHECKPOINT_METADATA').exists()
    (message,) = [record.getMessage() for record in caplog.records]
    assert 'checkpoints/3 is damaged' in message
    assert f'kept in {place}' in message
    assert 'step 2 is used instead' in message
    caplog.clear()
  # A run goes on from there.
  save(tmp_path, [3])
  assert all(row['ok'] for row in inspection.verify(tmp_path))


@pytest.mark.parametrize('at', [0, 1])
def test_what_another_process_cannot_read_none_restores(
  tmp_path, monkeypatch, at
):
  """Of the manifest, of the arrays."""
  save(tmp_path, [1])
  said = []

  def exchange(name, reason):
    said.append(reason)
    return [reason, 'cut short' if len(said) == at + 1 else '']

  monkeypatch.setattr(distributed, 'exchange', exchange)
  monkeypatch.setattr(distributed._job, 'names', ['a', 'b'])
  folder = checkpoint.step_folder(tmp_path, 1)
  abstract = sharded(make_mesh(1, 1), make_state(1))
  with pytest.raises(checkpoint.Damaged, match=r'process 1 \(b\) found: cut'):
    saved_step.restore(folder, abstract, '')
  assert said == [''] * (at + 1)


def test_when_all_are_damaged_the_run_stops_and_keeps_them(tmp_path):
  save(tmp_path, [2, 3])
  for step in (2, 3):
    damage(tmp_path, step)
  abstract = sharded(make_mesh(4, 2), make_state())
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    with pytest.raises(UserError, match=r'every checkpoint in .* was damaged'):
      checkpoints.restore_newest(abstract)
    assert checkpoints.restore_newest(abstract) is None
  places = sorted(path.name for path in (tmp_path / 'damaged').iterdir())
  assert places == ['2-1', '3-1']


def test_parameters_are_restored_alone_and_nothing_is_moved(tmp_path, caplog):
  save(tmp_path, [2, 3])
  abstract = sharded(make_mesh(2, 4), make_state().params)
  step, params = checkpoint.restore_params(tmp_path, abstract, None)
  assert step == 3
  assert same(params, make_state(3).params)
  damage(tmp_path, 3)
  with pytest.raises(checkpoint.Damaged):
    checkpoint.restore_params(tmp_path, abstract, 3)
  step, params = checkpoint.restore_params(tmp_path, abstract, None)
  assert step == 2
  assert same(params, make_state(2).params)
  assert 'step 2 is used instead' in caplog.text
  assert checkpoint.saved_steps(tmp_path) == [2, 3]
  with pytest.raises(UserError, match='no step 9; it has: 2, 3'):
    checkpoint.restore_params(tmp_path, abstract, 9)
  with pytest.raises(UserError, match='holds no checkpoint'):
    checkpoint.restore_params(tmp_path / 'nowhere', abstract, None)


def test_a_state_may_be_donated_right_after_saving(tmp_path):
  keep = dataclasses.replace(KEEP, keep_latest=9)
  add = jax.jit(
    lambda tree: jax.tree.map(lambda x: x + 1, tree), donate_argnums=0
  )
  state = {f'x{i}': jnp.full((1024, 512), float(i)) for i in range(8)}
  state = jax.device_put(state, jax.devices()[0])
  with checkpoint.Checkpoints(tmp_path, keep) as checkpoints:
    for step in range(4):
      checkpoints.save(step, state, config=CONFIG, loss=None)
      state = add(state)
  assert [row['ok'] for row in inspection.verify(tmp_path)] == [True] * 4


def test_a_copy_elsewhere_is_still_a_checkpoint(tmp_path):
  save(tmp_path / 'here', [1], {1: 0.5})
  shutil.copytree(tmp_path / 'here', tmp_path / 'there')
  one = 'checkpoints/1'
  shutil.copytree(tmp_path / 'here' / one, tmp_path / 'alone' / one)
  shutil.rmtree(tmp_path / 'here')
  abstract = sharded(make_mesh(4, 2), make_state())
  for name in ('there', 'alone'):
    with checkpoint.Checkpoints(tmp_path / name, KEEP) as checkpoints:
      restored = checkpoints.restore_newest(abstract)
    assert restored is not None
    assert same(restored[1], make_state(1))
    assert checkpoint.load_config(tmp_path / name, 1) == CONFIG


def test_steps_are_listed_and_verified_without_the_model(tmp_path):
  save(tmp_path, [1, 2], {2: 0.25})
  rows = inspection.list_steps(tmp_path)
  assert [(row['step'], row['loss']) for row in rows] == [(1, None), (2, 0.25)]
  assert all(row['bytes'] > 1000 and row['created'] for row in rows)
  damage(tmp_path, 1)
  rows = inspection.verify(tmp_path)
  assert [row['ok'] for row in rows] == [False, True]
  assert rows[0]['reason'] and not rows[1]['reason']
  assert checkpoint.saved_steps(tmp_path) == [1, 2]
  assert inspection.list_steps(tmp_path / 'nowhere') == []


def test_a_save_tells_for_how_long_it_goes_on(tmp_path, monkeypatch):
  over, save = threading.Event(), ocp.JsonCheckpointHandler.async_save

  class Slow:
    def result(self, timeout=None):
      over.wait(60)

  async def slow(*args, **kwargs):
    return [*(await save(*args, **kwargs) or []), Slow()]

  monkeypatch.setattr(ocp.JsonCheckpointHandler, 'async_save', slow)
  state = jax.device_put(make_state(1), jax.devices()[0])
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    assert checkpoints.writing() == 0
    checkpoints.save(1, state, config=CONFIG, loss=None)
    first = checkpoints.writing()
    assert 0 < first < checkpoints.writing()
    over.set()
    end = time.monotonic() + 60
    while checkpoints.writing():  # nobody waits for it
      assert time.monotonic() < end
      time.sleep(0.01)
  assert checkpoint.saved_steps(tmp_path) == [1]


class DiskFull:
  def result(self, timeout=None):
    del timeout
    raise OSError('disk full')


@pytest.mark.parametrize('call', ['save', 'check', 'steps', 'latest', 'close'])
def test_a_failure_in_the_background_is_raised_by_the_next_call(
  tmp_path, monkeypatch, call
):
  async def fail(*args, **kwargs):
    del args, kwargs
    return [DiskFull()]

  state = {'x': jnp.arange(8)}
  checkpoints = checkpoint.Checkpoints(tmp_path, KEEP)
  with monkeypatch.context() as patch:
    patch.setattr(ocp.JsonCheckpointHandler, 'async_save', fail)
    checkpoints.save(1, state, config=CONFIG, loss=None)
  deadline = time.time() + 10
  with pytest.raises(SaveError, match=r'disk full.* make room'):
    while time.time() < deadline:
      if call == 'save':
        checkpoints.save(2, state, config=CONFIG, loss=None)
      else:
        getattr(checkpoints, call)()
  # The run may go on, if it likes.
  checkpoints.save(3, state, config=CONFIG, loss=None)
  checkpoints.close()
  assert checkpoint.saved_steps(tmp_path) == [3]


def test_a_save_that_cannot_begin_ends_at_once(tmp_path):
  folder, ended = tmp_path / 'checkpoints', []

  def run():
    with (
      pytest.raises(SaveError, match='could not be written'),
      checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints,
    ):
      folder.rmdir()
      folder.write_text('')  # as a mount that is lost
      checkpoints.save(1, {'x': jnp.arange(8)}, config=CONFIG, loss=None)
    ended.append(True)

  thread = threading.Thread(target=run, daemon=True)
  thread.start()
  thread.join(60)
  assert ended


KILLED = """
import dataclasses, sys, runpy, warnings
warnings.simplefilter('error')
import jax
jax.config.update('jax_num_cpu_devices', 1)
import jax.numpy as jnp
from perceiver_ar import checkpoint, config as config_lib
root, workdir = sys.argv[1:]
path = root + '/configs/default.py'
config = config_lib.resolve(runpy.run_path(path)['get_config']())
keep = dataclasses.replace(
  config.checkpoint, save_every=1, keep_latest=1, keep_best=0
)
key = jax.random.key(0)
state = {f'x{i}': jax.random.normal(key, (1250, 1000)) for i in range(10)}
state['step'] = jnp.int32(0)
add = jax.jit(lambda t: jax.tree.map(lambda x: x + 1, t), donate_argnums=0)
with checkpoint.Checkpoints(workdir, keep) as checkpoints:
  for step in range(1000):
    checkpoints.save(step, state, config=config, loss=None)
    print(step, flush=True)
    state = add(state)
"""


def test_a_kill_in_the_middle_of_a_save_leaves_the_step_before(tmp_path):
  process = subprocess.Popen(
    [sys.executable, '-c', KILLED, str(ROOT), str(tmp_path)],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    env=os.environ | {'JAX_PLATFORMS': 'cpu'},
    text=True,
  )
  folder = tmp_path / 'checkpoints'
  saving = []
  while not saving:
    assert process.poll() is None, process.communicate()[1]
    time.sleep(0.005)
    done = checkpoint.saved_steps(tmp_path)
    saving = [p for p in folder.glob('*tmp*') if done and done[-1] >= 1]
  process.send_signal(signal.SIGKILL)
  _, errors = process.communicate()
  assert errors == ''  # Orbax keeps its chatter to itself, too
  rows = inspection.verify(tmp_path)
  assert rows and all(row['ok'] for row in rows)
  one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = {
    name: jax.ShapeDtypeStruct((1250, 1000), jnp.float32, sharding=one)
    for name in [f'x{i}' for i in range(10)]
  }
  abstract['step'] = jax.ShapeDtypeStruct((), jnp.int32, sharding=one)
  with checkpoint.Checkpoints(tmp_path, KEEP) as checkpoints:
    restored = checkpoints.restore_newest(abstract)
  assert restored is not None
  step, state = restored
  assert step == state['step'] == rows[-1]['step']


def test_a_relative_workdir_is_a_workdir(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  state = {'params': {'a': jnp.arange(3.0)}}
  with checkpoint.Checkpoints('run', CONFIG.checkpoint) as checkpoints:
    checkpoints.save(1, state, config=CONFIG, loss=None)
    checkpoints.wait()
  assert inspection.verify('run') == [{'step': 1, 'ok': True, 'reason': ''}]
  sharding = jax.sharding.SingleDeviceSharding(jax.devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), state
  )
  step, params = checkpoint.restore_params('run', abstract['params'], None)
  assert step == 1
  assert (params['a'] == state['params']['a']).all()
