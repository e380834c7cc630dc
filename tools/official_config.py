"""The config of an imported model: from its weights, its file and flags.

Shapes tell the widths and the number of layers. Of the rest, what the file
says holds; a flag fills what it does not say, and the published defaults fill
what is left.
"""

import runpy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import official_weights
from official_files import Published

from perceiver_ar import config as config_lib
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError

DEFAULTS: dict[str, Any] = {
  'context_length': 1024,
  'num_latents': 1024,
  'num_cross_heads': 16,
  'num_self_heads': 16,
  'position_encoding': 'rotary',
  'position_source': 'data',
  'rotary_fraction': 0.5,
  'rotary_head_fraction': 1.0,
  'rotary_max_wavelength': None,  # the context length
}
"""Settings that shapes cannot tell, as published."""

# Keys of the file's config: their type, and the key of ours with that value.
_KEYS: dict[str, tuple[type, str | None]] = {
  'vocab': (int, 'vocab_size'),
  'm': (int, 'context_length'),
  'n': (int, 'num_latents'),
  'layers': (int, 'num_layers'),
  'width': (int, 'width'),
  'embed': (int, 'embed_width'),
  'cross_heads': (int, 'num_cross_heads'),
  'heads': (int, 'num_self_heads'),
  'frac': (float, 'rotary_fraction'),
  'frac_heads': (float, 'rotary_head_fraction'),
  'wavelength': (int, 'rotary_max_wavelength'),
  'idx': (list, None),
  'pos': (str, None),
  'pe': (str, None),
  'learn': (bool, None),
  'data_pos': (bool, None),
  'neg': (bool, None),
}


def make_config(
  published: Published, flags: Mapping[str, Any]
) -> tuple[Config, list[str]]:
  """The config, and notes for the user on what was not used.

  Args:
    published: what the file holds.
    flags: values of keys of `DEFAULTS`; the file must not have these as well.
  """
  raw = _checked(published)
  told = _told(raw, published)
  for key in flags:
    if key in told:
      raise UserError(
        f'--{key}={flags[key]} is for what a file does not tell, and '
        f'{published.path} has {key} {told[key]}; leave the flag out'
      )
  shapes = official_weights.sizes(published.weights)
  if 'idx' in raw:
    shapes['position_sizes'] = tuple(raw['idx'])
  model = DEFAULTS | shapes | dict(flags) | told
  if model['rotary_max_wavelength'] is None:
    model['rotary_max_wavelength'] = model['context_length']
  if model['position_encoding'] == 'rotary':
    model['position_sizes'] = (0,)
  elif model['position_encoding'] == 'sinusoidal':
    model['position_sizes'] = (0,) * len(model['position_sizes'])
  _check_model(model, published.path)
  notes = []
  if unused := sorted(set(published.config) - set(_KEYS)):
    notes.append(f'config keys that are not used: {", ".join(unused)}')
  if has_fixed_tables(published, model['position_encoding']):
    notes.append(
      'its position tables were fixed; training from here would change them'
    )
  return _resolve(model), notes


def has_fixed_tables(published: Published, position_encoding: str) -> bool:
  """Whether tables that we hold as parameters were constants there."""
  return position_encoding == 'learned' and not published.config.get(
    'learn', True
  )


def _checked(published: Published) -> dict[str, Any]:
  """The known keys of the file's config, of their own types."""
  found = {}
  for key, (kind, _) in _KEYS.items():
    value = published.config.get(key)
    if value is None:
      continue
    number = isinstance(value, int | float) and not isinstance(value, bool)
    if kind in (int, float) and number and kind(value) == value:
      value = kind(value)
    ids = isinstance(value, list) and all(type(i) is int for i in value)
    if type(value) is not kind or (kind is list and not (value and ids)):
      expected = 'list of int' if kind is list else kind.__name__
      raise UserError(
        f'{published.path}: config key {key} is {value!r}; it must be a '
        f'{expected}'
      )
    found[key] = value
  return found


def _told(raw: Mapping[str, Any], published: Published) -> dict[str, Any]:
  """What the file says, by the names of `ModelConfig`."""
  told = {
    name: raw[key] for key, (_, name) in _KEYS.items() if name and key in raw
  }
  inputs, logits = (published.examples.get(k) for k in ('inputs', 'logits'))
  if 'm' not in raw and inputs is not None and inputs.ndim == 2:
    told['context_length'] = inputs.shape[1]
  if 'n' not in raw and logits is not None and logits.ndim == 3:
    told['num_latents'] = logits.shape[1]
  if 'pos' in raw:
    told['position_encoding'] = _encoding(raw, published.path)
  if 'data_pos' in raw:
    told['position_source'] = _source(raw)
  return told


def _encoding(raw: Mapping[str, Any], path: Path) -> str:
  if raw['pos'] == 'rotary':
    return 'rotary'
  if raw['pos'] != 'absolute':
    raise UserError(
      f'{path}: config key pos is {raw["pos"]!r}; it must be rotary or absolute'
    )
  for key in ('pe', 'learn'):
    if key not in raw:
      raise UserError(
        f'{path}: config key {key} is missing; absolute positions need pe '
        '(the table) and learn (whether it is trained)'
      )
  # Of a learned table pe is only how it began.
  is_computed = raw['pe'] == 'sinusoidal' and not raw['learn']
  return 'sinusoidal' if is_computed else 'learned'


def _source(raw: Mapping[str, Any]) -> str:
  if raw['data_pos']:
    return 'data'  # whatever neg says, as published
  is_rotary = raw.get('pos', 'rotary') == 'rotary'
  return 'from_end_negated' if is_rotary and raw.get('neg') else 'from_end'


def _check_model(model: Mapping[str, Any], path: Path) -> None:
  for width, heads in (
    ('embed_width', 'num_cross_heads'),
    ('width', 'num_self_heads'),
  ):
    if model[heads] < 1 or model[width] % model[heads]:
      raise UserError(
        f'{path}: {heads} {model[heads]} does not divide {width} '
        f"{model[width]} of the weights; give the model's own with --{heads}"
      )
  if (model['position_encoding'], model['position_source']) == (
    'learned',
    'from_end',
  ) and model['position_sizes'][0] < model['context_length']:
    raise UserError(
      f'{path}: its learned positions have {model["position_sizes"][0]} rows, '
      f'and counted from the end a context of {model["context_length"]} needs '
      'as many; give a context length that it has rows for'
    )


def _resolve(model: Mapping[str, Any]) -> Config:
  """`configs/default.py` with this model."""
  default = Path(__file__).parents[1] / 'configs' / 'default.py'
  c = runpy.run_path(str(default))['get_config']()
  c.model.update(model)
  c.sample.refill_latents = max(1, model['num_latents'] // 2)
  return config_lib.resolve(c)


def num_weights(weights: Mapping[str, np.ndarray]) -> int:
  return sum(array.size for array in weights.values())
