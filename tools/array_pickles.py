"""Reads pickles of numpy arrays in plain containers, and refuses all else.

A pickle can name any function and have it called. Here it can name a few, and
none of them is numpy's: those believe a state that numpy never wrote, down to
addresses in memory. Types and arrays are made here, of values that are checked,
and what is made is no larger than the file.
"""

import collections
import math
import os
import pickle
import pickletools
import re
from collections.abc import Callable
from typing import Any, BinaryIO

import numpy as np

from perceiver_ar.errors import UserError

_TYPE = re.compile(r'[<>=|]?(b1|\?|[iuf][1248]|c8|c16|[SU][1-9][0-9]{0,6})')
_PUTS = ('PUT', 'BINPUT', 'LONG_BINPUT')


def load(file: BinaryIO, encoding: str = 'ASCII') -> Any:
  """What is pickled in a file; arrays are of a subclass of `np.ndarray`.

  Args:
    file: that can seek.
    encoding: of the strings of Python 2.

  Raises:
    UserError: it names anything but arrays and plain containers; who called
      adds the file and the remedy.
    Exception: of any kind, if it is damaged.
  """
  size = file.seek(0, os.SEEK_END)
  file.seek(0)
  _check_memo(file)
  file.seek(0)
  return _Reader(file, size, encoding).load()


def _check_memo(file: BinaryIO) -> None:
  """The reader would make room up to any number that the file gives."""
  for count, (opcode, argument, _) in enumerate(pickletools.genops(file)):
    if opcode.name in _PUTS and not 0 <= int(argument or 0) <= count:
      raise pickle.UnpicklingError(f'the memo begins at {argument}')


class _Reader(pickle.Unpickler):
  """Gives a pickle the functions below by the names it knows."""

  def __init__(self, file: BinaryIO, size: int, encoding: str):
    super().__init__(file, encoding=encoding)
    self._left = 2 * size  # bytes of old pickles are made twice
    arrays = {
      'dtype': _Function(_Type),
      'ndarray': _NDARRAY,
      '_reconstruct': _Function(self._reconstruct),
      'scalar': _Function(self._scalar),
      '_frombuffer': _Function(self._from_buffer),
    }
    self._known: dict[tuple[str, str], Any] = {
      ('numpy', 'ndarray'): arrays['ndarray'],
      ('numpy', 'dtype'): arrays['dtype'],
      ('jax._src.array', '_reconstruct_array'): _Function(_from_jax),
      ('jax._src.device_array', 'reconstruct_device_array'): (
        _Function(_from_jax)
      ),
      ('_codecs', 'encode'): _Function(self._encode),
      ('collections', 'OrderedDict'): _Function(self._ordered),
      ('__builtin__', 'bytes'): _Function(lambda: b''),  # of empty arrays
    }
    for numpy in ('numpy.core', 'numpy._core'):
      for name in ('_reconstruct', 'scalar'):
        self._known[f'{numpy}.multiarray', name] = arrays[name]
      self._known[f'{numpy}.numeric', '_frombuffer'] = arrays['_frombuffer']

  def find_class(self, module: str, name: str) -> Any:
    if (module, name) not in self._known:
      raise UserError(
        f'names the global {module}.{name}, and only numpy arrays in plain '
        'containers are read'
      )
    return self._known[module, name]

  def _spend(self, size: int) -> None:
    self._left -= size
    if self._left < 0:
      raise UserError('holds more than twice its own size, which no array does')

  def _reconstruct(self, kind: Any, shape: Any, code: Any) -> np.ndarray:
    del shape, code  # of nothing yet: the state has its own
    if kind is not _NDARRAY:
      raise pickle.UnpicklingError('an array of another class')
    array = np.ndarray.__new__(_Array, (0,), np.int8)
    array.spend = self._spend
    return array

  def _scalar(self, kind: Any, data: Any) -> Any:
    self._spend(_checked(kind, (), data))
    data = data.encode('latin1') if isinstance(data, str) else data
    return np.frombuffer(data, kind.dtype)[0]

  def _from_buffer(
    self, data: Any, kind: Any, shape: Any, order: Any, axes: Any = None
  ) -> np.ndarray:
    """Of protocol 5; `axes` comes with order K, from numpy 2.3 on."""
    self._spend(_checked(kind, shape, data))
    flat = np.frombuffer(data, kind.dtype)
    if axes is not None:
      return flat.reshape(shape).transpose(axes)
    return flat.reshape(shape, order=order)

  def _encode(self, text: str, encoding: str) -> bytes:
    """How old pickles spell bytes."""
    if encoding not in ('latin1', 'latin-1'):
      raise pickle.UnpicklingError(f'bytes in the encoding {encoding}')
    self._spend(len(text))
    return text.encode('latin1')

  def _ordered(self, pairs: Any = ()) -> Any:
    if not isinstance(pairs, list | tuple):
      raise pickle.UnpicklingError('an OrderedDict of no list')
    self._spend(len(pairs))
    return collections.OrderedDict(pairs)


class _Function:
  """Can be called, and not be changed: a pickle may set what it is given."""

  __slots__ = ('call',)

  def __init__(self, call: Callable[..., Any]):
    self.call = call

  def __call__(self, *args: Any) -> Any:
    return self.call(*args)

  def __setstate__(self, state: Any) -> None:
    raise pickle.UnpicklingError('a state for a function')


def _never(*args: Any) -> None:
  raise pickle.UnpicklingError('an array made by its class')


_NDARRAY = _Function(_never)  # is only named


class _Type:
  """A dtype of numbers or strings, of what numpy says of one."""

  __slots__ = ('dtype',)

  def __init__(self, name: Any, align: Any = False, copy: Any = False):
    del align, copy
    if not isinstance(name, str) or not _TYPE.fullmatch(name):
      raise UserError(
        f'has arrays of the type {str(name)[:40]!r}, and only numbers and '
        'strings are read'
      )
    self.dtype = np.dtype(name)

  def __setstate__(self, state: Any) -> None:
    _, order, *about = state
    if about[:3] != [None] * 3 or about[3] not in (-1, self.dtype.itemsize):
      raise UserError('has arrays of fields, and only plain ones are read')
    if order in ('<', '>'):
      self.dtype = self.dtype.newbyteorder(order)


class _Array(np.ndarray):
  """An array whose state is checked."""

  spend: Callable[[int], None]

  def __setstate__(self, state: Any) -> None:
    _, shape, kind, is_fortran, data = state
    self.spend(_checked(kind, shape, data))
    own: Any = (1, shape, kind.dtype, bool(is_fortran), data)
    super().__setstate__(own)


def _checked(kind: Any, shape: Any, data: Any) -> int:
  """The size of an array, if it can be one."""
  if not isinstance(kind, _Type):
    raise pickle.UnpicklingError('an array without a type')
  if not isinstance(data, bytes | bytearray | str):  # of latin-1, as a string
    raise pickle.UnpicklingError('an array of no bytes')
  is_shape = isinstance(shape, tuple) and all(
    type(size) is int and size >= 0 for size in shape
  )
  if not is_shape or math.prod(shape) * kind.dtype.itemsize != len(data):
    raise pickle.UnpicklingError('an array of another size than its shape')
  return len(data)


def _from_jax(function: Any, args: Any, state: Any, about: Any) -> np.ndarray:
  """A jax.Array is a pickled numpy array and its type, which is dropped."""
  del about
  if not isinstance(function, _Function):
    raise pickle.UnpicklingError('a jax array made by another function')
  array = function(*args)
  if not isinstance(array, _Array):
    raise pickle.UnpicklingError('a jax array made by another function')
  array.__setstate__(state)
  return array
