"""The mirrored copy task: noise, then the same noise backwards.

Nothing is downloaded or prepared: every sequence is generated. What counts is
`second_half` in the evaluation: the first half is noise, and costs ln 256. It
is scored in blocks of all latents; the published code scores one token at a
time, each behind all latents (--stride=1), which takes N times as long.

    perceiver-ar train --config=configs/copy_task.py:copy_32 --workdir=RUN

:tiny         A dozen steps of a toy model in seconds, to see that all works:
              perceiver-ar train --config=configs/copy_task.py:tiny \
                  --workdir=/tmp/tiny
:copy_32      Published, 32 tokens, 1 layer: 100 % of the second half. How
              many steps is not published: 25,000 as for the long one.
              26,776,835 parameters; the published 26,810,627 count a
              constant table of sines, which is computed here.
:copy_131072  Published, 131,072 tokens, 6 layers, batch 4,096: 100 % of the
              second half after 25,000 steps (paper, section 5.1).
              89,757,955 parameters; the published 223,976,707 count a
              constant table of sines, which is computed here.
:copy_8192    The paper's table 2, which sweeps latents against batch size;
              it gives neither depth nor width: those of copy_131072.
:demo_64      What `make demo-copy` trains on 2 CPU cores, one after the other,
:demo_128     each beginning with the parameters of the one before: copies of
:demo_256     64 to 1,024 tokens whose mirror stands at the same position, so
:demo_512     that what is learned of positions holds when they grow.
:demo         The last of them, 1,024 tokens: all 51,200 tokens of the second
              halves of 100 held-out copies.
              perceiver-ar train --config=configs/copy_task.py:demo \
                  --config.checkpoint.init_from=RUN_OF_512 --workdir=RUN
:small        4,096 tokens, to go on from :demo for an hour on 2 CPU cores; no
              result yet.
"""

from ml_collections import ConfigDict

from configs import default, published

_PUBLISHED = {'copy_32': 32, 'copy_8192': 8192, 'copy_131072': 131_072}
# Lengths and steps: as many as it takes to learn each on top of the last.
_DEMO = {
  'demo_64': (64, 500),
  'demo_128': (128, 150),
  'demo_256': (256, 100),
  'demo_512': (512, 150),
  'demo': (1024, 900),
  'small': (4096, 1200),
}


def get_config(arg: str = 'tiny') -> ConfigDict:
  if arg == 'tiny':
    return _tiny()
  if arg in _PUBLISHED:
    return _published(_PUBLISHED[arg])
  if arg in _DEMO:
    return _demo(*_DEMO[arg])
  known = ', '.join(['tiny', *_PUBLISHED, *_DEMO])
  raise ValueError(f'configs/copy_task.py has {known}, not {arg!r}')


def _copies(c: ConfigDict, length: int) -> ConfigDict:
  c.data.kind = 'copy'
  c.data.copy_length = length
  c.data.min_crop = length // 2
  c.model.context_length = length
  c.model.position_encoding = 'sinusoidal'
  return c


def _published(length: int) -> ConfigDict:
  c = _copies(published.get_config(), length)
  c.model.position_sizes = (length,)  # the last token is never an input
  c.model.num_latents = min(length // 2, 1024)
  c.model.num_layers = 1 if length == 32 else 6
  # As many as have a million tokens in their second halves, as published.
  c.data.num_eval_documents = 1_000_000 // (length // 2)
  c.train.num_steps = 25_000
  c.train.batch_size = 1024 if length == 32 else 4096
  c.optimizer.schedule = 'cosine'
  c.optimizer.warmup_steps = 1_000
  c.optimizer.decay_end = 25_000
  c.evaluate.stride = c.model.num_latents
  # Of the long ones by the command only: each takes 128 passes over all of it.
  c.evaluate.every = 1_000 if length == 32 else 0
  c.evaluate.batch_size = 64
  c.evaluate.max_examples = 64
  c.sample.length = length // 2
  return c


def _demo(length: int, num_steps: int) -> ConfigDict:
  c = _copies(default.get_config(), length)
  c.data.min_crop = length  # always whole: all targets are of the second half
  c.data.copy_offset = (4096 - length) // 2
  c.model.position_sizes = (4096,)
  c.data.num_eval_documents = 100
  c.model.num_latents = length // 2
  c.model.num_layers = 1
  c.model.width = 128
  c.model.num_cross_heads = c.model.num_self_heads = 1
  c.model.dropout_rate = 0.0
  c.train.num_steps = num_steps
  c.train.batch_size = min(4096 // length, 32)
  c.optimizer.learning_rate = 1e-3
  c.optimizer.warmup_steps = 100 if length == 64 else 20
  if length >= 1024:  # the last of them; the others are gone on from
    c.optimizer.schedule = 'cosine'
    c.optimizer.learning_rate = 1.5e-3
    # Without it queries and keys go on to know their tokens a little, and now
    # and then two tokens that agree outdo the position that is asked for.
    c.optimizer.name = 'adamw'
    c.optimizer.weight_decay = 1.0
  c.evaluate.batch_size = 20
  c.sample.length = length // 2
  return c


def _tiny() -> ConfigDict:
  c = _copies(default.get_config(), 32)
  c.data.num_eval_documents = 16
  c.model.num_latents = 16
  c.model.num_layers = 1
  c.model.width = 32
  c.model.num_cross_heads = c.model.num_self_heads = 4
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
