"""The text of a module says what runs, how often and how large it is."""

import pytest

from perceiver_ar.plan import hlo

_LOOP = """HloModule m, is_scheduled=true

%body.1 (arg.1: (s32[], f32[4,8])) -> (s32[], f32[4,8]) {
  %arg.1 = (s32[], /*index=1*/f32[4,8]{1,0}) parameter(0)
  %i.1 = s32[] get-tuple-element(%arg.1), index=0
  %one = s32[] constant(1)
  %next = s32[] add(%i.1, %one)
  %x.1 = f32[4,8]{1,0} get-tuple-element(%arg.1), index=1
  %y.1 = f32[4,8]{1,0} fusion(%x.1), kind=kLoop, calls=%fused.1
  ROOT %out.1 = (s32[], f32[4,8]{1,0}) tuple(%next, %y.1)
}

%fused.1 (p.1: f32[4,8]) -> f32[4,8] {
  %p.1 = f32[4,8]{1,0} parameter(0)
  ROOT %d.1 = f32[4,8]{1,0} dot(%p.1, %p.1), metadata={op_name="a/dot"}
}

%compare (c.1: s32[], c.2: s32[]) -> pred[] {
  %c.1 = s32[] parameter(0)
  %c.2 = s32[] parameter(1)
  ROOT %c.3 = pred[] compare(%c.1, %c.2), direction=LT
}

%condition.1 (arg.2: (s32[], f32[4,8])) -> pred[] {
  %arg.2 = (s32[], f32[4,8]{1,0}) parameter(0)
  %i.2 = s32[] get-tuple-element(%arg.2), index=0
  %limit = s32[] constant(LIMIT)
  ROOT %less = pred[] CONDITION
}

ENTRY %main.1 (p.2: f32[4,8]) -> f32[4,8] {
  %p.2 = f32[4,8]{1,0} parameter(0), metadata={op_name="state.params[\\'a\\']"}
  %first = s32[] constant(3)
  %start = (s32[], f32[4,8]{1,0}) tuple(%first, %p.2)
  %loop = (s32[], f32[4,8]{1,0}) while(%start), PARTS
  ROOT %end = f32[4,8]{1,0} get-tuple-element(%loop), index=1
}
"""


def module(
  limit='10', condition='compare(%i.2, %limit), direction=LT', known=''
):
  text = _LOOP.replace('LIMIT', limit).replace('CONDITION', condition)
  parts = f'condition=%condition.1, body=%body.1{known}'
  return hlo.Module(text.replace('PARTS', parts))


def runs(parsed, default):
  return {i.name: times for _, i, times in parsed.runs(default)}


@pytest.mark.parametrize(
  'condition',
  [
    'compare(%i.2, %limit), direction=LT',
    'compare(%limit, %i.2), direction=GT',
    'fusion(%i.2, %limit), kind=kLoop, calls=%compare',
  ],
)
def test_a_loop_runs_from_its_first_value_to_its_limit(condition):
  assert runs(module(condition=condition), 99)['y.1'] == 7


def test_what_xla_knows_of_a_loop_is_believed():
  known = ', backend_config={"known_trip_count":{"n":"5"},"x":"1"}'
  assert runs(module(known=known), 99)['y.1'] == 5


def test_a_loop_that_says_nothing_runs_as_often_as_is_assumed():
  assert runs(module(condition='compare(%x, %i.2)'), 99)['y.1'] == 99


def test_a_fusion_is_one_instruction_with_a_body():
  parsed = module()
  fusion = parsed.computations['body.1']['y.1']
  assert 'd.1' not in runs(parsed, 1)
  assert [i.opcode for i in parsed.within(fusion)] == [
    'fusion',
    'parameter',
    'dot',
  ]
  assert parsed.computations['fused.1']['d.1'].op_name == 'a/dot'


def test_arguments_are_named_as_in_the_step():
  entry = module().computations['main.1']
  assert entry['p.2'].op_name == "state.params['a']"


@pytest.mark.parametrize(
  ('shape', 'plain', 'padded'),
  [
    ('f32[]', 4, 4),
    ('pred[3,5]{1,0}', 15, 15),
    ('f32[3,259]{1,0:T(8,128)}', 4 * 3 * 259, 4 * 8 * 384),
    ('f32[3,259]{0,1:T(4,128)}', 4 * 3 * 259, 4 * 128 * 260),
    ('bf16[2,9,130]{2,1,0:T(8,128)(2,1)S(1)}', 4680, 2 * 2 * 16 * 256),
    ('f32[300]{0:T(256)}', 1200, 2048),
  ],
)
def test_sizes_with_and_without_the_padding_of_tiles(shape, plain, padded):
  (array,) = hlo.parse_arrays(shape)
  assert (array.num_bytes, array.padded_bytes) == (plain, padded)


def test_arrays_of_a_tuple_and_where_they_are_kept():
  one, two = hlo.parse_arrays(
    '(f32[8]{0:T(256)S(5)}, /*index=1*/token[], (s32[2,4]{1,0}))'
  )
  assert (one.space, two.dims) == (hlo.HOST, (2, 4))
