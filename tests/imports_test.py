"""Imports point down, and heavy ones wait until they are needed."""

import ast
import pathlib
import subprocess
import sys

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_PACKAGE = _ROOT / 'perceiver_ar'

# A module may import those of its own row, where it is a package, and below.
_LAYERS = [
  'errors',
  'ops data config config_checks config_files flags progress distributed chips '
  'roll_call software places paths lines journal host_memory outputs',
  'partitioning optimizer losses metrics checksums workdir host_reports '
  'stopping skipping preservation',
  'logical',
  'sharded_attention mesh_checks',
  'models',
  'parameters flops',
  'gradients',
  'replicas train_step saved_step saving checkpoint inspection evaluate sample '
  'drawn artifacts',
  'prefetch starting train replay plan report watchdog',
  'main',
  'drill',
]
_LEVEL = {name: i for i, row in enumerate(_LAYERS) for name in row.split()}
# Within a row.
_ALSO = {
  ('config_files', 'config'),
  ('distributed', 'places'),
  ('host_memory', 'distributed'),
  ('distributed', 'roll_call'),
  ('lines', 'paths'),
  ('journal', 'config'),
  ('journal', 'software'),
  ('journal', 'lines'),
  ('data', 'paths'),
  ('config', 'config_checks'),
  ('config_checks', 'config'),  # its types
  ('data', 'config'),  # takes its section
  ('starting', 'plan'),
  ('starting', 'watchdog'),
  ('train', 'starting'),
  ('train', 'prefetch'),
  ('replay', 'prefetch'),
  ('replay', 'starting'),
  ('train', 'watchdog'),
  ('checkpoint', 'saved_step'),
  ('checkpoint', 'saving'),
  ('evaluate', 'train_step'),  # the shift of targets
  ('sample', 'train_step'),  # what parameters are
  ('artifacts', 'sample'),
  ('artifacts', 'drawn'),
  ('inspection', 'checkpoint'),
  ('inspection', 'saved_step'),
  ('main', 'drill'),
}


def _imports(path):
  """Full names of all that a file imports, inside functions too."""
  for node in ast.walk(ast.parse(path.read_text())):
    if isinstance(node, ast.Import):
      yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
      assert not node.level, f'{path}: relative import'
      yield from (f'{node.module}.{alias.name}' for alias in node.names)


def _room(path):
  return path.relative_to(_PACKAGE).parts[0].removesuffix('.py')


_FILES = [p for p in sorted(_PACKAGE.rglob('*.py')) if p.name != '__init__.py']


@pytest.mark.parametrize(
  'path', _FILES, ids=lambda p: str(p.relative_to(_PACKAGE))
)
def test_imports_point_down(path):
  room = _room(path)
  assert room in _LEVEL, f'{room} has no layer yet'
  for name in _imports(path):
    if name.startswith('perceiver_ar.'):
      other = name.split('.')[1]
      is_down = _LEVEL[other] < _LEVEL[room] or other == room
      assert is_down or (room, other) in _ALSO, f'{path} imports {name}'


def _all_imports(folder):
  return [
    (path, name)
    for path in sorted((_ROOT / folder).rglob('*.py'))
    for name in _imports(path)
  ]


@pytest.mark.parametrize(
  ('folder', 'never'),
  [
    ('perceiver_ar/ops', ('flax', 'optax')),
    ('perceiver_ar/data', ('jax', 'flax', 'optax')),
    ('perceiver_ar/models', ('optax', 'jax.sharding')),
    ('perceiver_ar', ('launch', 'tools', 'tests', 'configs', 'tensorflow')),
    ('configs', ('launch', 'tools', 'tests', 'jax')),
    ('launch', ('perceiver_ar', 'tools', 'jax')),
  ],
)
def test_a_room_does_not_know(folder, never):
  for path, name in _all_imports(folder):
    for other in never:
      assert f'{name}.'.startswith(f'{other}.') is False, f'{path}: {name}'


def test_config_and_errors_need_no_jax():
  for path in (_PACKAGE / 'config.py', _PACKAGE / 'errors.py'):
    assert not {'jax', 'flax'} & {n.split('.')[0] for n in _imports(path)}


def test_models_never_mention_a_mesh():
  for path in (_PACKAGE / 'models').glob('*.py'):
    names = {
      node.id if isinstance(node, ast.Name) else node.attr
      for node in ast.walk(ast.parse(path.read_text()))
      if isinstance(node, ast.Name | ast.Attribute)
    }
    assert not {'Mesh', 'NamedSharding', 'PartitionSpec'} & names, path


def test_flax_is_known_to_models_and_to_what_unboxes_their_parameters():
  rooms = {
    _room(path)
    for path, name in _all_imports('perceiver_ar')
    if name.startswith('flax')
  }
  assert rooms <= {'models', 'partitioning', 'parameters'}


@pytest.mark.parametrize(
  ('statement', 'never'),
  [
    ('import perceiver_ar', ('jax', 'numpy')),
    ('import perceiver_ar.config', ('jax', 'numpy')),
    ('import perceiver_ar.data.pipeline', ('flax', 'optax', 'sentencepiece')),
  ],
)
def test_importing_costs_little(statement, never):
  code = f'import sys; {statement}; print(*sys.modules)'
  result = subprocess.run(
    [sys.executable, '-c', code], capture_output=True, text=True, check=True
  )
  assert not set(never) & set(result.stdout.split())
