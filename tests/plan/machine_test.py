"""Every machine that cannot be described is refused in one sentence."""

import jax
import pytest

from perceiver_ar.errors import UserError
from perceiver_ar.plan import machine


@pytest.fixture(scope='module', autouse=True)
def devices():
  """In use, so that no test changes how many there are."""
  return jax.devices()


@pytest.mark.parametrize(
  ('topology', 'num_slices', 'named'),
  [
    ('v5p', 1, 'v5p:4x4x8'),
    ('v5p:', 1, 'v5p:4x4x8'),
    ('v9:4x4', 1, 'v4, v5e, v5p, v6e, 7x'),
    ('v5p:4x4', 1, '3 dimensions'),
    ('v5e:4x4x4', 1, '2 dimensions'),
    ('v5e:0x4', 1, 'no devices'),
    ('cpu:2x2', 1, 'cpu:8'),
    ('cpu:8', 2, 'mesh.slice'),
    ('cpu:99', 1, '8 devices'),
    ('cpu:8', 0, '--num_slices=0'),
  ],
)
def test_a_mistake_is_one_sentence(topology, num_slices, named):
  with pytest.raises(UserError) as raised:
    machine.open_machine(topology, num_slices)
  assert named in str(raised.value)
  assert '\n' not in str(raised.value)


def test_a_missing_compiler_is_named_with_its_extra(monkeypatch):
  monkeypatch.setattr(machine.importlib.util, 'find_spec', lambda name: None)
  with pytest.raises(UserError, match=r'perceiver-ar\[tpu\]'):
    machine.open_machine('v5p:2x2x1', 1)


def test_simulated_devices_share_the_memory_of_this_machine():
  opened = machine.open_machine('cpu:4', 1)
  assert len(opened.devices) == 4
  assert opened.name == '4 x CPU'
  assert 4 * opened.chip.hbm_bytes <= machine._memory()


@pytest.mark.slow
def test_a_shape_that_is_not_offered_is_refused():
  pytest.importorskip('libtpu')
  with pytest.raises(UserError, match='v5p:3x5x7'):
    machine.open_machine('v5p:3x5x7', 1)
