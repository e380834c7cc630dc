"""Books: whole texts, predicted byte by byte or subword by subword.

First prepare a folder of text files (see tools/prepare_text.py --help):
    python tools/prepare_text.py --input=FOLDER_OF_TXT --output=DIR

:demo   What `make demo` trains, on 2 CPU cores: 3,200 steps in 2.5 minutes,
        to 2.35 bits per byte on the 4 books that it holds out.
        perceiver-ar train --config=configs/books.py:demo \
            --config.data.path=DIR --workdir=WORKDIR
:small  An hour on 2 CPU cores (a step takes 1.05 s); no result yet.
"""

from ml_collections import ConfigDict

from configs import default


def get_config(arg: str = 'small') -> ConfigDict:
  if arg == 'demo':
    return _demo()
  if arg == 'small':
    return _small()
  raise ValueError(f'configs/books.py has demo and small, not {arg!r}')


def _demo() -> ConfigDict:
  c = default.get_config()
  c.model.context_length = 256
  c.model.num_latents = 128
  c.model.num_layers = 3
  c.model.width = 96
  c.model.num_cross_heads = c.model.num_self_heads = 3
  c.model.dropout_rate = 0.0  # not one epoch: nothing is seen twice
  c.model.attention_block = 128
  c.model.scan_unroll = 3
  # Many small steps beat few large ones in so little time.
  c.train.num_steps = 3200
  c.train.batch_size = 4
  c.optimizer.learning_rate = 3e-3
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 100
  c.optimizer.b2 = 0.98
  c.checkpoint.save_every = 400
  c.evaluate.every = 400
  c.evaluate.max_examples = 1
  c.evaluate.batch_size = 32
  c.evaluate.stride = 64
  c.sample.length = 1000
  c.sample.temperature = 0.8
  return c


def _small() -> ConfigDict:
  c = _demo()
  c.model.context_length = 2048
  c.model.num_latents = 512
  c.model.num_layers = 5
  c.model.width = 192
  c.model.num_cross_heads = c.model.num_self_heads = 6
  c.model.attention_block = 512
  c.model.scan_unroll = 1
  c.train.num_steps = 3400
  c.optimizer.learning_rate = 2e-3
  c.optimizer.warmup_steps = 200
  c.evaluate.every = 1000
  c.evaluate.batch_size = 4
  c.evaluate.stride = 512
  c.evaluate.max_examples = 4
  return c
