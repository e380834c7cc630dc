"""A workdir in a bucket is as one on disk; an emulator plays the bucket."""

import contextlib
import json
import os
import signal
import subprocess
import sys

import pytest
from etils import epath
from hosts import free_port
from runs import TINY, wait_until

from perceiver_ar import journal, paths

gcsfs = pytest.importorskip('gcsfs')
emulator = pytest.importorskip('gcp_storage_emulator.server')

_WORDS = [
  'train',
  TINY,
  '--config.train.num_steps=40',
  '--config.checkpoint.save_every=10',
  '--config.evaluate.every=20',
]


@pytest.fixture
def bucket(monkeypatch):
  """gs://bucket for this process and those that it starts."""
  monkeypatch.setattr(emulator, 'HANDLERS', _routes())
  port = free_port()
  address = f'http://127.0.0.1:{port}'
  server = emulator.create_server(
    '127.0.0.1', port, in_memory=True, default_bucket='bucket'
  )
  server.start()
  with monkeypatch.context() as patch:
    patch.setenv('STORAGE_EMULATOR_HOST', address)  # of gcsfs
    patch.setenv('TENSORSTORE_GCS_HTTP_URL', address)
    patch.setenv('GOOGLE_AUTH_TOKEN_FOR_TESTING', 'any')
    patch.setenv('GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT', 'false')
    yield 'gs://bucket/run'
  server.stop()


def _routes():
  """What the emulator (2026.7) lacks: generations of contents, and moves."""
  objects = emulator.objects

  def get(request, response, storage, *rest):
    where = request.params['bucket_name'], request.params['object_id']
    with contextlib.suppress(emulator.objects.NotFound):
      response['x-goog-generation'] = storage.get_file_obj(*where)['generation']
    objects.get(request, response, storage, *rest)

  def move(request, response, storage, *rest):
    where = request.params
    where['dest_bucket_name'] = where['bucket_name']
    objects.copy(request, response, storage, *rest)
    storage.delete_file(where['bucket_name'], where['object_id'])

  moves = (
    r'^/storage/v1/b/(?P<bucket_name>[-.\w]+)/o/(?P<object_id>.+)'
    r'/moveTo/o/(?P<dest_object_id>.+)$'
  )
  routes = [
    (path, {how: get if f is objects.get else f for how, f in calls.items()})
    for path, calls in emulator.HANDLERS
  ]
  return ((moves, {'POST': move}), *routes)


def start(folder, *words):
  return subprocess.Popen(
    [sys.executable, '-m', 'perceiver_ar.main', *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.STDOUT,
    text=True,
    cwd=folder,
    env=os.environ | {'JAX_PLATFORMS': 'cpu', 'JAX_NUM_CPU_DEVICES': '1'},
  )


def run(folder, *words, status=0):
  job = start(folder, *words)
  said, _ = job.communicate(timeout=200)
  assert job.returncode == status, said
  return said


def test_what_other_hosts_write_and_remove_is_seen(bucket):
  paths.check(bucket)
  folder, other = epath.Path(bucket), gcsfs.GCSFileSystem(skip_instance_cache=1)
  names = lambda: [path.name for path in folder.iterdir()]
  (folder / 'a').write_text('ours')
  assert names() == ['a']
  other.pipe('bucket/run/b', b'theirs')
  assert names() == ['a', 'b']
  other.rm('bucket/run/a')
  assert names() == ['b'] and not (folder / 'a').exists()


def without_times(value):
  times = ('seconds', 'data_wait', 'tokens_per_second')
  return {k: v for k, v in value.items() if k not in times}


@pytest.mark.slow
def test_a_bucket_is_as_a_disk(bucket, tmp_path):
  disk, folder = f'{tmp_path}/run', epath.Path(bucket)
  run(tmp_path, *_WORDS, f'--workdir={disk}')
  job = start(tmp_path, *_WORDS, f'--workdir={bucket}')
  wait_until((folder / 'checkpoints/10').exists, job)
  job.send_signal(signal.SIGTERM)
  said, _ = job.communicate(timeout=200)
  assert job.returncode == 75, said
  assert 'goes on from step' in run(tmp_path, *_WORDS, f'--workdir={bucket}')
  for workdir in (disk, bucket):
    run(tmp_path, 'evaluate', f'--workdir={workdir}')
    run(tmp_path, 'sample', f'--workdir={workdir}')
    assert 'sound' in run(
      tmp_path, 'checkpoint', 'verify', f'--workdir={workdir}'
    )
  said = run(tmp_path, 'checkpoint', 'diff', bucket, disk)
  differences = json.loads(said[said.index('{') :])
  assert differences == {'steps': [40, 40], 'config': [], 'arrays': []}
  for name in ('metrics.jsonl', 'evaluation.json', 'samples/samples.json'):
    texts = [(epath.Path(d) / name).read_text() for d in (disk, bucket)]
    lines = [t.splitlines() if 'jsonl' in name else [t] for t in texts]
    ours, theirs = ([without_times(json.loads(x)) for x in t] for t in lines)
    assert ours == theirs
  assert '1970-' not in run(
    tmp_path, 'checkpoint', 'list', f'--workdir={bucket}'
  )
  assert [path.name for path in (folder / 'tensorboard').iterdir()]
  ends = [r['reason'] for r in journal.read(bucket) if r['event'] == 'end']
  assert ends == ['SIGTERM', 'done']
  assert 'start 2: ' in run(tmp_path, 'report', bucket)
  assert 'SIGTERM' in (folder / 'report.html').read_text()
  output = 'gs://bucket/out/parameters.safetensors'
  run(
    tmp_path,
    'checkpoint',
    'export',
    f'--workdir={bucket}',
    f'--output={output}',
  )
  assert epath.Path(output).exists()
  assert [path.name for path in tmp_path.iterdir()] == ['run']
