"""JSON that states what a data set is, as dataclasses of checked types."""

import dataclasses
from collections.abc import Mapping
from typing import Any, TypeVar, get_args, get_origin

from perceiver_ar.errors import UserError

_T = TypeVar('_T')
_MOST = 2**63  # what NumPy counts with


def read(cls: type[_T], raw: Any, where: str, remedy: str) -> _T:
  """An instance of a dataclass with the fields of a JSON object.

  Args:
    cls: whose fields are int (from 0 on), str, dicts of these, or of Any.
    raw: what json.loads gave.
    where: the file, for messages.
    remedy: how their sentence ends.

  Raises:
    UserError: a field is missing, unknown or of another type.
  """
  if not isinstance(raw, Mapping):
    raise UserError(
      f'{where} has {_short(raw)} where an object belongs; {remedy}'
    )
  fields = dataclasses.fields(cls)  # pyright: ignore[reportArgumentType]
  kinds: dict[str, Any] = {field.name: field.type for field in fields}
  if wrong := sorted(kinds.keys() ^ set(raw)):
    raise UserError(f'{where}: {", ".join(wrong)} unknown or missing; {remedy}')
  for name, kind in kinds.items():
    if not _is_of(raw[name], kind):
      raise UserError(
        f'{where}: {name} is {_short(raw[name])} where {_named(kind)} belongs; '
        f'{remedy}'
      )
  return cls(**raw)


def _is_of(value: Any, kind: Any) -> bool:
  if kind is Any:
    return True
  if kind is int:
    return type(value) is int and 0 <= value < _MOST
  if get_origin(kind) is dict:
    return isinstance(value, dict) and all(
      _is_of(one, get_args(kind)[1]) for one in value.values()
    )
  return isinstance(value, kind)


def _named(kind: Any) -> str:
  names = {int: 'a whole number', str: 'a string'}
  return names.get(kind, 'an object')


def _short(value: Any) -> str:
  shown = repr(value)
  return shown if len(shown) <= 80 else f'{shown[:77]}...'
