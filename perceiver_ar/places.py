"""Where a process was started: which one it is, of how many, and who is first.

By flags, by what TPU VMs, GKE and SLURM say, or alone.
"""

import dataclasses
import os
import re
from collections.abc import Mapping, Sequence

# What JAX knows of clusters has no public name.
from jax._src import hardware_utils
from jax._src.clusters.cluster import ClusterEnv

from perceiver_ar.errors import HostsError, UserError


@dataclasses.dataclass(frozen=True)
class Place:
  """One process of a job.

  Attributes:
    kind: where it was started, for people: 'alone', 'flags', 'SLURM', ...
    address: host:port of process 0.
    num_processes: of the job.
    process_id: of this one.
    local_device_ids: which of the machine's devices are its own; None: all.
  """

  kind: str = 'alone'
  address: str = ''
  num_processes: int = 1
  process_id: int = 0
  local_device_ids: Sequence[int] | None = None


def find_place(
  address: str | None,
  num_processes: int | None,
  process_id: int | None,
  *,
  seconds: float,
) -> Place:
  """Where this process is: by flags, by its surroundings, or alone.

  Args:
    address: host:port of process 0; all three flags or none.
    num_processes: of the job.
    process_id: of this one, from 0.
    seconds: to wait for the name of process 0 to be known.

  Raises:
    UserError: not all flags are given, or they make no place.
    HostsError: others are there, and nothing tells which one this is.
  """
  flags = (address, num_processes, process_id)
  if any(flag is not None for flag in flags):
    return _place_of_flags(address, num_processes, process_id)
  num_chips = hardware_utils.num_available_tpu_chips_and_device_id()[0]
  found = _surroundings(os.environ, num_chips)
  if found is None:
    return Place()
  kind, method = found
  try:
    place = ClusterEnv.auto_detect_unset_distributed_params(
      None, None, None, None, method, max(int(seconds), 1)
    )
  except Exception as error:  # whatever a metadata server does
    raise HostsError(
      f'this is {kind}, and its place in the job cannot be told ({error}); '
      'give it by --coordinator, --num_processes and --process_id'
    ) from error
  address, num_processes, process_id, devices = place
  # Alone it would train beside the others, in the same folder.
  assert address is not None, f'JAX has no {method}'
  assert num_processes is not None and process_id is not None
  # JAX gives each task of SLURM one device, but a node's only task has all.
  if num_processes == int(os.environ.get('SLURM_STEP_NUM_NODES', 0)):
    devices = None
  return Place(kind, address, num_processes, process_id, devices)


def _place_of_flags(
  address: str | None, num_processes: int | None, process_id: int | None
) -> Place:
  if address is None or num_processes is None or process_id is None:
    raise UserError(
      'a place in a job takes all of --coordinator=HOST:PORT, '
      '--num_processes and --process_id; give all three, or none'
    )
  host, _, port = address.rpartition(':')
  if not host or not re.fullmatch('[0-9]{1,5}', port) or int(port) >= 2**16:
    raise UserError(
      f'--coordinator={address} must be HOST:PORT, such as 10.0.0.1:8476'
    )
  if not 0 <= process_id < num_processes:
    raise UserError(
      f'--process_id={process_id} must be from 0 to {num_processes - 1}, for '
      f'--num_processes={num_processes}'
    )
  return Place('flags', address, num_processes, process_id)


def _surroundings(
  environ: Mapping[str, str], num_chips: int
) -> tuple[str, str] | None:
  """What started this process, for people, and JAX's name for it."""
  if 'SLURM_STEP_NODELIST' in environ and 'SLURM_PROCID' in environ:
    return 'SLURM', 'slurm'
  # An address of a slice means TPU chips; those of a machine alone do not.
  if not num_chips or environ.get('JAX_PLATFORMS', 'tpu') == 'cpu':
    return None
  slices = int(environ.get('MEGASCALE_NUM_SLICES', '1'))
  several = f', {slices} slices' if slices > 1 else ''
  if 'TPU_WORKER_HOSTNAMES' in environ or 'TPU_PROCESS_ADDRESSES' in environ:
    return f'GKE{several}', 'gketpu'
  if 'TPU_SKIP_MDS_QUERY' in environ:
    return None
  return f'TPU VM{several}', 'gcetpu'


def describe(place: Place) -> str:
  """For the log of this process."""
  if place.num_processes == 1:
    return f'{place.kind}: 1 process'
  return (
    f'{place.kind}: process {place.process_id} of {place.num_processes}, '
    f'process 0 at {place.address}'
  )
