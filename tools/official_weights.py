"""Which published weight is which of our parameters.

The published model names its modules as Haiku does and keeps the heads of an
attention merged; ours are split, and the layers are stacked. Rotary positions
turn pairs of neighbouring channels there and pairs from two halves here (see
`models/positions.py`), so the query and key projections of turned heads are
permuted. Every conversion is linear: it serves gradients as well.

Letters: V vocabulary, E embedding width, D width, F hidden width of an MLP,
H heads, K head size.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from official_files import ROOT

from perceiver_ar.checksums import nest
from perceiver_ar.config import ModelConfig
from perceiver_ar.errors import UserError

_TOKENS = f'{ROOT}/~/embed/embeddings'
_CROSS = f'{ROOT}/~/cross_attention'
_TABLE_TOLERANCE = 1e-6
_NUM_NAMED = 3  # weights in a message


@dataclasses.dataclass(frozen=True, kw_only=True)
class Leaf:
  """A published weight, and where it goes.

  Attributes:
    name: module and leaf, as published.
    shape: as published.
    path: of our parameter.
    layer: its row there; None if it is not stacked.
    our_shape: of the row.
    num_heads: turned by rotary positions.
    num_pairs: of channels, turned in each of these heads.
  """

  name: str
  shape: tuple[int, ...]
  path: str
  layer: int | None
  our_shape: tuple[int, ...]
  num_heads: int
  num_pairs: int

  def convert(self, array: np.ndarray) -> np.ndarray:
    ours = array.astype(np.float32).reshape(self.our_shape)
    if not self.num_pairs:
      return ours
    pairs = np.arange(2 * self.num_pairs)
    order_K = np.arange(self.our_shape[-1])
    order_K[: 2 * self.num_pairs] = np.concatenate([pairs[::2], pairs[1::2]])
    turned, rest = np.split(ours, [self.num_heads], axis=-2)
    return np.concatenate([turned[..., order_K], rest], axis=-2)


def sizes(weights: Mapping[str, np.ndarray]) -> dict[str, Any]:
  """What the shapes tell of a model, by the names of `ModelConfig`.

  A size is what most of the weights say that have it, so that the one that is
  at fault is named later. `position_sizes` has the rows of each table.
  """
  names = [name.split('/') for name in weights]
  modules = sorted({name[2] for name in names if len(name) > 2})
  layers = [name for name in modules if _is(name, 'self_attention')]
  dense = [f'{ROOT}/~/{name}/dense' for name in layers]
  num_tables = max(
    (_index(name) for name in modules if _is(name, 'embed')), default=0
  )
  tables = [table_name(axis) for axis in range(max(num_tables, 1))]
  return {
    'vocab_size': _vote(
      weights,
      (f'{ROOT}/~/logits/b', 0),
      (f'{ROOT}/~/logits/w', -1),
      (_TOKENS, 0),
    ),
    'embed_width': _vote(
      weights,
      (f'{_CROSS}/layer_norm_1/scale', 0),
      (f'{ROOT}/~/linear/w', 0),
      (_TOKENS, -1),
    ),
    'width': _vote(
      weights,
      (f'{ROOT}/layer_norm/scale', 0),
      (f'{ROOT}/~/linear/w', -1),
      (f'{ROOT}/~/linear/b', 0),
    ),
    'num_layers': max((_index(name) + 1 for name in layers), default=0),
    'cross_mlp_width': _vote(weights, *_hidden(f'{_CROSS}/dense')),
    'mlp_width': _vote(weights, *(p for d in dense for p in _hidden(d))),
    'position_sizes': tuple(
      weights[name].shape[0] if _has(weights, name) else 1 for name in tables
    ),
  }


def table_name(axis: int) -> str:
  """Of absolute positions."""
  return f'{ROOT}/~/embed_{axis + 1}/embeddings'


def _is(module: str, base: str) -> bool:
  return module == base or (
    module.startswith(f'{base}_') and module[len(base) + 1 :].isdecimal()
  )


def _index(module: str) -> int:
  last = module.rsplit('_', 1)[-1]
  return int(last) if last.isdecimal() else 0


def _hidden(dense: str) -> Sequence[tuple[str, int]]:
  return (
    (f'{dense}/linear/b', 0),
    (f'{dense}/linear/w', -1),
    (f'{dense}/linear_1/w', 0),
  )


def _vote(weights: Mapping[str, np.ndarray], *places: tuple[str, int]) -> int:
  found = [weights[n].shape[axis] for n, axis in places if _has(weights, n)]
  if not found:
    where = places[0][0] if places else f'{ROOT}/~/self_attention'
    raise UserError(f'weight {where} is missing; give a complete file')
  return collections.Counter(found).most_common(1)[0][0]


def _has(weights: Mapping[str, np.ndarray], name: str) -> bool:
  return name in weights and weights[name].ndim > 0


# The table of names.


def leaves(c: ModelConfig) -> list[Leaf]:
  """Every weight that becomes one of our parameters."""
  V, E, D = c.vocab_size, c.embed_width, c.width
  rows = [(_TOKENS, 'embed/token', V)]
  if c.position_encoding == 'learned':
    for axis, size in enumerate(c.position_sizes):
      rows.append((table_name(axis), f'embed/position_{axis}', size))
  found = [_plain(name, path, (size, E)) for name, path, size in rows]
  found += _linear(f'{ROOT}/~/linear', 'to_latents', (E,), (D,))
  found += _norm(f'{_CROSS}/layer_norm', 'cross/query_norm', D)
  found += _norm(f'{_CROSS}/layer_norm_1', 'cross/input_norm', E)
  found += _norm(f'{_CROSS}/layer_norm_2', 'cross/mlp_norm', D)
  found += _attention(c, _CROSS, 'cross', c.num_cross_heads, D, E)
  found += _mlp(c, _CROSS, 'cross', c.cross_mlp_width)
  for layer in range(c.num_layers):
    found += _self_block(c, layer)
  found += _norm(f'{ROOT}/layer_norm', 'norm', D)
  return found + _linear(f'{ROOT}/~/logits', 'logits', (D,), (V,))


def _self_block(c: ModelConfig, layer: int) -> list[Leaf]:
  D = c.width
  block = f'{ROOT}/~/self_attention{f"_{layer}" if layer else ""}'
  found = _norm(f'{block}/layer_norm', 'layers/norm', D)
  found += _norm(f'{block}/layer_norm_1', 'layers/mlp_norm', D)
  found += _attention(c, block, 'layers', c.num_self_heads, D, D)
  found += _mlp(c, block, 'layers', c.mlp_width)
  return [dataclasses.replace(leaf, layer=layer) for leaf in found]


def _plain(name: str, path: str, shape: tuple[int, ...]) -> Leaf:
  return Leaf(
    name=name,
    shape=shape,
    path=path,
    layer=None,
    our_shape=shape,
    num_heads=0,
    num_pairs=0,
  )


def _norm(name: str, path: str, width: int) -> list[Leaf]:
  return [
    _plain(f'{name}/scale', f'{path}/scale', (width,)),
    _plain(f'{name}/offset', f'{path}/bias', (width,)),
  ]


def _linear(
  name: str, path: str, inputs: tuple[int, ...], outputs: tuple[int, ...]
) -> list[Leaf]:
  w = _plain(f'{name}/w', f'{path}/kernel', (*inputs, *outputs))
  b = _plain(f'{name}/b', f'{path}/bias', outputs)
  num_in, num_out = math.prod(inputs), math.prod(outputs)
  return [
    dataclasses.replace(w, shape=(num_in, num_out)),
    dataclasses.replace(b, shape=(num_out,)),
  ]


def _attention(
  c: ModelConfig,
  block: str,
  path: str,
  num_heads: int,
  query_width: int,
  key_width: int,
) -> list[Leaf]:
  name, path = f'{block}/attention/linear', f'{path}/attention'
  heads = (num_heads, key_width // num_heads)
  turned = [
    *_linear(name, f'{path}/query', (query_width,), heads),
    *_linear(f'{name}_1', f'{path}/key', (key_width,), heads),
  ]
  if c.position_encoding == 'rotary':
    turned = [
      dataclasses.replace(
        leaf,
        num_heads=int(c.rotary_head_fraction * num_heads),
        num_pairs=int(heads[1] * c.rotary_fraction / 2),
      )
      for leaf in turned
    ]
  return [
    *turned,
    *_linear(f'{name}_2', f'{path}/value', (key_width,), heads),
    *_linear(f'{name}_3', f'{path}/out', heads, (c.width,)),
  ]


def _mlp(c: ModelConfig, block: str, path: str, hidden: int) -> list[Leaf]:
  name = f'{block}/dense/linear'
  return [
    *_linear(name, f'{path}/mlp/up', (c.width,), (hidden,)),
    *_linear(f'{name}_1', f'{path}/mlp/down', (hidden,), (c.width,)),
  ]


# Conversion.


def convert(
  weights: Mapping[str, np.ndarray], c: ModelConfig
) -> dict[str, Any]:
  """Our parameters, from exactly the weights that they need.

  Raises:
    UserError: a weight is missing, unknown, misshapen or not finite, or the
      table of fixed positions is not of sinusoids; the sentence names it.
  """
  wanted = leaves(c)
  tables = []
  if c.position_encoding == 'sinusoidal':
    tables = [table_name(axis) for axis in range(len(c.position_sizes))]
  _check_names(set(weights), [leaf.name for leaf in wanted] + tables)
  for name in tables:
    _check_table(name, weights[name], c.embed_width)
  _check_arrays(weights, wanted)
  rows = collections.defaultdict(list)
  for leaf in wanted:
    rows[leaf.path].append((leaf, leaf.convert(weights[leaf.name])))
  return nest(
    {
      path: np.stack([array for _, array in parts])
      if parts[0][0].layer is not None
      else parts[0][1]
      for path, parts in rows.items()
    }
  )


def _check_names(found: set[str], wanted: list[str]) -> None:
  for names, what, remedy in (
    (set(wanted) - found, 'missing', 'give a complete file'),
    (found - set(wanted), 'not part of the model', 'remove it'),
  ):
    if names:
      raise UserError(f'weight {_listed(sorted(names))} is {what}; {remedy}')


def _listed(items: list[str]) -> str:
  more = len(items) - _NUM_NAMED
  shown = ', '.join(items[:_NUM_NAMED])
  return f'{shown} and {more} more' if more > 0 else shown


def _check_arrays(
  weights: Mapping[str, np.ndarray], wanted: Sequence[Leaf]
) -> None:
  misshapen = [
    f'{leaf.name} is {weights[leaf.name].shape} and not {leaf.shape}'
    for leaf in wanted
    if weights[leaf.name].shape != leaf.shape
  ]
  if misshapen:
    raise UserError(
      f'weight {_listed(misshapen)}; give weights of one model, and its own '
      'sizes'
    )
  for leaf in wanted:
    check_numbers(f'weight {leaf.name}', weights[leaf.name])


def check_numbers(name: str, array: np.ndarray) -> None:
  if array.dtype.kind != 'f' or not np.isfinite(array).all():
    what = array.dtype if array.dtype.kind != 'f' else 'not finite everywhere'
    raise UserError(f'{name} is {what}; it must hold finite floats')


def _check_table(name: str, table: np.ndarray, width: int) -> None:
  if table.ndim != 2 or table.shape[1] != width:
    raise UserError(
      f'weight {name} is {table.shape} and not (positions, {width}); give '
      'weights of one model, and its own sizes'
    )
  check_numbers(f'weight {name}', table)
  # The rates of models/positions.py, and as precise as they are there.
  half = width // 2
  rates = np.exp(-np.arange(half) * np.log(10_000.0) / (half - 1))
  angles = np.arange(len(table))[:, None] * rates
  expected = np.concatenate([np.sin(angles), np.cos(angles)], axis=1)
  off = np.abs(table - expected).max(initial=0)
  if off > _TABLE_TOLERANCE:
    raise UserError(
      f'weight {name} is not the table of sinusoids, from which it differs by '
      f'up to {off:.1e}; import it as learned positions if it was learned'
    )
