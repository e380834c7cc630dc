"""Nothing that we run makes code of data."""

import ast
import pathlib

import pytest

_ROOT = pathlib.Path(__file__).parents[1]
_FILES = [
  path
  for folder in ('perceiver_ar', 'tools', 'launch', 'configs')
  for path in sorted((_ROOT / folder).rglob('*.py'))
]
_READER = _ROOT / 'tools' / 'array_pickles.py'
# Modules that unpickle what they read, or run it.
_MODULES = {
  *('pickle', '_pickle', 'cPickle', 'dill', 'joblib', 'cloudpickle', 'shelve'),
  *('marshal', 'torch', 'pandas', 'code', 'codeop', 'pydoc', 'pty', 'timeit'),
  *('xml', 'lxml', 'jsonpickle', 'xmlrpc', 'imp', 'telnetlib', 'ftplib'),
}
_CALLS = {'eval', 'exec', 'compile', '__import__', 'execfile'}
# Methods that do so unless an argument says no, or always.
_METHODS = {
  'extractall',
  'extract',
  'unpack_archive',
  'read_pickle',
  'fromfile',
}
_YAML = {'load', 'load_all', 'unsafe_load', 'full_load', 'unsafe_load_all'}
_OWN = {'official_files.read_pickle'}  # by the reader


def wrong(path):
  """What a file does that it must not, as sentences."""
  return wrong_in(path.read_text(), path)


def wrong_in(text, path):
  found = []
  for node in ast.walk(ast.parse(text)):
    if isinstance(node, ast.Import | ast.ImportFrom):
      names = [alias.name for alias in node.names]
      module = node.module if isinstance(node, ast.ImportFrom) else None
      tops = {(module or name).split('.')[0] for name in names}
      if bad := tops & _MODULES:
        found.append(f'{path}:{node.lineno} imports {", ".join(bad)}')
    elif isinstance(node, ast.Call) and (why := wrong_call(node)):
      found.append(f'{path}:{node.lineno} {why}')
  return found


def wrong_call(node):
  name = ast.unparse(node.func)
  last = name.rpartition('.')[2]
  given = {keyword.arg: keyword.value for keyword in node.keywords}
  if name in _CALLS or name == 'builtins.' + last:
    return f'calls {name}'
  if last in _METHODS and name not in _OWN:
    return f'calls {name}'
  if name.startswith('yaml.') and last in _YAML:
    return f'calls {name}'
  if name in ('np.load', 'numpy.load', 'jnp.load'):
    allow = given.get('allow_pickle')
    if not (isinstance(allow, ast.Constant) and allow.value is False):
      return f'calls {name} without allow_pickle=False'
  shell = given.get('shell')
  if shell is not None and ast.unparse(shell) != 'False':
    return f'calls {name} with a shell'
  if name in ('os.system', 'os.popen', 'subprocess.getoutput'):
    return f'calls {name}'
  return ''


@pytest.mark.parametrize(
  'path', _FILES, ids=lambda path: str(path.relative_to(_ROOT))
)
def test_no_file_makes_code_of_data(path):
  if path != _READER:
    assert not wrong(path)


def test_the_reader_has_nothing_but_its_pickles():
  said = [line.rpartition('py:')[2] for line in wrong(_READER)]
  assert [line.split(' ', 1)[1] for line in said] == ['imports pickle']


@pytest.mark.parametrize(
  'code',
  [
    'import pickle',
    'from pickle import loads',
    'import torch.serialization',
    'def f():\n  import joblib',
    'eval(x)',
    'np.load(x)',
    'np.load(x, allow_pickle=True)',
    'np.load(x, allow_pickle=no)',
    'yaml.load(x)',
    'archive.extractall(x)',
    'subprocess.run(x, shell=True)',
  ],
)
def test_what_makes_code_of_data_is_seen(code):
  assert wrong_in(code, 'x.py')
