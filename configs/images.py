r"""Images as rasters: one sub-pixel after the other, each a byte.

First prepare what you have (see tools/prepare_image.py --help), then train:

    python tools/prepare_image.py --input=FOLDER_OF_TARS --output=DIR
    perceiver-ar train --config=configs/images.py:imagenet64 \
        --config.data.path=DIR --workdir=RUN
    perceiver-ar evaluate --workdir=RUN

:imagenet64             Published: 60 layers, learned positions (column, row,
                        channel), batch 2,048; 750,000 steps at a constant rate
                        that ends in a cosine over the last 50,000. 3.40 bits
                        per dimension on van den Oord's validation split;
                        another edition gives other numbers, see `variant`.
                        770,094,339 parameters.
:imagenet64_rgb         The paper's comparison of orders (table 5), 16 layers
                        and 30,000 steps: 3.54.
:imagenet64_rgb_planes  The same with all R, then all G, then all B (data from
                        tools/prepare_image.py --order=planes): 3.53.
:imagenet64_rgb_1024    With 1,024 inputs only: 3.55,
:imagenet64_planes_1024 and 4.63: with little context a strange order hurts.
                        (From memory, but for 3.54: check before quoting.)
:demo                   What `make demo-images` trains on 2 CPU cores: tiles of
                        photographs, 2,300 steps, to 4.11 bits per
                        dimension on 24 held-out ones (PNG: 3.97).
:small                  An hour on 2 CPU cores; no result yet.
"""

from ml_collections import ConfigDict

from configs import default, published


def get_config(arg: str = 'small') -> ConfigDict:
  configs = {
    'imagenet64': _imagenet64,
    'imagenet64_rgb': lambda: _order(12_416),
    'imagenet64_rgb_planes': lambda: _order(12_416),
    'imagenet64_rgb_1024': lambda: _order(1024),
    'imagenet64_planes_1024': lambda: _order(1024),
    'demo': _demo,
    'small': _small,
  }
  if arg not in configs:
    raise ValueError(f'configs/images.py has {", ".join(configs)}, not {arg!r}')
  return configs[arg]()


def _imagenet64() -> ConfigDict:
  c = published.get_config()
  c.model.context_length = 12_416  # 97 * 128, for tiles; 12,288 are used
  c.model.num_layers = 60
  c.model.position_encoding = 'learned'
  c.model.position_sizes = (66, 66, 5)  # column, row, channel
  c.data.visits = 'once'
  c.train.num_steps = 750_000
  c.optimizer.schedule = 'cosine'
  c.optimizer.decay_start = 700_000
  c.evaluate.batch_size = c.evaluate.max_examples = 256  # a row for each chip
  c.sample.length = 12_288
  return c


def _order(context_length: int) -> ConfigDict:
  c = _imagenet64()
  c.model.context_length = context_length
  c.model.num_layers = 16
  c.train.num_steps = 30_000
  c.optimizer.schedule = 'constant'
  c.optimizer.decay_start = c.optimizer.warmup_steps
  return c


def _demo() -> ConfigDict:
  c = default.get_config()
  c.model.context_length = 576  # three rows
  c.model.num_latents = 384
  c.model.num_layers = 2
  c.model.width = 96
  c.model.num_cross_heads = c.model.num_self_heads = 2
  c.model.dropout_rate = 0.0
  # How far back a pixel lies matters more here than where it is.
  c.model.position_source = 'from_end'
  c.model.attention_block = 576
  c.model.scan_unroll = 2
  c.train.num_steps = 2300
  c.train.batch_size = 4
  c.optimizer.learning_rate = 4e-3
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 100
  c.optimizer.b2 = 0.98
  c.checkpoint.save_every = 500
  c.evaluate.every = 1000
  c.evaluate.max_examples = 2
  c.evaluate.batch_size = 32
  c.evaluate.stride = 288
  c.sample.length = 12_288
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
  c.evaluate.batch_size = 4
  c.evaluate.stride = 256
  return c
