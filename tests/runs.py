"""Tiny runs on the copy task, in this process or in one of their own."""

import json
import pathlib
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any

import jax
import numpy as np
import pytest
from states import same
from tiny import make_config

from perceiver_ar import checkpoint, flops, parameters, partitioning
from perceiver_ar.config import Config
from perceiver_ar.data import layouts, text, tokens, writer

ROOT = pathlib.Path(__file__).parents[1]
TINY = f'--config={ROOT}/configs/copy_task.py:tiny'

_COPY = {
  'model.vocab_size': 259,
  'model.num_layers': 1,
  'model.dropout_rate': 0.1,
  'data.kind': 'copy',
  'data.copy_length': 24,
  'data.num_eval_documents': 8,
  'train.num_steps': 6,
  'optimizer.learning_rate': 1e-2,
  'checkpoint.save_every': 2,
  'evaluate.every': 3,
}


def copy_config(**changes: Any) -> Config:
  """`copy_config(train__seed=2)`: a run of a few steps."""
  flat = {key.replace('__', '.'): value for key, value in changes.items()}
  return make_config(_COPY | flat)


@pytest.fixture(scope='module', autouse=True)
def compiled_once(
  tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[pathlib.Path]:
  """Import it into a module whose tests train the same model repeatedly."""
  folder = tmp_path_factory.mktemp('compiled')
  values = {
    'jax_compilation_cache_dir': str(folder),
    'jax_persistent_cache_min_compile_time_secs': 0.1,
  }
  before = {name: getattr(jax.config, name) for name in values}
  for name, value in values.items():
    jax.config.update(name, value)
  yield folder
  for name, value in before.items():
    jax.config.update(name, value)


@pytest.fixture(scope='module', autouse=True)
def one_device() -> Iterator[None]:
  """Import it, too: one device compiles faster, and its speed is known."""
  make_mesh = partitioning.make_mesh
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flops, 'matmul_rate', lambda dtype, size: 1e9)
    patch.setattr(
      partitioning,
      'make_mesh',
      lambda config, devices: make_mesh(config, devices[:1]),
    )
    yield


def start(*words: str) -> subprocess.Popen[str]:
  """`python -m perceiver_ar.main WORDS`, on one device."""
  return subprocess.Popen(
    [sys.executable, '-m', 'perceiver_ar.main', *words],
    stdout=subprocess.PIPE,
    stderr=subprocess.PIPE,
    text=True,
  )


def wait_until(
  is_true: Callable[[], Any], process: Any, seconds: float = 120
) -> None:
  end = time.monotonic() + seconds
  while not is_true():
    assert process.poll() is None, process.communicate()
    assert time.monotonic() < end, 'timed out'
    time.sleep(0.002)


def rows(workdir: pathlib.Path) -> list[dict[str, Any]]:
  """metrics.jsonl without times, which no two runs share."""
  times = ('seconds', 'data_wait')
  path = workdir / 'metrics.jsonl'
  parsed = [json.loads(line) for line in path.read_text().splitlines()]
  return [{k: v for k, v in r.items() if k not in times} for r in parsed]


def final_params(workdir: pathlib.Path, config: Config) -> tuple[int, Any]:
  mesh = partitioning.make_mesh(config.mesh, jax.devices()[:1])
  abstract = parameters.abstract(config, mesh)
  return checkpoint.restore_params(workdir, abstract, None)


def assert_same_run(
  one: pathlib.Path, other: pathlib.Path, config: Config
) -> None:
  assert rows(one) == rows(other)
  (step, params), (last, others) = (
    final_params(folder, config) for folder in (one, other)
  )
  assert step == last
  assert same(params, others)


def write_texts(path: pathlib.Path, first: str) -> pathlib.Path:
  """A prepared data set of one short text."""
  codec = text.ByteCodec()
  with writer.Writer(
    path, kind='text', variant='', codec=codec, positions=layouts.INDEX
  ) as target:
    for split in ('train', 'validation'):
      tokens_T = np.concatenate(
        [[tokens.SOS], codec.encode(first + 'a text' * 20), [tokens.EOS]]
      )
      target.add(split, tokens_T, name='x', counts={'bytes': 121})
  return path


def damage(workdir: pathlib.Path, step: int, how: str) -> None:
  """Flips a bit in the arrays of a checkpoint, or cuts them short."""
  state = workdir / 'checkpoints' / str(step) / 'state'
  for path in state.rglob('d/*'):
    content = bytearray(path.read_bytes())
    if how == 'flipped':
      content[len(content) // 2] ^= 1
    else:
      del content[len(content) // 2 :]
    path.write_bytes(content)


def contents(folder: pathlib.Path) -> dict[str, bytes]:
  return {
    str(path.relative_to(folder)): path.read_bytes()
    for path in folder.rglob('*')
    if path.is_file()
  }
