"""Seconds are of all that moves, whether or not the compiler says cycles."""

import pytest

from perceiver_ar import chips
from perceiver_ar.plan import timing
from perceiver_ar.plan.counting import Work
from perceiver_ar.plan.hlo import Module

_TEXT = """HloModule step

ENTRY %main (p: f32[16,128], i: s32[8]) -> f32[8,128] {
  %p = f32[16,128]{1,0} parameter(0)
  %i = s32[8]{0} parameter(1)
  %g = f32[8,128]{1,0} gather(%p, %i), offset_dims={1}
  ROOT %c = f32[8,128]{0,1} copy(%g), backend_config={"estimated_cycles":"700"}
}
"""


_SCATTERED = """HloModule step

%add (a: f32[], b: f32[]) -> f32[] {
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}

%body (t: f32[8,128], k: s32[64,1], u: f32[64,128]) -> f32[8,128] {
  %t = f32[8,128]{1,0} parameter(0)
  %k = s32[64,1]{1,0} parameter(1)
  %u = f32[64,128]{1,0} parameter(2)
  ROOT %s = f32[8,128]{1,0} scatter(%t, %k, %u), to_apply=%add
}

ENTRY %main (p: f32[8,128], i: s32[64,1], x: f32[64,128]) -> f32[8,128] {
  %p = f32[8,128]{1,0} parameter(0)
  %i = s32[64,1]{1,0} parameter(1)
  %x = f32[64,128]{1,0} parameter(2)
  ROOT %f = f32[8,128]{1,0} fusion(%p, %i, %x), kind=kCustom, calls=%body
}
"""


_OFFLOADED = """HloModule step

ENTRY %main (h: f32[4,8,128], x: f32[8,128]) -> f32[4,8,128] {
  %h = f32[4,8,128]{2,1,0:S(5)} parameter(0)
  %x = f32[8,128]{1,0} parameter(1)
  %z = s32[] constant(0)
  %a = (f32[8,128]{1,0:S(1)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %b = (f32[8,128]{1,0:S(5)}, f32[8,128]{1,0}, u32[]{:S(2)}) copy-start(%x)
  %d = f32[8,128]{1,0:S(5)} copy-done(%b)
  %u = ((f32[4,8,128]{2,1,0:S(5)}, f32[8,128]{1,0}, s32[]), f32[4,8,128]{2,1,0:S(5)}, u32[]{:S(2)}) dynamic-update-slice-start(%h, %x, %z)
  ROOT %v = f32[4,8,128]{2,1,0:S(5)} dynamic-update-slice-done(%u)
}
"""  # noqa: E501


def test_what_goes_to_the_host_takes_the_time_of_its_bytes():
  chip = chips.find_chip('v5p')
  work = Work(0.0, 0.0, 0.0, moved=0.0)
  seconds = timing.estimate(
    Module(_OFFLOADED), chip, work, 2, 'bfloat16', [], 1
  )
  # A copy and a slice; what goes to a core's own memory is there in time.
  want = 2 * 4 * 8 * 128 / chips.HOST_BANDWIDTH
  assert seconds['host_transfers'] == pytest.approx(want)
  assert seconds['total'] == pytest.approx(want)


def test_what_has_no_cycles_is_counted_by_its_bytes():
  chip = chips.find_chip('v5p')
  work = Work(0.0, 0.0, 0.0, moved=2 * 999.0)
  seconds = timing.estimate(Module(_TEXT), chip, work, 2, 'bfloat16', [], 1)
  # What is found, as much again of the table and no more, and the ids.
  gathered = 4 * 8 * 128 + 2 * 4 * 8 * 128 + 4 * 8
  want = 700 / chip.clock_hz + (gathered + 999) / chip.hbm_bandwidth
  assert seconds['data_movement'] == pytest.approx(want)
  assert seconds['total'] == pytest.approx(want)


def test_what_is_scattered_is_read_whole():
  chip = chips.find_chip('v5p')
  work = Work(0.0, 0.0, 0.0)
  seconds = timing.estimate(
    Module(_SCATTERED), chip, work, 2, 'bfloat16', [], 1
  )
  moved = 4 * (2 * 8 * 128 + 64 * 128 + 64)
  want = moved / chip.hbm_bandwidth
  assert seconds['data_movement'] == pytest.approx(want)
