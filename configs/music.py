r"""Piano music: performances as events of Music Transformer's encoding.

First prepare what you have (see tools/prepare_music.py --help), then train:

    python tools/prepare_music.py --input=maestro-v3.0.0-midi.zip --output=DIR
    perceiver-ar train --config=configs/music.py:maestro_v3 \
        --config.data.path=DIR --workdir=RUN
    perceiver-ar evaluate --workdir=RUN --split=test

:maestro_v1  Published: 12 layers, 4,096 inputs, 2,048 latents, 1 cross head
             and 4 heads, 70 % of the inputs dropped, a quarter of the channels
             rotated, rate 1e-4, 1 million steps, no augmentation. 1.82 nats
             per event on test and on validation (Music Transformer: 1.84).
             165.6 million parameters.
:maestro_v3  The same model on the third edition: 1.91 on test, 1.90 on
             validation. Not in the paper: the batch (128 here); the base of
             its logarithms, taken to be e.
:piano       Published: 24 layers, 32,768 inputs, 1,024 latents; 1.2418 on a
             private collection of 10,000 hours. 316.8 million parameters.
:demo        What `make demo-music` trains on 2 CPU cores, on 7 performances:
             2,200 steps, to 3.43 nats per event on the 3 pieces
             that it holds out (a bigram has 4.06).
:small       An hour on 2 CPU cores; no result yet.
"""

from ml_collections import ConfigDict

from configs import default, published

_VOCAB_SIZE = 391  # 388 events and 3 reserved ids


def get_config(arg: str = 'small') -> ConfigDict:
  configs = {
    'maestro_v1': _maestro,
    'maestro_v3': _maestro,
    'piano': _piano,
    'demo': _demo,
    'small': _small,
  }
  if arg not in configs:
    raise ValueError(f'configs/music.py has {", ".join(configs)}, not {arg!r}')
  return configs[arg]()


def _maestro() -> ConfigDict:
  c = published.get_config()
  c.model.vocab_size = _VOCAB_SIZE
  c.model.context_length = 4096
  c.model.num_latents = 2048
  c.model.num_layers = 12
  c.model.num_cross_heads = 1
  c.model.num_self_heads = 4
  c.model.rotary_fraction = 0.25
  c.model.input_dropout_rate = 0.7
  c.train.batch_size = 128
  c.optimizer.learning_rate = 1e-4
  c.evaluate.stride = 1024
  return c


def _piano() -> ConfigDict:
  c = _maestro()
  c.model.context_length = 32_768
  c.model.num_latents = 1024
  c.model.num_layers = 24
  c.evaluate.stride = 512
  return c


def _demo() -> ConfigDict:
  c = default.get_config()
  c.model.vocab_size = _VOCAB_SIZE
  c.model.context_length = 512
  c.model.num_latents = 256
  c.model.num_layers = 3
  c.model.width = 96
  c.model.num_cross_heads = c.model.num_self_heads = 3
  c.model.dropout_rate = 0.1
  c.model.attention_block = 256
  c.model.scan_unroll = 3
  c.train.num_steps = 2200
  c.train.batch_size = 4
  c.optimizer.learning_rate = 3e-3
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 100
  c.optimizer.b2 = 0.98
  c.checkpoint.save_every = 500
  c.evaluate.every = 500
  c.evaluate.max_examples = 1
  c.evaluate.batch_size = 16
  c.evaluate.stride = 128
  c.sample.num_samples = 2
  c.sample.length = 1000
  c.sample.top_p = 0.95
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
  c.model.dropout_rate = 0.2
  c.train.num_steps = 3400
  c.optimizer.learning_rate = 2e-3
  c.evaluate.batch_size = 4
  c.evaluate.stride = 256
  c.sample.length = 4000
  return c
