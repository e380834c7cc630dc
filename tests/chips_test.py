"""The figures of chips agree with each other."""

import pytest

from perceiver_ar import chips


@pytest.mark.parametrize('name', ['v4', 'v5e', 'v5p', 'v6e', '7x'])
def test_figures_are_of_one_device_and_plausible(name):
  chip = chips.find_chip(name)
  assert 0.9 * chip.hbm_bytes < chip.usable_bytes < 1.01 * chip.hbm_bytes
  # A whole number of 128 x 128 units runs at the clock.
  units = chip.peak_flops['bfloat16'] / (2 * 128**2 * chip.clock_hz)
  assert units == pytest.approx(round(units), rel=0.01)
  assert chip.link_bandwidth < chip.hbm_bandwidth
  assert chip.dcn_bandwidth < chip.link_bandwidth
  assert chip.num_dims == (2 if name in ('v5e', 'v6e') else 3)


@pytest.mark.parametrize(
  ('name', 'stated'),
  [('v5e', 400e9), ('v5p', 1200e9), ('v6e', 800e9), ('7x', 1200e9)],
)
def test_devices_share_what_the_ports_of_a_chip_carry_both_ways(name, stated):
  chip = chips.find_chip(name)
  total = 2 * chip.num_links * chip.devices * chip.link_bandwidth
  assert total == pytest.approx(stated)


def test_chips_are_found_by_the_compiler_s_names_too():
  assert chips.find_chip('tpu7x') is chips.find_chip('7x')
