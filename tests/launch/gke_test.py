"""Manifests that GKE takes: their schema, hosts, restarts, and refusals."""

import json
import pathlib
import shlex
import socket
import sys
from typing import Any

import jsonschema
import pytest
import yaml
from jax._src import hardware_utils
from jax._src.clusters import cloud_tpu_cluster

from perceiver_ar import places
from perceiver_ar.errors import MISTAKE, RESTART

_ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / 'launch'))

import gke  # noqa: E402

_SCHEMA = json.loads(
  (_ROOT / 'tests' / 'launch' / 'jobset_schema.json').read_text()
)
_FLAGS = {'topology': 'v5p:4x4x8', 'image': 'repo/it:1', 'bucket': 'gs://runs'}
_TRAIN = ['train', '--config=configs/books.py:long']


def _argv(command=_TRAIN, **flags):
  values = _FLAGS | flags
  return [f'--{key}={value}' for key, value in values.items()] + [
    '--dry_run',
    '--',
    *command,
  ]


def _rendered(capsys, command=_TRAIN, **flags) -> dict[str, Any]:
  """The manifest that a dry run prints, checked."""
  assert gke.main(_argv(command, **flags)) == 0
  manifest = yaml.safe_load(capsys.readouterr().out)
  jsonschema.validate(manifest, _SCHEMA)
  return manifest


def _job(manifest) -> dict[str, Any]:
  [job] = manifest['spec']['replicatedJobs']
  return job['template']['spec']


def _pod(manifest) -> dict[str, Any]:
  return _job(manifest)['template']['spec']


def _container(manifest) -> dict[str, Any]:
  [container] = _pod(manifest)['containers']
  return container


def _env(manifest, job_index) -> dict[str, str]:
  """What a pod of a slice sees; its annotations are JobSet's."""
  index = "metadata.annotations['jobset.sigs.k8s.io/job-index']"
  env = {}
  for variable in _container(manifest)['env']:
    if 'valueFrom' in variable:
      assert variable['valueFrom'] == {'fieldRef': {'fieldPath': index}}
      env[variable['name']] = str(job_index)
    else:
      env[variable['name']] = variable['value']
  return env


def _refusal(capsys, argv) -> str:
  try:
    status = gke.main(argv)
  except SystemExit as stop:
    status = stop.code
  captured = capsys.readouterr()
  assert status == 2
  assert not captured.out
  assert captured.err.startswith('gke.py: ')
  assert captured.err.count('\n') == 1
  return captured.err


# Hosts and chips of a host: XPK's vms_per_slice and chips_per_vm.
@pytest.mark.parametrize(
  ('topology', 'accelerator', 'hosts', 'chips'),
  [
    ('v4:2x2x1', 'tpu-v4-podslice', 1, 4),
    ('v4:4x4x4', 'tpu-v4-podslice', 16, 4),
    ('v5e:1x1', 'tpu-v5-lite-podslice', 1, 1),
    ('v5e:2x2', 'tpu-v5-lite-podslice', 1, 4),
    ('v5e:2x4', 'tpu-v5-lite-podslice', 2, 4),
    ('v5e:16x16', 'tpu-v5-lite-podslice', 64, 4),
    ('v5p:4x4x8', 'tpu-v5p-slice', 32, 4),
    ('v5p:16x20x28', 'tpu-v5p-slice', 2240, 4),
    ('v6e:1x1', 'tpu-v6e-slice', 1, 1),
    ('v6e:8x16', 'tpu-v6e-slice', 32, 4),
    ('7x:1x1x1', 'tpu7x', 1, 1),
    ('7x:2x2x1', 'tpu7x', 1, 4),
    ('7x:16x24x24', 'tpu7x', 2304, 4),
  ],
)
def test_a_topology_is_its_hosts(capsys, topology, accelerator, hosts, chips):
  manifest = _rendered(capsys, topology=topology)
  job = _job(manifest)
  assert job['parallelism'] == job['completions'] == hosts
  limits = _container(manifest)['resources']['limits']
  assert limits == {'google.com/tpu': chips}
  assert _pod(manifest)['nodeSelector'] == {
    'cloud.google.com/gke-tpu-accelerator': accelerator,
    'cloud.google.com/gke-tpu-topology': topology.split(':')[1],
  }


@pytest.mark.parametrize(
  ('topology', 'says'),
  [
    ('v3:4x4', 'v4, v5e, v5p, v6e, 7x'),
    ('v5p', '2x2x1, 2x2x2'),
    ('v5e:4x4x4', '8x16, 16x16'),
    ('v5p:8x4x4', 'ascending'),
    ('v5p:0x4x4', 'ascending'),
    ('v5p:4x4x6', 'ascending'),
    ('v4:16x16x20', 'up to 4,096 chips'),
    ('7x:3x3x3', '1x1x1, 2x2x1'),
    ('v6e:8x32', '16x16'),
  ],
)
def test_a_topology_that_is_not_offered_is_refused(capsys, topology, says):
  message = _refusal(capsys, _argv(topology=topology))
  assert f'--topology={topology}' in message
  assert says in message


def test_a_mistake_ends_the_run_and_all_else_restarts_it(capsys):
  manifest = _rendered(capsys, max_restarts=7)
  job, pod = _job(manifest), _pod(manifest)
  [rule] = job['podFailurePolicy']['rules']
  assert rule['action'] == 'FailJob'
  codes = rule['onExitCodes']
  assert codes['containerName'] == _container(manifest)['name']
  assert (codes['operator'], codes['values']) == ('In', [2])
  assert pod['restartPolicy'] == 'Never'  # else Kubernetes refuses the rule
  assert job['backoffLimit'] == 0
  policy = manifest['spec']['failurePolicy']
  assert policy['maxRestarts'] == 7
  # A job that fails for another reason meets no rule, which is a restart.
  [rule] = policy['rules']
  assert rule['action'] == 'FailJobSet'
  assert rule['onJobFailureReasons'] == ['PodFailurePolicy']
  assert pod['terminationGracePeriodSeconds'] >= 300


def test_a_slice_has_a_node_pool_of_its_own(capsys):
  annotations = _rendered(capsys)['metadata']['annotations']
  key = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
  assert annotations == {key: 'cloud.google.com/gke-nodepool'}


@pytest.mark.parametrize('num_slices', [1, 3])
def test_jax_finds_its_processes_without_being_told(
  capsys, monkeypatch, num_slices
):
  manifest = _rendered(capsys, topology='v5e:4x4', num_slices=num_slices)
  name, hosts = manifest['metadata']['name'], _job(manifest)['completions']
  domain = manifest['spec']['network']['subdomain']
  pods = {
    (s, h): f'{name}-slice-{s}-{h}.{domain}'
    for s in range(num_slices)
    for h in range(hosts)
  }
  known = {name: name for name in pods.values()}
  monkeypatch.setattr(socket, 'gethostbyname', known.__getitem__)
  # What the environment has not, JAX asks a server for; here it knows nothing.
  monkeypatch.setattr(cloud_tpu_cluster, 'get_metadata', lambda key: ('', 404))
  monkeypatch.setattr(cloud_tpu_cluster, 'running_in_cloud_tpu_vm', True)
  chips = 'num_available_tpu_chips_and_device_id'
  monkeypatch.setattr(hardware_utils, chips, lambda: (4, None))
  for name in ('TPU_SKIP_MDS_QUERY', 'SLURM_STEP_NODELIST'):
    monkeypatch.delenv(name, raising=False)
  found = set()
  for index, host in pods:
    for key, value in _env(manifest, index).items():
      monkeypatch.setenv(key, value)
    # GKE's own part.
    mates = ','.join(pods[index, h] for h in range(hosts))
    monkeypatch.setenv('TPU_WORKER_HOSTNAMES', mates)
    monkeypatch.setenv('TPU_WORKER_ID', str(host))
    monkeypatch.delenv('JAX_PLATFORMS')
    place = places.find_place(None, None, None, seconds=1)
    assert place.kind.startswith('GKE')
    assert place.num_processes == num_slices * hosts
    assert place.address == f'{pods[0, 0]}:8482'
    assert place.local_device_ids is None
    found.add(place.process_id)
  assert found == set(range(num_slices * hosts))


def test_a_single_host_is_told_that_it_is_alone(capsys):
  env = _env(_rendered(capsys, topology='v6e:2x2'), 0)
  assert env['TPU_WORKER_HOSTNAMES'] == 'localhost'
  assert env['TPU_WORKER_ID'] == '0'
  assert 'MEGASCALE_NUM_SLICES' not in env


def test_without_chips_it_does_not_train_on_the_cpu(capsys):
  assert _env(_rendered(capsys), 0)['JAX_PLATFORMS'] == 'tpu,cpu'


def test_kueue_queue_priority_and_namespace(capsys):
  manifest = _rendered(capsys, queue='lq', priority='high', namespace='ml')
  assert manifest['metadata']['labels'] == {'kueue.x-k8s.io/queue-name': 'lq'}
  assert manifest['metadata']['namespace'] == 'ml'
  assert _pod(manifest)['priorityClassName'] == 'high'
  # Kueue admits nothing that asks for what its queue has no quota of.
  assert set(_container(manifest)['resources']) == {'limits'}
  assert set(_container(manifest)['resources']['limits']) == {'google.com/tpu'}


def test_ramdisk_and_disk_are_mounted(capsys):
  manifest = _rendered(capsys, ramdisk=100, disk=50)
  assert _pod(manifest)['volumes'] == [
    {'name': 'ramdisk', 'emptyDir': {'medium': 'Memory', 'sizeLimit': '100Gi'}},
    {'name': 'scratch', 'emptyDir': {'sizeLimit': '50Gi'}},
  ]
  container = _container(manifest)
  mounts = {m['name']: m['mountPath'] for m in container['volumeMounts']}
  assert mounts == {'ramdisk': '/ramdisk', 'scratch': '/scratch'}


def test_data_and_logs_do_not_count_as_scratch(capsys):
  """The kubelet evicts pods of which all disks exceed their containers' limits.

  Those of the pod that have no limit of their own would count against it.
  """
  manifest = _rendered(capsys, data='gs://runs/pg19', disk=5)
  volumes = {v['name']: v['emptyDir'] for v in _pod(manifest)['volumes']}
  assert volumes == {'data': {}, 'scratch': {'sizeLimit': '5Gi'}}
  resources = _container(manifest)['resources']
  assert resources['requests'] == {'ephemeral-storage': '5Gi'}
  pod = _pod(manifest)
  for container in pod['containers'] + pod['initContainers']:
    limits = container.get('resources', {}).get('limits', {})
    assert 'ephemeral-storage' not in limits


def test_data_are_copied_before_the_trainer_starts(capsys):
  manifest = _rendered(capsys, data='gs://runs/pg19')
  [copy] = _pod(manifest)['initContainers']
  assert copy['command'][-2:] == ['gs://runs/pg19', '/data']
  container = _container(manifest)
  assert container['volumeMounts'] == copy['volumeMounts']
  assert container['command'][-1] == '--config.data.path=/data'
  assert _pod(manifest)['volumes'] == [{'name': 'data', 'emptyDir': {}}]


@pytest.mark.parametrize(
  ('command', 'flags', 'name', 'workdir'),
  [
    (_TRAIN, {}, 'books-long', 'gs://runs/books-long'),
    (_TRAIN, {'name': 'a1'}, 'a1', 'gs://runs/a1'),
    (_TRAIN, {'bucket': 'gs://runs/mine/'}, 'books-long', None),
    (['train'], {}, 'perceiver-ar', 'gs://runs/perceiver-ar'),
  ],
)
def test_a_run_has_a_name_and_a_folder(capsys, command, flags, name, workdir):
  manifest = _rendered(capsys, command, **flags)
  assert manifest['metadata']['name'] == name
  workdir = workdir or 'gs://runs/mine/books-long'
  expected = ['perceiver-ar', *command, f'--workdir={workdir}']
  assert _container(manifest)['command'] == expected


@pytest.mark.parametrize(
  ('words', 'flags', 'name', 'workdir'),
  [
    (['--config=c.py:a'], {}, 'c-a', 'gs://runs/c-a'),
    ([], {'name': 'a1'}, 'a1', 'gs://runs/a1'),
    (['--workdir=gs://other/My_run.2'], {}, 'my-run-2', None),
    (['--workdir', 'gs://other/x/'], {}, 'x', None),
    (['--workdir=gs://other/x'], {'name': 'a1'}, 'a1', None),
  ],
)
@pytest.mark.parametrize('verb', ['evaluate', 'sample'])
def test_a_trained_run_is_evaluated_and_sampled(
  capsys, verb, words, flags, name, workdir
):
  """In the run's folder, beside the JobSet that trained it."""
  manifest = _rendered(capsys, [verb, *words], data='gs://a/b', **flags)
  assert manifest['metadata']['name'] == f'{name}-{verb}'
  given = [f'--workdir={workdir}'] if workdir else []
  expected = [verb, *words, *given, '--config.data.path=/data']
  assert _container(manifest)['command'] == ['perceiver-ar', *expected]
  assert manifest['spec']['failurePolicy']['maxRestarts'] == 100


@pytest.mark.parametrize(
  'words', [['--workdir=gs://other/x'], ['--workdir', 'gs://other/x']]
)
def test_a_workdir_of_the_command_is_kept(capsys, words):
  command = _container(_rendered(capsys, [*_TRAIN, *words]))['command']
  assert command == ['perceiver-ar', *_TRAIN, *words]


@pytest.mark.parametrize(
  ('command', 'flags', 'says'),
  [
    (_TRAIN, {'num_slices': 0}, '--num_slices=0'),
    (_TRAIN, {'num_slices': 2, 'topology': 'v6e:2x2'}, 'larger topology'),
    (_TRAIN, {'max_restarts': -1}, '--max_restarts=-1'),
    (_TRAIN, {'ramdisk': -1}, '--ramdisk=-1'),
    (_TRAIN, {'disk': 'x'}, '--disk'),
    (_TRAIN, {'bucket': 'runs'}, '--bucket=runs'),
    (_TRAIN, {'data': 'pg19'}, '--data=pg19'),
    (
      [*_TRAIN, '--config.data.path=/x'],
      {'data': 'gs://runs/pg19'},
      '--config.data.path=/x',
    ),
    ([*_TRAIN, '--config.data.path=gs://a/b'], {}, '--data=gs://a/b'),
    ([*_TRAIN, '--config.data.path', 'gs://a/b'], {}, '--data=gs://a/b'),
    (_TRAIN, {'name': 'My_run'}, '--name=My_run'),
    (_TRAIN, {'name': 'a' * 50}, 'at most'),
    (_TRAIN, {'zone': 'x'}, '--zone'),
    ([], {}, '-- train'),
    (['--config=configs/books.py'], {}, '-- train'),
    (['plan', '--config=configs/books.py'], {}, 'evaluate or sample'),
    (['evaluate'], {}, 'evaluate needs a run'),
    (['sample', '--workdir=runs/a'], {}, '--workdir=runs/a'),
    ([*_TRAIN, '--workdir=runs/a'], {}, '--workdir=runs/a'),
    ([*_TRAIN, '--workdir', 'runs/a'], {}, '--workdir=runs/a'),
  ],
)
def test_a_mistake_is_one_sentence(capsys, command, flags, says):
  assert says in _refusal(capsys, _argv(command, **flags))


def test_names_of_pods_have_room(capsys):
  """The longest name that is taken makes pods of 63 characters."""
  flags = {'topology': 'v5e:4x8', 'num_slices': 12}
  longest = 63 - len('-slice-11-7-abcde')
  assert _rendered(capsys, name='a' * longest, **flags)
  _refusal(capsys, _argv(name='a' * (longest + 1), **flags))
  longest -= len('-sample')
  assert _rendered(capsys, ['sample'], name='a' * longest, **flags)
  _refusal(capsys, _argv(['sample'], name='a' * (longest + 1), **flags))


def test_xpk_is_told_the_same(capsys):
  gke.main(_argv(num_slices=2, priority='high', topology='v5e:4x4'))
  last = capsys.readouterr().out.splitlines()[-1]
  words = shlex.split(last.removeprefix('#'))
  assert words[:3] == ['xpk', 'workload', 'create']
  flags = dict(word.split('=', 1) for word in words[3:])
  assert flags['--workload'] == 'books-long'
  assert flags['--max-restarts'] == '100'
  assert flags['--termination-grace-period-seconds'] == '600'
  codes = flags['--restart-on-exit-codes'].split(',')
  ranges = [[int(x) for x in code.split('-')] for code in codes]
  restarts = {i for r in ranges for i in range(r[0], r[-1] + 1)}
  assert RESTART in restarts and not {0, MISTAKE} & restarts
  assert flags['--tpu-type'] == 'v5litepod-4x4'
  assert flags['--num-slices'] == '2'
  assert flags['--docker-image'] == 'repo/it:1'
  assert flags['--priority'] == 'high'
  assert flags['--env'] == 'JAX_PLATFORMS=tpu,cpu'
  assert flags['--command'] == (
    'perceiver-ar train --config=configs/books.py:long '
    '--workdir=gs://runs/books-long'
  )


@pytest.mark.parametrize('data', [None, 'gs://runs/pg19'])
def test_what_xpk_does_not_do_with_data_is_said(capsys, data):
  gke.main(_argv(**({'data': data} if data else {})))
  comments = capsys.readouterr().out.partition('# With XPK')[2]
  assert 'docs/launch.md' in comments
  assert ('--config.data.path=/data' in comments) == bool(data)
  assert ('XPK copies no data' in comments) == bool(data)


def test_the_schema_refuses(capsys):
  """Else the tests above would show nothing."""
  manifest = _rendered(capsys)
  manifest['spec']['replicatedJobs'][0]['template']['spec']['replicas'] = 2
  with pytest.raises(jsonschema.ValidationError, match='replicas'):
    jsonschema.validate(manifest, _SCHEMA)
