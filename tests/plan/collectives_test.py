"""Traffic is found in every form that the compiler writes it in."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

from perceiver_ar import chips
from perceiver_ar.config import MESH_AXES
from perceiver_ar.plan import collectives
from perceiver_ar.plan.hlo import Module

_CPU = chips.cpu(2**30)


def mesh(*sizes):
  devices = np.array(jax.devices()).reshape(sizes)
  types = (jax.sharding.AxisType.Auto,) * 4
  return Mesh(devices, MESH_AXES, axis_types=types)


def found(line, body='', sizes=(1, 4, 1, 2)):
  text = f"""HloModule m

{body}

ENTRY %main (p: bf16[16,64]) -> bf16[16,64] {{
  %p = bf16[16,64]{{1,0}} parameter(0)
  {line}
}}
"""
  return collectives.collect(Module(text), mesh(*sizes), _CPU, 1)


_SCOPE = 'metadata={op_name="jit(step)/jvp(PerceiverAR)/layers/mlp/x"}'
_BYTES = 16 * 64 * 2
_INNER = """%inner (q: bf16[16,64]) -> bf16[4,64] {
  %q = bf16[16,64]{1,0} parameter(0)
  %r = bf16[16,64]{1,0} all-reduce(%q), channel_id=9, GROUPS, to_apply=%add
  ROOT %s = bf16[4,64]{1,0} dynamic-slice(%r), dynamic_slice_sizes={4,64}
}""".replace(
  'GROUPS',
  'replica_groups={{0,2,4,6},{1,3,5,7}}, '
  'metadata={op_name="jit(step)/transpose(jvp(PerceiverAR))/cross/x"}',
)


@pytest.mark.parametrize(
  ('line', 'kind', 'axis', 'sent'),
  [
    (
      '%x = bf16[16,64] all-reduce(%p), '
      'replica_groups={{0,1},{2,3},{4,5},{6,7}}',
      'all-reduce',
      'model',
      _BYTES,
    ),
    (
      '%x = bf16[16,64] all-reduce-start(%p), '
      'replica_groups=[2,4]<=[4,2]T(1,0)',
      'all-reduce',
      'data',
      1.5 * _BYTES,
    ),
    (
      '%x = (bf16[16,64], bf16[128,64]) all-gather-start(%p), '
      'replica_groups=[1,8]<=[8]',
      'all-gather',
      'data+model',
      7 * _BYTES,
    ),
    (
      '%x = bf16[32,64] all-gather(%p), replica_groups=[4,2]<=[8]',
      'all-gather',
      'model',
      _BYTES,
    ),
    (
      '%x = bf16[2,64] reduce-scatter(%p), replica_groups={}',
      'reduce-scatter',
      'data+model',
      0.875 * _BYTES,
    ),
    (
      '%x = bf16[16,64] all-to-all(%p), replica_groups=[4,2]<=[8]',
      'all-to-all',
      'model',
      0.5 * _BYTES,
    ),
    (
      '%x = (bf16[16,64], bf16[16,64], u32[]) collective-permute-start(%p), '
      'source_target_pairs={{0,2},{2,4},{4,6},{6,0}}',
      'collective-permute',
      'data',
      _BYTES,
    ),
    (  # what stays where it is is named as well
      '%x = bf16[16,64] collective-permute(%p), '
      'source_target_pairs={{0,0},{1,4},{2,1},{3,5},{4,2},{5,6},{6,3},{7,7}}',
      'collective-permute',
      'data+model',
      _BYTES,
    ),
  ],
)
def test_every_form_is_read(line, kind, axis, sent):
  (row,) = found(f'{line}, channel_id=1, {_SCOPE}')
  assert (row.kind, row.axis, row.bytes) == (kind, axis, sent)
  assert (row.phase, row.count, row.network) == ('latent', 1, 'ici')


def test_a_fused_reduction_and_slice_is_a_reduce_scatter():
  inner = _INNER.replace('%inner', '%all-reduce-scatter.2')
  line = '%x = bf16[4,64] fusion(%p), calls=%all-reduce-scatter.2'
  (row,) = found(line, inner)
  assert (row.kind, row.axis, row.phase) == ('reduce-scatter', 'data', 'input')
  assert row.bytes == 0.75 * _BYTES


def test_the_parts_of_one_that_is_spread_over_fusions_count_once():
  lines = """%one = bf16[4,64] fusion(%p), calls=%inner
  %two = bf16[4,64] fusion(%p), calls=%inner"""
  (row,) = found(lines, _INNER)
  assert (row.kind, row.count) == ('all-reduce', 1)


@pytest.mark.parametrize(
  ('text', 'groups'),
  [
    ("mesh['a'=2,'b'=4] {'a'}", [[0, 4], [1, 5], [2, 6], [3, 7]]),
    ("mesh['a'=2,'b'=4] {'b'}", [[0, 1, 2, 3], [4, 5, 6, 7]]),
    (
      "mesh['a'=2,'b'=4], device_ids=([4,2]T(1,0)) {'b'}",
      [[0, 2, 4, 6], [1, 3, 5, 7]],
    ),
    ("mesh['a'=4], device_ids=(3,1,2,0) {'a'}", [[3, 1, 2, 0]]),
    ("mesh['a'=8] {'a':(2)2}", [[0, 2], [1, 3], [4, 6], [5, 7]]),
    ("mesh['a'=8] {'a':(1)2,'a':(4)2}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ("mesh['a'=2,'b'=2,'c'=2] {'a','c'}", [[0, 1, 4, 5], [2, 3, 6, 7]]),
    ('[2,4]<=[4,2]T(1,0)', [[0, 2, 4, 6], [1, 3, 5, 7]]),
    ('{{0,1},{2,3}}', [[0, 1], [2, 3]]),
    ('{}', [[0, 1, 2, 3, 4, 5, 6, 7]]),
  ],
)
def test_groups_of_every_form(text, groups):
  attributes = f', replica_groups={text}, dimensions={{0}}'
  assert collectives.parse_groups(attributes, 8) == groups


def test_groups_of_one_device_send_nothing():
  line = '%x = bf16[16,64] all-reduce(%p), replica_groups=[8,1]<=[8]'
  assert not found(line)


def test_a_permutation_is_as_slow_as_its_slowest_hop():
  pairs = '{{0,1},{1,2},{2,3},{3,4},{4,5},{5,6},{6,7},{7,0}}'
  line = '%x = bf16[16,64] collective-permute(%p), source_target_pairs='
  (row,) = found(f'{line}{pairs}, {_SCOPE}', sizes=(2, 4, 1, 1))
  assert (row.axis, row.network) == ('slice+data', 'dcn')
  assert row.seconds == row.bytes / _CPU.dcn_bandwidth
  assert not found(f'{line}{{{{0,0}},{{1,1}}}}, {_SCOPE}')


def test_what_crosses_slices_does_so_with_a_share_only():
  line = f'%x = bf16[16,64] all-reduce(%p), replica_groups=[1,8]<=[8], {_SCOPE}'
  rows = found(line, sizes=(2, 4, 1, 1))
  sent = {(row.network, row.axis): row.bytes for row in rows}
  assert sent == {
    ('ici', 'data'): 2 * _BYTES * 3 / 4,
    ('dcn', 'slice'): 2 * (_BYTES / 4) / 2,
  }


def test_slices_that_exchange_by_their_hosts():
  text = """ENTRY %main (p: bf16[16,64]) -> bf16[16,64] {
  %p = bf16[16,64]{1,0} parameter(0)
  %near = bf16[16,64] add(%p, %p), metadata={op_name="jit(step)/cross/add"}
  %to = (bf16[16,64], u32[], token[]) send(%near, %t), is_host_transfer=true, X
}"""
  kind = 'frontend_attributes={_xla_megascale_transfer_type="ALL_REDUCE"}'
  module = Module(text.replace('X', kind))
  (row,) = collectives.collect(module, mesh(2, 4, 1, 1), _CPU, 1)
  assert (row.kind, row.axis, row.network) == ('all-reduce', 'slice', 'dcn')
  assert (row.bytes, row.phase) == (_BYTES, 'input')


def test_known_traffic_of_a_real_module():
  """5 sums of 128 floats over `data`, and 3 gathers of 64 over `model`."""
  devices = mesh(1, 4, 1, 2)

  @functools.partial(
    jax.shard_map,
    mesh=devices,
    in_specs=(P('data'), P('model')),
    out_specs=(P('data'), P()),
    check_vma=False,
  )
  def step(x, y):
    def total(x, _):
      return jnp.cos(jax.lax.psum(x, 'data')), None

    def gathered(z, _):
      part = jax.lax.dynamic_slice_in_dim(jnp.cos(z), 0, 64)
      return jax.lax.all_gather(part, 'model', tiled=True), None

    z = jnp.concatenate([y, y])
    return (
      jax.lax.scan(total, x, length=5)[0],
      jax.lax.scan(gathered, z, length=3)[0],
    )

  arguments = jnp.ones((4 * 128,)), jnp.ones((2 * 64,))
  text = jax.jit(step).lower(*arguments).compile().as_text()
  assert text
  rows = collectives.collect(Module(text), devices, _CPU, 1)
  assert {(r.kind, r.axis, r.count, r.bytes) for r in rows} == {
    ('all-reduce', 'data', 5, 5 * 2 * 128 * 4 * 3 / 4),
    ('all-gather', 'model', 3, 3 * 64 * 4),
  }


class _Device:
  def __init__(self, *coords):
    self.coords = coords


def _grid(*shape):
  return [_Device(*place) for place in np.ndindex(*shape)]


@pytest.mark.parametrize(
  ('name', 'shape', 'along', 'links'),
  [
    ('v5p', (4, 4, 8), 'x', 2),
    ('v5p', (4, 4, 8), 'xy', 4),
    ('v4', (4, 4, 4), 'xyz', 6),
    # Of a slice that is not made of cubes no dimension closes.
    ('v5p', (4, 4, 2), 'x', 1),
    ('v5p', (4, 4, 2), 'xy', 2),
    ('v5p', (4, 4, 2), 'z', 1),
    ('v4', (2, 2, 4), 'z', 1),
    ('7x', (2, 4, 4), 'yz', 2),
    ('7x', (4, 4, 4), 'yz', 4),
    # A dimension of 16 closes by itself.
    ('v5e', (8, 16, 1), 'x', 1),
    ('v5e', (8, 16, 1), 'y', 2),
    ('v6e', (8, 16, 1), 'xy', 3),
    ('v6e', (16, 16, 1), 'xy', 4),
    ('v5e', (4, 4, 1), 'xy', 2),
  ],
)
def test_a_ring_is_as_fast_as_the_torus_that_it_goes_over(
  name, shape, along, links
):
  chip, grid = chips.find_chip(name), _grid(*shape)
  still = [dim for dim, axis in enumerate('xyz') if axis not in along]
  group = [d for d in grid if not any(d.coords[dim] for dim in still)]
  rate = collectives.ici_rate(group, grid, chip)
  assert rate == links * chip.link_bandwidth


def test_half_of_a_dimension_is_a_line():
  chip, grid = chips.find_chip('v5p'), _grid(4, 4, 4)
  half = [d for d in grid if d.coords[0] < 2 and d.coords[1:] == (0, 0)]
  assert collectives.ici_rate(half, grid, chip) == chip.link_bandwidth


def test_two_devices_of_a_chip_are_nearer_than_two_chips():
  chip, grid = chips.find_chip('7x'), _grid(2, 2, 1)
  pair = [_Device(0, 0, 0), _Device(0, 0, 0)]
  assert collectives.ici_rate(pair, grid, chip) == 600e9
  assert collectives.ici_rate(grid[:2], grid, chip) == 50e9
