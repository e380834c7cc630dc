import importlib
import json
import os
import pathlib
import pickle
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest

# pyright: reportMissingImports=false
from published_model import (
  add_gradients,
  config,
  forward,
  loss_of,
  random_file,
)

from perceiver_ar import checkpoint, inspection, workdir
from perceiver_ar import config as config_lib
from perceiver_ar.data import records

_TESTS = pathlib.Path(__file__).parents[1]
_TOOL = _TESTS.parent / 'tools' / 'import_official.py'
_GOLDEN = sorted((_TESTS / 'golden').glob('*.npz'))
_HALF = _TESTS / 'golden' / 'rotary_half.npz'
_QUERY = 'p/perceiver_ar/~/cross_attention/attention/linear/w'
_KEY = 'p/perceiver_ar/~/cross_attention/attention/linear_1/w'
_GRADIENT = 'g/perceiver_ar/~/cross_attention/attention/linear_2/w'


@pytest.fixture(scope='module', autouse=True)
def quick_to_compile():
  """The models here are so small that compiling them is all of the time."""
  jax.config.update('jax_disable_most_optimizations', True)
  yield
  jax.config.update('jax_disable_most_optimizations', False)


@pytest.fixture(scope='module')
def tool():
  sys.path.insert(0, str(_TOOL.parent))
  yield importlib.import_module('import_official')
  sys.path.remove(str(_TOOL.parent))


def _arrays(path):
  with np.load(path) as file:
    return dict(file)


def _save(path, arrays: dict[str, Any]):
  np.savez(path, **arrays)


def _config(arrays, **changes):
  stored = json.loads(str(arrays['config'])) | changes
  return arrays | {'config': np.array(json.dumps(stored))}


def _without_gradients(arrays):
  """For tests that do not look at them, which take long to compile."""
  return {k: v for k, v in arrays.items() if not k.startswith('g/')}


def _import(tool, arrays, folder, *options):
  folder.mkdir(exist_ok=True)
  _save(folder / 'weights.npz', arrays)
  return tool.main(
    [
      f'--npz={folder / "weights.npz"}',
      f'--workdir={folder / "run"}',
      *options,
    ]
  )


def _restore(folder, tree):
  device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
  abstract = jax.tree.map(
    lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), tree
  )
  return checkpoint.restore_params(folder, abstract, None)


def _load(tool, path):
  read = tool.official_files.read_npz
  if path.suffix == '.pkl':
    read = tool.official_files.read_pickle
  return tool.load(read(path), {})


def _same(a, b):
  equal = jax.tree.map(lambda x, y: np.array_equal(x, y), a, b)
  return jax.tree.all(equal)


# Agreement with the published model.


def _check(tool, path):
  published = tool.official_files.read_npz(path)
  model_config, params, _ = tool.load(published, {})
  model = model_config.model
  examples = tool.official_data.read(published, model)
  return tool.official_check.compare(published, model, params, examples)


@pytest.mark.parametrize('path', _GOLDEN, ids=lambda path: path.stem)
def test_golden_outputs_are_reproduced(tool, path, tmp_path):
  _save(tmp_path / 'weights.npz', _without_gradients(_arrays(path)))
  result = _check(tool, tmp_path / 'weights.npz')
  assert result['ok'] and result['not_checked'] == ['gradients']
  # The tolerance leaves room for other machines.
  for part in ('logits', 'loss', 'total_loss'):
    assert result[part] < 1e-5


@pytest.mark.parametrize(
  'path',
  [
    pytest.param(path, marks=[] if path == _HALF else pytest.mark.slow)
    for path in _GOLDEN
  ],
  ids=lambda path: path.stem,
)
def test_golden_gradients_are_reproduced(tool, path):
  result = _check(tool, path)
  assert result['ok'] and not result['not_checked']
  assert result['gradients'] < 1e-5


@pytest.mark.parametrize('path', _GOLDEN, ids=lambda path: path.stem)
def test_the_model_of_these_tests_is_the_published_one(path):
  arrays = _arrays(path)
  weights = {k[2:]: x for k, x in arrays.items() if k.startswith('p/')}
  names = 'inputs', 'input_idxs', 'lengths', 'latent_last_steps'
  logits = forward(
    np,
    weights,
    json.loads(str(arrays['config'])),
    *(arrays[name] for name in names),
  )
  loss = loss_of(np, logits, arrays['labels']) * arrays['loss_mask']
  np.testing.assert_allclose(logits, arrays['logits'], atol=1e-5)
  np.testing.assert_allclose(loss.sum(), arrays['total_loss'], rtol=1e-6)


_ABSOLUTE = {'pos': 'absolute', 'data_pos': True}
_CASES = {
  'half_the_heads_negated': (
    config(frac_heads=0.5, data_pos=False, neg=True, layers=1),
    [12, 1, 5],
  ),
  'odd_head_size': (
    config(embed=24, width=20, cross_heads=8, frac=1.0, wavelength=100),
    [12, 7],
  ),
  'heads_too_narrow_to_turn': (config(embed=8, cross_heads=8, heads=1), [9, 3]),
  'one_latent': (config(n=1, layers=3), [12, 1, 6]),
  'all_latents': (config(n=12, embed=32, cross_heads=4), [12, 4, 0]),
  'two_axes': (
    config(**_ABSOLUTE, learn=True, pe='random', idx=[4, 6], vocab=259),
    [12, 2, 8],
  ),
  'three_axes_fixed': (config(**_ABSOLUTE, idx=[4, 6, 3]), [11, 3]),
  'random_and_fixed': (config(**_ABSOLUTE, pe='random', idx=[30]), [9, 12]),
  'neg_means_nothing_with_data_positions': (config(neg=True), [12, 5]),
  'learned_from_sinusoids_from_end': (
    config(pos='absolute', data_pos=False, learn=True, idx=[12]),
    [12, 3],
  ),
  'sinusoids_from_end': (
    config(pos='absolute', data_pos=False, neg=True, embed=12, idx=[30]),
    [10, 12],
  ),
}


_QUICK = 'half_the_heads_negated', 'two_axes'


@pytest.mark.parametrize(
  'name',
  [
    pytest.param(name, marks=[] if name in _QUICK else pytest.mark.slow)
    for name in _CASES
  ],
)
def test_random_models_are_reproduced(tool, tmp_path, name):
  c, lengths = _CASES[name]
  arrays = random_file(c, np.random.default_rng(len(name)), lengths)
  _save(tmp_path / 'weights.npz', arrays)
  result = _check(tool, tmp_path / 'weights.npz')
  assert result['ok'], result
  assert result['not_checked'] == ['gradients']


@pytest.mark.slow
def test_gradients_of_a_random_model_are_reproduced(tool, tmp_path):
  c = config(embed=24, layers=1, frac_heads=0.5, data_pos=False)
  arrays = random_file(c, np.random.default_rng(0), [12, 2])
  arrays = add_gradients(arrays, c)
  _save(tmp_path / 'weights.npz', arrays)
  result = _check(tool, tmp_path / 'weights.npz')
  assert result['ok'] and result['gradients'] is not None, result


def test_what_a_file_lacks_is_said(tool, tmp_path):
  arrays = _arrays(_HALF)
  for name in ('labels', 'targets', 'total_loss'):
    arrays.pop(name)
  _save(tmp_path / 'weights.npz', arrays)
  result = _check(tool, tmp_path / 'weights.npz')
  assert result['ok'] and result['logits'] < 1e-5
  assert result['not_checked'] == ['loss', 'total_loss', 'gradients']
  assert [result[part] for part in result['not_checked']] == [None] * 3


# The command.


def test_the_command_writes_a_workdir_and_json(tmp_path):
  run, output = tmp_path / 'run', tmp_path / 'check.json'
  result = subprocess.run(
    [
      sys.executable,
      str(_TOOL),
      f'--npz={_HALF}',
      f'--workdir={run}',
      '--check',
      f'--output={output}',
    ],
    capture_output=True,
    text=True,
    env=os.environ | {'JAX_DISABLE_MOST_OPTIMIZATIONS': '1'},
    check=False,
  )
  assert result.returncode == 0, result.stderr
  assert json.loads(result.stdout) == json.loads(output.read_text())
  assert json.loads(result.stdout)['ok'] is True
  assert checkpoint.saved_steps(run) == [0]
  assert [row['ok'] for row in inspection.verify(run)] == [True]


@pytest.mark.parametrize('stem', ['absolute_learned_3d', 'wide_embedding'])
def test_the_workdir_holds_the_same_model_and_its_inputs(tool, stem, tmp_path):
  path = _TESTS / 'golden' / f'{stem}.npz'
  arrays = _arrays(path)
  assert _import(tool, _without_gradients(arrays), tmp_path) == 0
  run = tmp_path / 'run'
  expected, params, _ = _load(tool, path)
  step, restored = _restore(run, params)
  assert step == 0 and _same(restored, params)
  saved = config_lib.resolve(workdir.read_config(run))
  assert saved.model == expected.model
  assert checkpoint.load_config(run, 0) == saved

  documents = records.Documents(saved.data.path, 'validation')
  trained = workdir.read_trained(run)
  assert trained.fingerprint == documents.fingerprint
  assert trained.codec.vocab_size == saved.model.vocab_size
  layout = trained.layout.get('rows', np.arange(1, 25)[:, None])
  np.testing.assert_array_equal(layout, arrays['input_idxs'][0])
  for row, length in enumerate(arrays['lengths']):
    np.testing.assert_array_equal(
      documents[row],
      [*arrays['inputs'][row, :length], arrays['targets'][row, length - 1]],
    )


def test_inputs_that_are_no_documents_are_left_out_and_said(
  tool, tmp_path, capsys
):
  arrays = _without_gradients(_arrays(_HALF))
  arrays['input_idxs'][0] += (arrays['input_idxs'][0] > 0) * 3
  assert _import(tool, arrays, tmp_path) == 0
  assert 'no data set is written: ' in capsys.readouterr().err
  run = tmp_path / 'run'
  assert workdir.read_config(run)['data']['path'] == ''
  assert workdir.read_trained(run).codec.kind == 'ids'
  assert not (run / 'data').exists()


def test_importing_again_changes_nothing_and_another_model_is_refused(
  tool, tmp_path, capsys
):
  arrays = _without_gradients(_arrays(_HALF))
  assert _import(tool, arrays, tmp_path) == 0
  assert _import(tool, arrays, tmp_path) == 0
  arrays[_QUERY] = arrays[_QUERY] + 1
  assert _import(tool, arrays, tmp_path) == 2
  assert 'another model' in capsys.readouterr().err


@pytest.mark.parametrize(
  'change',
  [
    lambda a: {_QUERY: a[_QUERY] + 1e-3},
    lambda a: {_QUERY: a[_KEY], _KEY: a[_QUERY]},
    lambda a: {_GRADIENT: a[_GRADIENT] * 1.01},
    lambda a: {'total_loss': a['total_loss'] + np.float32(0.01)},
  ],
  ids=['weight', 'query_and_key', 'gradient', 'total'],
)
def test_another_result_exits_with_status_1_and_writes_nothing(
  tool, tmp_path, capsys, change
):
  arrays = _arrays(_HALF)
  changed = arrays | change(arrays)
  assert _import(tool, changed, tmp_path, '--check') == 1
  assert json.loads(capsys.readouterr().out)['ok'] is False
  assert not (tmp_path / 'run').exists()


# Files that cannot be used.


def _table(arrays):
  arrays['p/perceiver_ar/~/embed_1/embeddings'][7, 3] += 1e-5


def _wrong_dtype(arrays):
  arrays[_QUERY] = arrays[_QUERY].astype(np.int32)


def _nan(arrays):
  arrays[_QUERY][0, 0] = np.nan


@pytest.mark.parametrize(
  ('stem', 'change', 'said'),
  [
    (
      'wide_embedding',
      lambda a: a.update({_QUERY: a[_KEY], _KEY: a[_QUERY]}),
      f'{_QUERY[2:]} is (64, 64) and not (32, 64)',
    ),
    ('rotary_half', lambda a: a.pop(_KEY), f'{_KEY[2:]} is missing'),
    (
      'rotary_half',
      lambda a: a.pop('p/perceiver_ar/~/embed/embeddings'),
      'perceiver_ar/~/embed/embeddings is missing',
    ),
    (
      'absolute_learned_3d',
      lambda a: a.pop('p/perceiver_ar/~/embed_2/embeddings'),
      'perceiver_ar/~/embed_2/embeddings is missing',
    ),
    (
      'rotary_half',
      lambda a: a.update({'p/perceiver_ar/~/embed_1/embeddings': a[_KEY]}),
      'perceiver_ar/~/embed_1/embeddings is not part of the model',
    ),
    (
      'rotary_half',
      lambda a: a.update({_KEY: a[_KEY][:, :-1]}),
      f'{_KEY[2:]} is (32, 31) and not (32, 32)',
    ),
    ('rotary_half', _nan, f'{_QUERY[2:]} is not finite'),
    ('rotary_half', _wrong_dtype, f'{_QUERY[2:]} is int32'),
    ('absolute_sinusoidal', _table, 'embed_1/embeddings is not the table of'),
    (
      'rotary_half',
      lambda a: a.update(inputs=a['inputs'] + 39),
      "'inputs' must hold integers from 0 to 39",
    ),
    (
      'rotary_half',
      lambda a: a.update(lengths=a['lengths'] - 1),
      "'lengths' is",
    ),
    ('rotary_half', lambda a: a.update(config=np.array('{')), 'is not JSON'),
  ],
)
def test_a_wrong_file_is_refused_in_one_sentence(
  tool, tmp_path, capsys, stem, change, said
):
  arrays = _arrays(_TESTS / 'golden' / f'{stem}.npz')
  change(arrays)
  _assert_refused(tool, arrays, tmp_path, capsys, said)


@pytest.mark.parametrize(
  ('changes', 'said'),
  [
    ({'layers': 3}, 'self_attention_2/attention/linear/b'),
    ({'layers': 1}, 'self_attention_1/attention/linear/b'),
    ({'vocab': 41}, 'perceiver_ar/~/embed/embeddings is (40, 32)'),
    ({'heads': 5}, 'num_self_heads 5 does not divide'),
    ({'wavelength': 8}, 'rotary_max_wavelength 8 is below'),
    ({'pos': 'relative'}, 'config key pos'),
    ({'frac': 'half'}, 'config key frac'),
    ({'n': 25}, 'num_latents 25 exceeds'),
  ],
)
def test_a_config_that_cannot_be_is_refused_in_one_sentence(
  tool, tmp_path, capsys, changes, said
):
  arrays = _config(_arrays(_HALF), **changes)
  _assert_refused(tool, arrays, tmp_path, capsys, said)


def _assert_refused(tool, arrays, folder, capsys, said):
  assert _import(tool, arrays, folder) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith('import_official: ')
  assert captured.err.count('\n') == 1 and said in captured.err
  assert not captured.out and not (folder / 'run').exists()


def test_a_flag_fills_what_the_file_lacks_and_contradicts_nothing(
  tool, tmp_path, capsys
):
  arrays = _without_gradients(_arrays(_HALF))
  assert _import(tool, arrays, tmp_path, '--num_self_heads=2') == 2
  assert '--num_self_heads=2' in capsys.readouterr().err
  stored = json.loads(str(arrays['config']))
  del stored['heads']
  arrays['config'] = np.array(json.dumps(stored))
  _save(tmp_path / 'weights.npz', arrays)
  published = tool.official_files.read_npz(tmp_path / 'weights.npz')
  c, _, _ = tool.load(published, {'num_self_heads': 2})
  assert c.model.num_self_heads == 2 and c.model.num_cross_heads == 4


# Pickles.


def _modules(path):
  modules = {}
  for name, array in _arrays(path).items():
    if name.startswith('p/'):
      module, leaf = name[2:].rsplit('/', 1)
      modules.setdefault(module, {})[leaf] = array
  return modules


_FLAGS = [
  '--num_cross_heads=4',
  '--num_self_heads=4',
  '--context_length=24',
  '--num_latents=8',
]


def _import_pickle(tool, tree, folder, *options, protocol=4):
  folder.mkdir(exist_ok=True)
  (folder / 'weights.pkl').write_bytes(pickle.dumps(tree, protocol))
  return tool.main(
    [
      f'--pickle={folder / "weights.pkl"}',
      f'--workdir={folder / "run"}',
      *options,
    ]
  )


@pytest.mark.parametrize(
  ('nest', 'protocol'),
  [
    (lambda m: m, 2),
    (lambda m: {'params': m}, 4),
    (lambda m: {'experiment_module': {'params': m, 'step': np.int64(3)}}, 5),
    (lambda m: {'_params': jax.tree.map(jax.numpy.asarray, m)}, 4),
    (lambda m: jax.tree.map(np.asfortranarray, m), 5),
  ],
  ids=['plain', 'params', 'jaxline', 'jax_arrays', 'fortran'],
)
def test_a_pickle_gives_the_parameters_of_the_npz(
  tool, tmp_path, nest, protocol
):
  tree = nest(_modules(_HALF))
  assert _import_pickle(tool, tree, tmp_path, *_FLAGS, protocol=protocol) == 0
  expected, params, _ = _load(tool, _HALF)
  _, restored = _restore(tmp_path / 'run', params)
  assert _same(restored, params)
  saved = config_lib.resolve(workdir.read_config(tmp_path / 'run'))
  assert saved.model == expected.model


def test_of_replicas_the_first_is_taken_if_all_weights_have_them(
  tool, tmp_path, capsys
):
  modules = jax.tree.map(lambda x: np.stack([x, x + 1]), _modules(_HALF))
  assert _import_pickle(tool, modules, tmp_path, *_FLAGS) == 0
  assert 'every weight has 2 replicas' in capsys.readouterr().err
  _, params, _ = _load(tool, _HALF)
  assert _same(_restore(tmp_path / 'run', params)[1], params)
  logits = modules['perceiver_ar/~/logits']
  logits['b'] = logits['b'][0]
  assert _import_pickle(tool, modules, tmp_path, *_FLAGS) == 2
  assert 'perceiver_ar/~/logits/b has the shape' in capsys.readouterr().err


class _Malice:
  def __init__(self, target, *args):
    self._call = target, args

  def __reduce__(self):
    return self._call


@pytest.mark.parametrize(
  ('target', 'argument'),
  [
    (os.system, 'touch {}/executed'),
    (eval, 'open("{}/executed", "w")'),
    (pathlib.Path.touch, '{}/executed'),
    (np.memmap, '{}/executed'),
  ],
)
@pytest.mark.parametrize('protocol', [2, 5])
def test_a_malicious_pickle_is_refused_and_not_executed(
  tool, tmp_path, capsys, target, argument, protocol
):
  modules = _modules(_HALF)
  malice = _Malice(target, argument.format(tmp_path))
  modules['perceiver_ar/~/embed']['embeddings'] = malice
  code = _import_pickle(tool, modules, tmp_path, *_FLAGS, protocol=protocol)
  message = capsys.readouterr().err
  assert code == 2 and message.count('\n') == 1
  assert 'weights.pkl names the global ' in message
  if protocol == 5 and target is os.system:
    assert f'{os.name}.system, and' in message
  assert not (tmp_path / 'executed').exists()
  assert not (tmp_path / 'run').exists()


def test_no_function_may_be_called_through_a_jax_array(tool, tmp_path, capsys):
  rebuild = jax.numpy.ones(1).__reduce__()[0]
  malice = _Malice(rebuild, np.dtype, ('f4',), {}, {})
  assert _import_pickle(tool, {'perceiver_ar/x': malice}, tmp_path) == 2
  assert 'a jax array made by another function' in capsys.readouterr().err


@pytest.mark.parametrize(
  ('tree', 'said'),
  [
    ({'params': {}}, 'holds 0 dicts of modules'),
    ({'a': {'perceiver_ar/x': {}}, 'b': {'perceiver_ar/x': {}}}, '(a, b)'),
    ({'perceiver_ar/x': 3}, 'module perceiver_ar/x is a int'),
    ({'perceiver_ar/x': {'w': 'text'}}, 'perceiver_ar/x/w is a str'),
  ],
)
def test_a_pickle_of_something_else_is_refused(
  tool, tmp_path, capsys, tree, said
):
  assert _import_pickle(tool, tree, tmp_path) == 2
  message = capsys.readouterr().err
  assert message.count('\n') == 1 and said in message


def test_files_of_another_format_are_refused(tool, tmp_path, capsys):
  path = tmp_path / 'weights'
  for content in (None, b'', b'not a zip', pickle.dumps({'a': 1})[:-3]):
    if content is not None:
      path.write_bytes(content)
    for kind in ('npz', 'pickle'):
      code = tool.main([f'--{kind}={path}', f'--workdir={tmp_path / "run"}'])
      message = capsys.readouterr().err
      assert (
        code == 2 and message.count('\n') == 1 and message.count(str(path)) == 1
      )
