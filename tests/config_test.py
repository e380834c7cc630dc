"""Every check of the configuration says which key, and every file passes."""

import ast
import dataclasses
import json
import re
import runpy

import jax
import pytest
from tiny import CONFIGS, default_config, make_config

from perceiver_ar import config as config_lib
from perceiver_ar import partitioning, train_step
from perceiver_ar.errors import UserError
from perceiver_ar.report import document


def _resolve(changes):
  raw = default_config()
  raw.update_from_flattened_dict(changes)
  return config_lib.resolve(raw)


_LEARNED = {'model.position_encoding': 'learned'}
_SINUSOIDAL = {'model.position_encoding': 'sinusoidal'}


@pytest.mark.parametrize(
  ('changes', 'words'),
  [
    # Ranges.
    ({'model.num_layers': 0}, 'model.num_layers is 0; it must be > 0'),
    ({'model.num_kept_inputs': -1}, 'model.num_kept_inputs is -1'),
    ({'train.log_every': 0}, 'train.log_every'),
    ({'train.z_loss': -1.0}, 'train.z_loss'),
    ({'optimizer.learning_rate': float('nan')}, 'optimizer.learning_rate'),
    ({'optimizer.learning_rate': 0.0}, 'optimizer.learning_rate'),
    ({'checkpoint.keep_latest': 0}, 'checkpoint.keep_latest'),
    ({'data.prefetch': 0}, 'data.prefetch'),
    ({'evaluate.max_examples': -1}, 'evaluate.max_examples'),
    ({'sample.top_p': 1.5}, 'sample.top_p'),
    ({'model.dropout_rate': 1.1}, 'model.dropout_rate'),
    ({'model.rotary_fraction': 1.1}, 'model.rotary_fraction'),
    ({'train.label_smoothing': 1.0}, 'train.label_smoothing is 1.0'),
    ({'optimizer.b2': 1.0}, 'optimizer.b2 is 1.0; it must be < 1'),
    # Choices.
    ({'model.position_encoding': 'alibi'}, 'rotary, sinusoidal, learned'),
    ({'model.position_source': 'start'}, 'model.position_source'),
    ({'model.dtype': 'float16'}, 'model.dtype'),
    ({'model.remat': 'some'}, 'model.remat'),
    ({'model.attention': 'fast'}, 'model.attention'),
    ({'data.kind': 'video'}, 'data.kind'),
    ({'data.visits': 'twice'}, 'data.visits'),
    ({'optimizer.name': 'lion'}, 'optimizer.name'),
    ({'optimizer.schedule': 'linear'}, 'optimizer.schedule'),
    ({'optimizer.gradient': 'max'}, 'optimizer.gradient'),
    # Keys at odds with each other.
    ({'model.num_latents': 4096}, 'model.num_latents 4096 exceeds'),
    (
      {'checkpoint.save_every': 500, 'checkpoint.keep_every': 750},
      'checkpoint.keep_every 750 is no multiple of checkpoint.save_every 500',
    ),
    ({'model.embed_width': 100}, 'such as 104'),
    ({'model.num_self_heads': 3}, 'model.width 256 is not divisible'),
    (
      {'model.input_dropout_rate': 0.5, 'model.num_kept_inputs': 4},
      'both drop inputs',
    ),
    ({'model.num_kept_inputs': 4096}, 'model.num_kept_inputs 4096 exceeds'),
    ({'model.position_sizes': ()}, 'model.position_sizes is empty'),
    ({'model.position_sizes': (0, 0)}, 'rotary positions have one'),
    ({'model.rotary_max_wavelength': 100}, 'model.rotary_max_wavelength 100'),
    (_SINUSOIDAL | {'model.position_source': 'from_end_negated'}, 'from_end'),
    (
      _SINUSOIDAL
      | {'model.position_source': 'from_end', 'model.position_sizes': (0, 0)},
      'counted from the end have one',
    ),
    (_LEARNED, 'learned positions need'),
    (_LEARNED | {'model.position_sizes': (-5,)}, 'learned positions need'),
    (
      _LEARNED
      | {'model.position_sizes': (2047,), 'model.position_source': 'from_end'},
      'model.position_sizes (2047,) is below model.context_length 2048',
    ),
    (
      _SINUSOIDAL | {'model.embed_width': 3, 'model.num_cross_heads': 1},
      'must be even',
    ),
    (
      {'optimizer.name': 'adafactor', 'optimizer.momentum_dtype': 'bfloat16'},
      'optimizer.momentum_dtype bfloat16',
    ),
    (
      {'optimizer.name': 'sgd', 'optimizer.variance_dtype': 'bfloat16'},
      'optimizer.variance_dtype bfloat16 means nothing to sgd',
    ),
    (
      {'optimizer.variance_dtype': 'bfloat16', 'optimizer.b2': 0.99},
      'optimizer.b2 0.99 has second moments change by less than bfloat16',
    ),
    ({'train.num_microbatches': 3}, 'train.batch_size 8 is not divisible'),
    (
      {'optimizer.schedule': 'cosine', 'optimizer.decay_start': 20_000},
      'optimizer.decay_start 20000 must lie between',
    ),
    (
      {'optimizer.schedule': 'cosine', 'optimizer.decay_start': 10},
      'optimizer.warmup_steps 1000',
    ),
    ({'data.min_crop': 4096}, 'data.min_crop 4096 exceeds'),
    ({'data.kind': 'copy', 'data.copy_length': 7}, 'data.copy_length 7'),
    ({'data.kind': 'copy', 'data.copy_length': 2}, 'data.copy_length 2'),
    (
      {'evaluate.num_latents': 600, 'evaluate.context_length': 512},
      'evaluate.num_latents 600 exceeds',
    ),
    ({'sample.num_latents': 4096}, 'sample.num_latents 4096 exceeds'),
    ({'evaluate.stride': 513}, 'evaluate.stride 513 exceeds'),
    ({'sample.refill_latents': 513}, 'sample.refill_latents 513 exceeds'),
  ],
  ids=lambda x: ' '.join(x) if isinstance(x, dict) else '',
)
def test_a_wrong_value_is_named_in_one_sentence(changes, words):
  with pytest.raises(UserError) as error:
    _resolve(changes)
  text = str(error.value)
  assert words in text
  assert '\n' not in text


@pytest.mark.parametrize(
  ('where', 'name', 'near'),
  [
    ('model', 'num_latent', 'model.num_latents'),
    ('train', 'steps', 'train.num_steps'),
    ('', 'optimiser', 'optimizer'),
  ],
)
def test_an_unknown_key_names_the_nearest(where, name, near):
  raw = json.loads(_resolve({}).to_json())
  (raw[where] if where else raw)[name] = 1
  with pytest.raises(UserError, match=f'{name} does not exist.* {near}$'):
    config_lib.resolve(raw)


@pytest.mark.parametrize('path', ['model', 'model.width', 'sample.seed'])
def test_a_missing_key_is_named(path):
  raw = json.loads(_resolve({}).to_json())
  *where, name = path.split('.')
  del (raw[where[0]] if where else raw)[name]
  with pytest.raises(UserError, match=f'config key {path} is missing'):
    config_lib.resolve(raw)


@pytest.mark.parametrize(
  ('section', 'name', 'value', 'kind'),
  [
    ('model', 'width', 1.5, 'int'),
    ('model', 'width', True, 'int'),
    ('model', 'width', None, 'int'),
    ('model', 'dtype', 32, 'str'),
    ('model', 'dropout_rate', '0.1', 'float'),
    ('model', 'position_sizes', 3, 'tuple of int'),
    ('model', 'position_sizes', [1.0], 'tuple of int'),
  ],
)
def test_a_value_of_another_type_is_refused(section, name, value, kind):
  raw = json.loads(_resolve({}).to_json())
  raw[section][name] = value
  with pytest.raises(UserError, match=f'{section}.{name} is .* a {kind}$'):
    config_lib.resolve(raw)


def test_a_whole_number_does_for_a_rate():
  raw = json.loads(_resolve({}).to_json())
  raw['optimizer']['learning_rate'] = 1
  rate = config_lib.resolve(raw).optimizer.learning_rate
  assert rate == 1.0 and type(rate) is float


def test_every_key_is_typed_and_frozen():
  config = _resolve({})
  with pytest.raises(dataclasses.FrozenInstanceError):
    config.model.width = 3  # pyright: ignore[reportAttributeAccessIssue]
  for section, values in default_config().items():
    assert set(values) == set(dataclasses.asdict(getattr(config, section)))


def test_values_follow_the_key_in_braces_until_they_are_set():
  config = _resolve({'model.width': 512, 'train.num_steps': 77})
  assert config.model.embed_width == 512 and config.model.mlp_width == 2048
  assert _resolve({'model.embed_width': 512}).model.mlp_width == 1024
  halved = _resolve({'model.num_latents': 64})
  assert halved.evaluate.stride == 64 and halved.sample.refill_latents == 32
  cosine = _resolve({'optimizer.schedule': 'cosine', 'train.num_steps': 3000})
  assert cosine.optimizer.decay_end == 3000
  assert cosine.optimizer.decay_start == 1000


def test_schedules_without_an_end_do_not_keep_one():
  first = _resolve({'train.num_steps': 3000})
  assert config_lib.differences(first, _resolve({'train.num_steps': 9})) == []


def test_differences_name_key_and_both_values_but_for_what_may_differ():
  old = _resolve({})
  assert config_lib.differences(old, old) == []
  new = _resolve(
    {
      'model.dropout_rate': 0.2,
      'train.seed': 2,
      'train.num_steps': 5,
      'train.log_every': 5,
      'mesh.data': 2,
      'data.path': '/elsewhere',
      'sample.seed': 4,
      'evaluate.every': 3,
      'checkpoint.keep_best': 0,
    }
  )
  assert config_lib.differences(old, new) == [
    'model.dropout_rate: 0.1 -> 0.2',
    'train.seed: 1 -> 2',
  ]
  longer = {'optimizer.schedule': 'cosine', 'train.num_steps': 20_000}
  (line,) = config_lib.differences(
    _resolve({'optimizer.schedule': 'cosine'}), _resolve(longer)
  )
  assert line.startswith('optimizer.decay_end')


def test_what_may_differ_are_keys():
  values = dataclasses.asdict(_resolve({}))
  for key in config_lib.MAY_DIFFER:
    section, _, name = key.partition('.')
    assert section in values and (not name or name in values[section]), key


def _all_configs():
  """(file, argument) of every config: the docstring lists them as `:arg`."""
  for path in sorted(CONFIGS.glob('*.py')):
    doc = ast.get_docstring(ast.parse(path.read_text())) or ''
    for arg in re.findall(r'^:(\w+)', doc, re.MULTILINE) or ['']:
      yield path.name, arg


@pytest.mark.parametrize(('name', 'arg'), list(_all_configs()))
def test_every_config_resolves_round_trips_and_fits_one_and_eight_devices(
  name, arg
):
  module = runpy.run_path(str(CONFIGS / name))
  config = config_lib.resolve(module['get_config'](arg))
  assert config_lib.resolve(json.loads(config.to_json())) == config
  for num_devices in (1, 8):
    devices = jax.devices()[:num_devices]
    # Some are for pods: their inputs are split over more devices than these,
    # of which some are left to split parameters over.
    fewer = dataclasses.replace(
      config.mesh, context=min(config.mesh.context, max(num_devices // 2, 1))
    )
    mesh = partitioning.make_mesh(fewer, devices)
    state = train_step.abstract_state(config, mesh)
    assert all(x.sharding.mesh == mesh for x in jax.tree.leaves(state))


@pytest.mark.parametrize(
  ('name', 'arg', 'number'),
  [
    # Published, less the constant table of sines that is computed here.
    ('copy_task', 'copy_32', 26_810_627 - 33 * 1024),
    ('copy_task', 'copy_131072', 223_976_707 - 131_073 * 1024),
    ('images', 'imagenet64', 770_094_339),
    ('books', 'pg19', 974.2e6),
    ('music', 'maestro_v1', 165.6e6),
    ('music', 'maestro_v3', 165.6e6),
    ('music', 'piano', 316.8e6),
    ('audio', 'soundstream_12kbps', 215.2e6),
    ('audio', 'soundstream_22kbps', 408.3e6),
  ],
)
def test_published_configs_have_as_many_parameters_as_published(
  name, arg, number
):
  raw = runpy.run_path(str(CONFIGS / f'{name}.py'))['get_config'](arg)
  count = document.num_parameters(config_lib.resolve(raw).model)
  if isinstance(number, int):
    assert count == number
  else:
    assert round(count / 1e6, 1) == number / 1e6


@pytest.mark.parametrize('name', [p.name for p in CONFIGS.glob('*.py')])
def test_an_argument_that_a_config_does_not_have_is_refused(name):
  module = runpy.run_path(str(CONFIGS / name))
  with pytest.raises(ValueError, match=r'nonsense'):
    module['get_config']('nonsense')


def test_a_config_survives_json():
  config = make_config({'model.position_sizes': (0,)})
  raw = json.loads(json.dumps(dataclasses.asdict(config)))
  assert config_lib.resolve(raw) == config
