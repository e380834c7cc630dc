"""The first losses of a run are the ones they were.

Not compared bit by bit: another CPU has other vector widths, sums in another
order and rounds differently. A change of the numerics is far larger.
"""

import dataclasses
import pathlib
import runpy

import jax
import numpy as np
from tiny import CONFIGS

from perceiver_ar import config as config_lib
from perceiver_ar import partitioning, train_step
from perceiver_ar.data import pipeline

_FILE = pathlib.Path(__file__).parent / 'golden' / 'tiny_losses.txt'


def _losses():
  """Of configs/copy_task.py:tiny, its dropout and its data included."""
  get_config = runpy.run_path(str(CONFIGS / 'copy_task.py'))['get_config']
  raw = get_config('tiny')
  raw.optimizer.decay_end, raw.train.num_steps = raw.train.num_steps, 10
  config = config_lib.resolve(raw)
  assert config.model.dropout_rate > 0
  one = dataclasses.replace(config.mesh, data=1)
  mesh = partitioning.make_mesh(one, jax.devices()[:1])
  documents = pipeline.open_documents(
    config.data, 'train', seed=config.train.seed
  )
  batches = pipeline.train_batches(
    config, documents, first_step=0, rows_b=range(config.train.batch_size)
  )
  state = train_step.init_state(config, mesh)
  step = train_step.make_train_step(config, mesh)
  losses = []
  for batch in batches:
    batch = partitioning.global_batch(batch, mesh, config.train.batch_size)
    state, sums = step(state, batch)
    losses.append(float(sums['loss'] / sums['num_targets']))
  return losses


def test_the_first_losses_are_the_golden_ones():
  golden = [float.fromhex(line) for line in _FILE.read_text().split()]
  losses = _losses()
  if losses != golden:
    # To be written to the file, and to the changelog, if meant.
    print('\n'.join(loss.hex() for loss in losses))
  np.testing.assert_allclose(losses, golden, rtol=1e-5)
