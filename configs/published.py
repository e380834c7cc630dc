"""What all published experiments share; the other files start from here.

From the paper (arXiv 2202.07765) and its code: width 1,024, 16 heads, Adam at
3e-4 with 10,000 steps of warm-up, the gradient of the sum clipped to 1, z-loss
1e-4, dropout 0.1. The paper says neither how many chips nor how many hours;
what it computed in is float32. `train.num_microbatches` and the mesh are yours:
they change neither data nor result.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = '') -> ConfigDict:
  if arg:
    raise ValueError(f'configs/published.py takes no argument, not {arg!r}')
  c = default.get_config()
  c.model.width = 1024
  c.model.num_cross_heads = c.model.num_self_heads = 16
  c.model.num_latents = 1024
  c.model.remat = 'full'  # of a layer: what it takes in is kept, no more
  c.model.attention_block = 1024
  c.train.num_steps = 1_000_000
  c.train.batch_size = 2048
  c.optimizer.warmup_steps = 10_000
  c.checkpoint.save_every = 1_000
  c.evaluate.every = 10_000
  c.evaluate.max_examples = 64
  c.evaluate.batch_size = 64
  c.evaluate.stride = 512  # half of N, as published
  return c
