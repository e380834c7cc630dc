"""One run on GKE as a JobSet, and as a command of XPK.

Sources: kubernetes-sigs/jobset, api/jobset/v1alpha2/jobset_types.go (fields,
annotations, names of pods); AI-Hypercomputer/xpk, src/xpk/commands/workload.py
(shape of a TPU JobSet, flags of its own command); jax/_src/clusters/
cloud_tpu_cluster.py (what `jax.distributed.initialize()` reads).
"""

import dataclasses
import shlex
from typing import Any

from tpus import Slice

_JOB = 'slice'  # the only replicated job: one of its jobs per slice
_CONTAINER = 'trainer'
_MISTAKE = 2  # exit status of the trainer
DATA = '/data'  # where the data set is, in the container
# Between SIGTERM and SIGKILL: a step, a checkpoint, and its upload. Nodes that
# are taken away (Spot) give less, whatever is asked for here.
_GRACE_SECONDS = 600


@dataclasses.dataclass(frozen=True, kw_only=True)
class Job:
  """What to run, and where.

  Attributes:
    name: of the JobSet.
    command: of every host.
    data: gs:// folder to be copied to `DATA`, or None.
    ramdisk, disk: GiB for the container's /ramdisk and /scratch, or 0.
  """

  name: str
  namespace: str | None
  image: str
  command: tuple[str, ...]
  data: str | None
  slice: Slice
  num_slices: int
  queue: str | None
  priority: str | None
  max_restarts: int
  ramdisk: int
  disk: int


def max_name_length(tpu: Slice, num_slices: int) -> int:
  """Of a job. Its pods are NAME-slice-SLICE-HOST-abcde, all of it a label."""
  return 63 - len(f'-{_JOB}-{num_slices - 1}-{tpu.num_hosts - 1}-abcde')


def jobset(job: Job) -> dict[str, Any]:
  """The manifest."""
  metadata: dict[str, Any] = {'name': job.name}
  if job.namespace:
    metadata['namespace'] = job.namespace
  if job.queue:
    metadata['labels'] = {'kueue.x-k8s.io/queue-name': job.queue}
  # A slice is a node pool; no two jobs may share one, nor one job have two.
  exclusive = 'alpha.jobset.sigs.k8s.io/exclusive-topology'
  metadata['annotations'] = {exclusive: 'cloud.google.com/gke-nodepool'}
  return {
    'apiVersion': 'jobset.x-k8s.io/v1alpha2',
    'kind': 'JobSet',
    'metadata': metadata,
    'spec': {
      # Names for all pods, before they are ready: they start by meeting.
      'network': {
        'enableDNSHostnames': True,
        'subdomain': job.name,
        'publishNotReadyAddresses': True,
      },
      'successPolicy': {'operator': 'All', 'targetReplicatedJobs': [_JOB]},
      # What no rule names restarts all slices: none can go on without the rest.
      'failurePolicy': {
        'maxRestarts': job.max_restarts,
        'rules': [
          {
            'name': 'mistake',
            'action': 'FailJobSet',
            'onJobFailureReasons': ['PodFailurePolicy'],
            'targetReplicatedJobs': [_JOB],
          }
        ],
      },
      'replicatedJobs': [
        {
          'name': _JOB,
          'replicas': job.num_slices,
          'template': {'spec': _job_spec(job)},
        }
      ],
    },
  }


def _job_spec(job: Job) -> dict[str, Any]:
  """A slice: as many pods as it has hosts, all or none."""
  codes = {
    'containerName': _CONTAINER,
    'operator': 'In',
    'values': [_MISTAKE],
  }
  return {
    'parallelism': job.slice.num_hosts,
    'completions': job.slice.num_hosts,
    'completionMode': 'Indexed',
    'backoffLimit': 0,  # a pod alone cannot rejoin: the JobSet restarts it
    'podFailurePolicy': {
      'rules': [{'action': 'FailJob', 'onExitCodes': codes}]
    },
    'template': {'spec': _pod_spec(job)},
  }


def _pod_spec(job: Job) -> dict[str, Any]:
  spec: dict[str, Any] = {
    'restartPolicy': 'Never',  # podFailurePolicy demands it
    'terminationGracePeriodSeconds': _GRACE_SECONDS,
    'nodeSelector': {
      'cloud.google.com/gke-tpu-accelerator': job.slice.generation.accelerator,
      'cloud.google.com/gke-tpu-topology': job.slice.topology,
    },
    # Slices talk over the hosts' own network cards, as XPK has it.
    'hostNetwork': True,
    'dnsPolicy': 'ClusterFirstWithHostNet',
  }
  if job.priority:
    spec['priorityClassName'] = job.priority
  container = _container(job)
  volumes = _volumes(job)
  if volumes:
    spec['volumes'] = [volume for volume, _ in volumes]
    container['volumeMounts'] = [mount for _, mount in volumes]
  if job.data:
    spec['initContainers'] = [_copy(job.data)]
  return spec | {'containers': [container]}


def _copy(data: str) -> dict[str, Any]:
  # Records are read at random all the time: from a disk, not over the network.
  return {
    'name': 'copy',
    'image': 'gcr.io/google.com/cloudsdktool/google-cloud-cli:slim',
    'command': ['gcloud', 'storage', 'rsync', '--recursive', data, DATA],
    'volumeMounts': [{'name': 'data', 'mountPath': DATA}],
  }


def _container(job: Job) -> dict[str, Any]:
  # Neither CPUs nor memory are asked for: hosts are not shared, and Kueue
  # admits no job that asks for what its queue has no quota of.
  resources: dict[str, Any] = {
    'limits': {'google.com/tpu': job.slice.chips_per_host}
  }
  if job.disk:
    # /scratch has a limit of its own. A container's would be that of its whole
    # pod, which the kubelet evicts when /data, /scratch and logs exceed it.
    resources['requests'] = {'ephemeral-storage': f'{job.disk}Gi'}
  return {
    'name': _CONTAINER,
    'image': job.image,
    'command': list(job.command),
    # Device files of TPUs belong to root; the image's own user is another.
    'securityContext': {'runAsUser': 0},
    'env': _env(job),
    'ports': [
      {'containerPort': 8471},  # hosts of a slice
      {'containerPort': 8080},  # slices
      {'containerPort': 8482},  # JAX's coordinator
    ],
    'resources': resources,
  }


def _env(job: Job) -> list[dict[str, Any]]:
  """What JAX and libtpu do not find out by themselves.

  GKE sets TPU_WORKER_ID and TPU_WORKER_HOSTNAMES in pods of an indexed job
  that ask for TPUs and are more than one.
  """
  env: dict[str, Any] = {
    'JAX_PLATFORMS': 'tpu,cpu'  # else, without chips, it trains on the CPU
  }
  if job.slice.num_hosts == 1:
    env |= {'TPU_WORKER_ID': '0', 'TPU_WORKER_HOSTNAMES': 'localhost'}
  variables = [{'name': key, 'value': value} for key, value in env.items()]
  if job.num_slices == 1:
    return variables
  index = "metadata.annotations['jobset.sigs.k8s.io/job-index']"
  return [
    *variables,
    {
      'name': 'MEGASCALE_COORDINATOR_ADDRESS',
      'value': f'{job.name}-{_JOB}-0-0.{job.name}',
    },
    {'name': 'MEGASCALE_NUM_SLICES', 'value': str(job.num_slices)},
    {
      'name': 'MEGASCALE_SLICE_ID',
      'valueFrom': {'fieldRef': {'fieldPath': index}},
    },
  ]


def _volumes(job: Job) -> list[tuple[dict[str, Any], dict[str, Any]]]:
  """Volumes, each with its mount."""
  volumes: list[tuple[str, dict[str, str]]] = []
  if job.data:
    volumes.append(('data', {}))
  if job.ramdisk:
    source = {'medium': 'Memory', 'sizeLimit': f'{job.ramdisk}Gi'}
    volumes.append(('ramdisk', source))
  if job.disk:
    volumes.append(('scratch', {'sizeLimit': f'{job.disk}Gi'}))
  return [
    (
      {'name': name, 'emptyDir': source},
      {'name': name, 'mountPath': f'/{name}'},
    )
    for name, source in volumes
  ]


def xpk_command(job: Job) -> str:
  """The job by XPK, without what docs/launch.md says that XPK leaves out."""
  words = [
    *('xpk', 'workload', 'create', '--cluster=CLUSTER'),
    f'--workload={job.name}',
    f'--tpu-type={job.slice.generation.xpk}-{job.slice.topology}',
    f'--num-slices={job.num_slices}',
    f'--docker-image={job.image}',
    f'--max-restarts={job.max_restarts}',
    '--restart-on-exit-codes=1,3-126',  # it restarts after 127 to 255 anyway
    f'--termination-grace-period-seconds={_GRACE_SECONDS}',
    '--env=JAX_PLATFORMS=tpu,cpu',
    f'--command={shlex.join(job.command)}',
  ]
  if job.priority:
    words.append(f'--priority={job.priority}')
  return shlex.join(words)
