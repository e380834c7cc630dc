"""The small run that `perceiver-ar drill` disturbs; it brings its own data.

  perceiver-ar drill --all

A job of 1, 2, 3 or 4 processes with a device each makes 16 steps of it in a
second, once they are compiled.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = '') -> ConfigDict:
  if arg:
    raise ValueError(f'configs/drill.py takes no argument, not {arg!r}')
  c = default.get_config()
  c.model.context_length = 32
  c.model.num_latents = 16
  c.model.num_layers = 1
  c.model.width = 48
  c.model.num_cross_heads = c.model.num_self_heads = 4
  c.train.num_steps = 16
  c.train.batch_size = 12
  c.train.max_skipped_steps = 3
  c.train.log_every = 4
  c.optimizer.learning_rate = 1e-2
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 2
  c.checkpoint.save_every = 4
  c.evaluate.every = 8
  return c
