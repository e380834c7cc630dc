"""Every mistake in the sharding is one sentence that names the thing."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from jax.sharding import PartitionSpec
from tiny import make_config

from perceiver_ar import logical, mesh_checks, partitioning, train_step
from perceiver_ar.config import MESH_AXES, MeshConfig
from perceiver_ar.errors import UserError
from perceiver_ar.optimizer import make_optimizer


def _mesh(slices=1, data=-1, context=1, model=1, num_devices=8):
  config = MeshConfig(
    slice=slices, data=data, context=context, model=model, rules='fsdp_tensor'
  )
  return partitioning.make_mesh(config, jax.devices()[:num_devices])


def _sharding(shape, axes, mesh=None, rules='fsdp_tensor', more_rules=None):
  value = jax.ShapeDtypeStruct(shape, jnp.float32)
  boxed = {'block': {'kernel': nn.LogicallyPartitioned(value, axes)}}
  rules = {**partitioning.parameter_rules(rules), **(more_rules or {})}
  mesh = mesh or _mesh(data=4, model=2)
  shardings = partitioning.parameter_shardings(boxed, mesh, rules)
  return shardings['block']['kernel'].spec


def _is_one_sentence(error, *names):
  text = str(error.value)
  assert '\n' not in text and not text.endswith('.')
  for name in names:
    assert name in text, (name, text)


def test_one_size_of_the_mesh_may_be_left_open():
  mesh = _mesh(slices=2, data=-1, model=2)
  assert mesh.axis_names == MESH_AXES
  assert tuple(mesh.shape.values()) == (2, 2, 1, 2)
  assert _mesh(num_devices=1).size == 1


@pytest.mark.parametrize(
  ('sizes', 'names'),
  [
    ({'data': 3}, ('slice 1 x data 3', '8 devices', 'multiply to 8')),
    ({'data': -1, 'model': 3}, ('model 3', '8 devices')),
    ({'data': 4}, ('data 4', '8 devices')),
    ({'data': 16}, ('data 16', '8 devices')),
    ({'data': -1, 'model': -1}, ('data -1', 'model -1', 'at most one')),
    ({'data': 0}, ('data 0', 'positive')),
    ({'data': -2}, ('data -2', 'positive')),
  ],
)
def test_a_mesh_that_does_not_fit_is_refused(sizes, names):
  with pytest.raises(UserError) as error:
    _mesh(**sizes)
  _is_one_sentence(error, *names)


@pytest.mark.parametrize(
  ('rules', 'spec'),
  [
    ('replicated', (None, None, None)),
    ('fsdp', ('data', None, None)),
    ('tensor', (None, 'model', None)),
    ('fsdp_tensor', ('data', 'model', None)),
    ('context', (('data', 'context'), 'model', None)),
  ],
)
def test_rules_send_logical_axes_to_mesh_axes(rules, spec):
  got = _sharding((8, 6, 5), ('embed', 'heads', 'kv'), rules=rules)
  assert got == PartitionSpec(*spec)


def test_rules_that_do_not_exist_are_refused():
  with pytest.raises(UserError) as error:
    partitioning.parameter_rules('zero')
  _is_one_sentence(error, 'mesh.rules', "'zero'", 'fsdp_tensor')


@pytest.mark.parametrize(
  ('shape', 'axes', 'more_rules', 'names'),
  [
    ((8, 8), ('embed', 'colour'), {}, ("'colour'", 'no rule')),
    ((8, 8), ('embed', 'embed'), {}, ("'data'", 'twice')),
    ((8, 8), ('heads', 'mlp'), {}, ("'model'", 'twice')),
    ((8, 8, 8), ('embed', 'heads'), {}, ('(8, 8, 8)', '2 logical axes')),
    ((8,), ('embed', 'heads'), {}, ('(8,)', '2 logical axes')),
    ((6, 8), ('embed', 'heads'), {}, ("'embed'", 'size 6', 'size 4')),
    ((8, 3), ('embed', 'heads'), {}, ("'heads'", 'size 3', 'size 2')),
    ((8,), ('embed',), {'embed': 'pipe'}, ("'embed'", "'pipe'")),
    (
      *((2**12, 2**12), ('vocab', 'kv'), {}),
      ('16,777,216', 'left whole', 'mesh.rules=fsdp_tensor_vocab'),
    ),
    (
      *((2**12 + 1, 2**12), ('vocab', 'kv'), {}),
      (
        'left whole on every device; use a mesh that',
        'mesh.rules=replicated if that is meant',
      ),
    ),
  ],
)
def test_a_parameter_that_does_not_fit_is_refused_by_name(
  shape, axes, more_rules, names
):
  with pytest.raises(UserError) as error:
    _sharding(shape, axes, more_rules=more_rules)
  _is_one_sentence(error, 'block/kernel', *names)


def test_large_parameters_may_stay_whole_where_nothing_is_sharded():
  shape, axes = (2**12, 2**12), ('vocab', 'kv')
  assert _sharding(shape, axes, rules='replicated') == PartitionSpec(None, None)
  one = _mesh(num_devices=1)
  assert _sharding(shape, axes, mesh=one) == PartitionSpec(None, None)


@pytest.mark.parametrize(
  ('sizes', 'remedy'),
  [
    ({'data': 1, 'context': 8}, 'use mesh.rules=context, a mesh that'),
    ({'data': 1, 'slices': 8}, 'use a mesh that'),
  ],
)
def test_nor_may_they_where_the_axes_of_the_rules_have_one_part(sizes, remedy):
  mesh = _mesh(**sizes)
  with pytest.raises(UserError) as error:
    _sharding((2**12, 2**12), ('embed', 'kv'), mesh=mesh, rules='fsdp')
  _is_one_sentence(error, 'left whole on every device', remedy)


def test_an_axis_over_two_mesh_axes_divides_by_both():
  rules = {'embed': ('data', 'model')}
  got = _sharding((16,), ('embed',), more_rules=rules)
  assert got == PartitionSpec(('data', 'model'))
  with pytest.raises(UserError) as error:
    _sharding((12,), ('embed',), more_rules=rules)
  _is_one_sentence(error, 'data*model', 'size 8')


@pytest.mark.parametrize('name', ['adam', 'adamw', 'lamb', 'sgd', 'adafactor'])
def test_moments_live_with_their_parameters(name):
  config = make_config({'optimizer.name': name})
  mesh = _mesh(data=4, model=2)
  state = train_step.abstract_state(config, mesh)
  params = jax.tree.leaves(state.params)
  assert len({p.sharding.spec for p in params}) > 3
  by_shape = {}
  for p in params:
    by_shape.setdefault(p.shape, set()).add(p.sharding.spec)
  moments = [x for x in jax.tree.leaves(state.opt_state) if x.ndim]
  assert len(moments) >= len(params)
  whole = PartitionSpec()
  for x in moments:
    if x.shape in by_shape:
      assert x.sharding.spec in by_shape[x.shape], x
    else:
      assert x.sharding.spec == whole
  is_spread = [x.sharding.spec != whole for x in moments]
  assert sum(is_spread) >= len(params) / 2
  # The same tree as the optimizer makes, so that a jitted init can fill it.
  made = jax.eval_shape(make_optimizer(config.optimizer).init, state.params)
  assert jax.tree.structure(made) == jax.tree.structure(state.opt_state)


def test_factored_moments_stay_whole():
  config = make_config(
    {'optimizer.name': 'adafactor', 'model.mlp_width': 256, 'model.width': 128}
  )
  state = train_step.abstract_state(config, _mesh(data=4, model=2))
  factors = [
    x
    for path, x in jax.tree_util.tree_leaves_with_path(state.opt_state)
    if {'v_row', 'v_col'} & {getattr(key, 'name', '') for key in path}
  ]
  assert any(x.ndim == 2 for x in factors)
  assert all(x.sharding.spec == PartitionSpec() for x in factors)


def test_a_batch_that_does_not_divide_over_the_data_is_refused():
  mesh = _mesh(slices=2, data=2, model=2)
  mesh_checks.check_batch('train.batch_size', 8, mesh, axes='slice*data')
  with pytest.raises(UserError) as error:
    mesh_checks.check_batch('train.batch_size', 6, mesh, axes='slice*data')
  _is_one_sentence(error, 'train.batch_size 6', 'of size 4')


def test_latents_have_rows_over_context_or_are_split():
  mesh = _mesh(data=2, context=4)
  over = partitioning.BATCH_AXES
  assert logical.latent_axes(mesh, 8, 7) == ((*over, 'context'), None)
  assert logical.latent_axes(mesh, 2, 8) == (over, 'context')
  with pytest.raises(UserError) as error:
    logical.latent_axes(mesh, 2, 7)
  _is_one_sentence(error, 'mesh.context 4', '2 rows', '7 latents')


@pytest.mark.parametrize(
  ('changes', 'names'),
  [
    ({'model.context_length': 30}, ('model.context_length 30', 'context 4')),
    ({'model.attention': 'reference'}, ('reference', 'chunked')),
  ],
)
def test_inputs_that_do_not_split_over_context_are_refused(changes, names):
  mesh = _mesh(data=2, context=4)
  model = make_config(changes).model
  length = model.context_length
  with pytest.raises(UserError) as error:
    mesh_checks.check_context(model, 'model.context_length', length, mesh)
  _is_one_sentence(error, *names)


def test_inputs_that_training_keeps_split_over_context():
  config = make_config({'model.num_kept_inputs': 6, 'train.batch_size': 8})
  mesh = _mesh(data=2, context=4)
  with pytest.raises(UserError) as error:
    mesh_checks.check_train(config, mesh)
  _is_one_sentence(error, 'model.num_kept_inputs 6', 'context 4')
  mesh_checks.check_evaluate(config, mesh)


@pytest.mark.parametrize('command', ['train', 'evaluate', 'sample'])
@pytest.mark.parametrize('rules', ['replicated', 'fsdp'])
def test_a_model_axis_that_splits_nothing_is_refused(command, rules):
  config = make_config({'mesh.rules': rules})
  with pytest.raises(UserError) as error:
    getattr(mesh_checks, f'check_{command}')(config, _mesh(data=4, model=2))
  _is_one_sentence(error, f'mesh.rules {rules}', 'mesh.model 2', 'fsdp_tensor')


def test_a_global_batch_keeps_its_rows_in_order_over_slices_and_data():
  mesh = _mesh(slices=2, data=2, model=2)
  rows = np.arange(24, dtype=np.int32).reshape(8, 3)
  batch = partitioning.global_batch({'tokens': rows}, mesh, len(rows))
  np.testing.assert_array_equal(batch['tokens'], rows)
  shards = {s.device: s.data.shape for s in batch['tokens'].addressable_shards}
  assert set(shards.values()) == {(2, 3)} and len(shards) == 8


def test_constraints_without_a_rule_raise_instead_of_replicating():
  def run(x):
    with logical.decoding(_mesh(), 'fsdp'):
      return logical.constrain(x, ('batch', 'colour'))

  with pytest.raises(Exception, match='colour'):
    jax.jit(run)(jnp.ones((8, 2)))


@pytest.mark.parametrize(
  ('changes', 'names'),
  [
    ({'model.vocab_size': 259}, ("'vocab'", '259', 'change the size')),
    ({'model.width': 18}, ("'embed'", '18', 'data')),
  ],
)
def test_a_model_that_an_axis_does_not_divide_is_refused(changes, names):
  rules = {'mesh.rules': 'fsdp_tensor_vocab', 'mesh.data': 4, 'mesh.model': 2}
  config = make_config(rules | changes)
  mesh = partitioning.make_mesh(config.mesh, jax.devices())
  with pytest.raises(UserError) as error:
    train_step.abstract_state(config, mesh)
  _is_one_sentence(error, *names)
