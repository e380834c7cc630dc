"""The mirrored copy task: noise, then the same noise backwards.

Nothing is downloaded or prepared: every sequence is generated.

:tiny   A dozen steps of a toy model in seconds, to see that all works:
        perceiver-ar train --config=configs/copy_task.py:tiny --workdir=/tmp/x
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = 'tiny') -> ConfigDict:
  c = default.get_config()
  if arg != 'tiny':
    raise ValueError(f'configs/copy_task.py has tiny, not {arg!r}')
  c.data.kind = 'copy'
  c.data.copy_length = 32
  c.data.num_eval_documents = 16
  c.model.context_length = 32
  c.model.num_latents = 16
  c.model.num_layers = 1
  c.model.width = 32
  c.model.num_cross_heads = c.model.num_self_heads = 4
  c.model.position_encoding = 'sinusoidal'
  c.train.num_steps = 12
  c.train.batch_size = 8
  c.optimizer.learning_rate = 1e-2
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 2
  c.checkpoint.save_every = 4
  c.evaluate.every = 4
  c.sample.num_samples = 2
  c.sample.length = 40
  return c
