r"""Books and articles: whole texts, byte by byte or subword by subword.

First prepare what you have (see tools/prepare_text.py --help), then train:

    python tools/prepare_text.py --input=PG19 --output=DIR \
        --vocabulary=sentencepiece --vocab_size=32000
    perceiver-ar train --config=configs/books.py:pg19 \
        --config.data.path=DIR --workdir=RUN
    perceiver-ar evaluate --workdir=RUN --split=test

:pg19         Published: 60 layers, inputs of width 4,096 with 128 heads of 32,
              2,048 inputs of which 1/32 are kept while training; 200,000 steps
              of 2,048. Word perplexity 45.9 on validation, 28.9 on test.
              974,205,184 parameters with 32,000 subwords.
:pg19_4096    The same with 4,096 inputs: 29.0 on test.
              Not in the paper: which dropout (0.875 to 0.96875) goes with
              which length; the vocabulary file.
:wikitext103  Word perplexity 18.25 on test with 4,096 inputs, 17.58 at best on
              validation. Not found in the paper: depth, batch, dropout and
              embeddings. What is here (18 layers, plain embeddings) is our
              guess: 305,949,952 parameters, against 358 million there.
:books        36 layers, on a private collection of 4 million books: perplexity
              14.56 with 16,384 inputs, 14.88 with 1,024; 8,192 here.
              532,681,984 parameters.
:books_60     60 layers, 8,192 inputs: 12.66. 834,991,360 parameters; the paper
              has 750 to 826 million, so its width or vocabulary is another.
:long         Our own, for pods: 36 layers of width 2,048, 65,536 inputs, in
              bfloat16; 256 sequences a step fit 64 chips of v5p. Weights are
              split over 16 of them only: in groups of 64 XLA gathers by
              sums of zeros.
              1,998,564,608 parameters. Nobody has trained it yet.
:long_1m      The same with 1,048,576 inputs, split over 16 chips: 512 of v5p.
:demo         What `make demo` trains, on 2 CPU cores: 3,200 steps in 2.5
              minutes, to 2.34 bits per byte on the 4 books that it holds out.
:small        An hour on 2 CPU cores (a step takes 1.05 s); no result yet.
"""

from ml_collections import ConfigDict

from configs import default, published


def get_config(arg: str = 'small') -> ConfigDict:
  configs = {
    'pg19': lambda: _pg19(2048, kept=1 / 32),
    'pg19_4096': lambda: _pg19(4096, kept=1 / 32),
    'wikitext103': _wikitext103,
    'books': lambda: _books(36),
    'books_60': lambda: _books(60),
    'long': lambda: _long(65_536, batch_size=256, context=4),
    'long_1m': lambda: _long(1_048_576, batch_size=512, context=16),
    'demo': _demo,
    'small': _small,
  }
  if arg not in configs:
    raise ValueError(f'configs/books.py has {", ".join(configs)}, not {arg!r}')
  return configs[arg]()


def _subwords(context_length: int, num_layers: int) -> ConfigDict:
  c = published.get_config()
  c.model.vocab_size = 32_000
  c.model.context_length = context_length
  c.model.num_layers = num_layers
  return c


def _pg19(context_length: int, kept: float) -> ConfigDict:
  c = _subwords(context_length, 60)
  c.model.embed_width = 4096
  c.model.num_cross_heads = 128
  c.model.num_kept_inputs = int(kept * context_length)
  c.train.num_steps = 200_000
  return c


def _wikitext103() -> ConfigDict:
  c = _subwords(4096, 18)
  c.model.num_kept_inputs = 4096 // 8
  c.train.batch_size = 256
  return c


def _books(num_layers: int) -> ConfigDict:
  return _subwords(8192, num_layers)


def _long(context_length: int, batch_size: int, context: int) -> ConfigDict:
  c = _subwords(context_length, 36)
  c.model.width = 2048
  c.model.dtype = 'bfloat16'
  c.model.remat = 'attention'
  c.model.dropout_rate = 0.0
  c.train.num_steps = 100_000
  c.train.batch_size = batch_size
  c.mesh.context = context
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 2_000
  c.optimizer.b2 = 0.95
  return c


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
