"""What a pickle can do here: make arrays, and nothing else."""

import collections
import io
import pathlib
import pickle
import re
import subprocess
import sys

import numpy as np
import pytest

from perceiver_ar.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import array_pickles

_TOOLS = pathlib.Path(array_pickles.__file__).parent


class Call:
  """Is pickled as a call of a function, and perhaps a state for the result."""

  def __init__(self, *reduced):
    self._reduced = reduced

  def __reduce__(self):
    return self._reduced


_MAKE = np.zeros(1).__reduce__()[0]


def array(state):
  return Call(_MAKE, (np.ndarray, (0,), b'b'), state)


def dtype(name, state=None):
  made = (np.dtype, (name, False, True))
  return Call(*made, state) if state else Call(*made)


def load(tree, protocol=4):
  return array_pickles.load(io.BytesIO(pickle.dumps(tree, protocol)))


@pytest.mark.parametrize('protocol', range(6))
@pytest.mark.parametrize(
  'kind', ['<f4', '>f8', 'f2', 'i1', '>i4', 'u8', '?', 'c16', 'S5', 'U3']
)
def test_arrays_come_back(protocol, kind):
  flat = np.arange(12).astype(kind)
  tree = {
    'c': flat.reshape(3, 4),
    'f': np.asfortranarray(flat.reshape(3, 4)),
    'k': flat.reshape(1, 3, 4).transpose(2, 0, 1),
    'none': flat[:0].reshape(0, 4),
    'scalar': flat[3],
    'zero': np.array(flat[5]),
  }
  back = load(collections.OrderedDict([('x', [tree, 'text', 3])]), protocol)
  for name, value in tree.items():
    found = back['x'][0][name]
    # Numpy may give them the order of this machine, too.
    assert found.dtype.newbyteorder('=') == value.dtype.newbyteorder('=')
    assert found.shape == value.shape
    assert (np.asarray(found) == value).all(), name
  assert back['x'][1:] == ['text', 3]


_PLAIN = (3, '<', None, None, None, -1, -1, 0)
_FIELDS = (3, '|', None, ('a',), {'a': (np.dtype('f4'), 0)}, 8, 1, 0)
_OBJECTS = (3, '|', None, ('a',), {'a': (np.dtype('O'), 0)}, 8, 1, 0)


@pytest.mark.parametrize(
  ('tree', 'said'),
  [
    # Eight bytes that would be taken for the address of an object.
    (array((1, (1,), dtype('V8', _OBJECTS), False, b'A' * 8)), "type 'V8'"),
    (array((1, (1,), dtype('f8', _OBJECTS), False, b'A' * 8)), "type 'O8?'"),
    (array((1, (1,), dtype('f8', _FIELDS), False, b'A' * 8)), 'of fields'),
    (array((1, (1,), dtype('O'), False, [1])), "type 'O8?'"),
    (np.array([None]), "type 'O8?'"),
    (np.zeros(2, [('a', 'f4')]), "type 'V4'"),
    (np.zeros(2, 'M8[s]'), "type 'M8'"),
    (Call(eval, ('1',)), r'global \w+\.eval'),
    (
      Call(list, (array((1, (1,), dtype('u1'), False, b'1')),)),
      r'global \w+\.list',
    ),
    (Call(np.memmap, ('x',)), 'names the global numpy'),
  ],
)
@pytest.mark.parametrize('protocol', [2, 5])
def test_what_is_no_plain_array_is_refused(tree, said, protocol):
  with pytest.raises(UserError, match=said):
    load({'x': tree}, protocol)


@pytest.mark.parametrize(
  'tree',
  [
    array((1, (2,), dtype('f8', _PLAIN), False, b'A' * 8)),  # half of it
    array((1, (2**40,), dtype('f8', _PLAIN), False, b'A' * 8)),
    array((1, (-1, -1), dtype('f8', _PLAIN), False, b'A' * 8)),
    array((1, (1,), 'f8', False, b'A' * 8)),  # no dtype
    Call(np.ndarray, ((2**40,),)),
    Call(_MAKE, (np.dtype, (0,), b'b')),
    Call(_MAKE, (np.ndarray, (0,), b'b'), ()),
  ],
)
def test_what_numpy_would_not_write_is_damage(tree):
  with pytest.raises(Exception) as caught:
    load({'x': tree})
  assert not isinstance(caught.value, MemoryError)


def test_functions_that_a_pickle_is_given_stay_as_they_are():
  # A state for the function itself, in place of one for a result.
  content = b'cnumpy\ndtype\n(N}Vcall\nI1\nstb.'
  with pytest.raises(pickle.UnpicklingError, match='state for a function'):
    array_pickles.load(io.BytesIO(content))
  assert load(np.arange(3)).tolist() == [0, 1, 2]


_BOMBS = {
  'memo': "b'\\x80\\x04Nr' + (2**28).to_bytes(4, 'little') + b'.'",
  'bytes': "b'\\x80\\x05\\x8e' + (2**36).to_bytes(8, 'little') + b'.'",
  'bytearray': "b'\\x80\\x05\\x96' + (2**36).to_bytes(8, 'little') + b'.'",
  # One text of a megabyte, made into bytes ten thousand times.
  'copies': (
    "b'\\x80\\x02c_codecs\\nencode\\nq\\x00X' + (2**20).to_bytes(4, 'little')"
    " + b'x' * 2**20 + b'q\\x01X\\x06\\x00\\x00\\x00latin1q\\x020]'"
    " + b'h\\x00h\\x01h\\x02\\x86Ra' * 10_000 + b'.'"
  ),
}

_LOAD = """
import io, resource, sys
resource.setrlimit(resource.RLIMIT_AS, (2**34, 2**34))
sys.path.insert(0, sys.argv[1])
import array_pickles
try:
  array_pickles.load(io.BytesIO({content}))
except Exception:
  print(open('/proc/self/status').read())
"""


@pytest.mark.skipif(
  not pathlib.Path('/proc/self').exists(), reason='there is no /proc'
)
@pytest.mark.parametrize('name', _BOMBS)
def test_a_few_bytes_do_not_fill_the_memory(name):
  result = subprocess.run(
    [sys.executable, '-c', _LOAD.format(content=_BOMBS[name]), str(_TOOLS)],
    capture_output=True,
    text=True,
    check=True,
  )
  # Not by getrusage, which knows what the process was forked from as well.
  (peak,) = re.findall(r'VmHWM:\s+(\d+) kB', result.stdout)
  assert int(peak) < 500 * 1024
