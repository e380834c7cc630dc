"""Configs and small data sets for the tests of `data`."""

import pathlib
import runpy
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pytest

from perceiver_ar import config as config_lib
from perceiver_ar.data import layouts, text, tokens, writer

_DEFAULT = pathlib.Path(__file__).parents[2] / 'configs' / 'default.py'


@pytest.fixture
def make_config() -> Callable[..., config_lib.Config]:
  """`make_config({'data.path': ...})`: a small config with these keys set."""

  def make(changes: dict[str, Any]) -> config_lib.Config:
    raw = runpy.run_path(str(_DEFAULT))['get_config']()
    raw.model.context_length, raw.model.num_latents = 16, 4
    raw.train.num_steps, raw.train.batch_size = 12, 8
    raw.update_from_flattened_dict(changes)
    return config_lib.resolve(raw)

  return make


@pytest.fixture
def write_data(tmp_path: pathlib.Path) -> Callable[..., pathlib.Path]:
  """`write_data(lengths)`: a data set with documents of so many tokens.

  Token t of document d is 3 + (7 * d + t) % 256, between SOS and EOS.
  """

  def write(
    lengths: Sequence[int],
    positions: dict[str, Any] = layouts.INDEX,
    name: str = 'prepared',
  ) -> pathlib.Path:
    codec = text.ByteCodec()
    path = tmp_path / name
    with writer.Writer(
      path, kind='text', variant='', codec=codec, positions=positions
    ) as target:
      for split in ('train', 'validation'):
        for d, length in enumerate(lengths):
          noise = 3 + (7 * d + np.arange(length - 2)) % 256
          target.add(
            split,
            np.concatenate([[tokens.SOS], noise, [tokens.EOS]]),
            name=f'{d}.txt',
            counts={'bytes': length - 2, 'words': d},
          )
    return path

  return write
