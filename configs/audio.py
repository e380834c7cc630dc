r"""Sound as SoundStream's codes: 50 frames a second, 24 to 44 codes each.

Neither SoundStream's model nor the data is public, so there is nothing to
prepare, and no demo. For codes of your own, docs/data.md ("Tokens of your own")
shows how to write a data set: code c of level l is the id 3 + 1024 * l + c.

:soundstream_12kbps        Published: 24 levels, 24,579 ids, 12 layers; 8,192
                           inputs from memory. 215.2 million parameters.
:soundstream_12kbps_65536  65,536 inputs (54 s): 2.49 nats on test, 2.34 on
                           validation.
:soundstream_18kbps_65536  36 levels, 36,867 ids: 2.60 and 2.57.
:soundstream_22kbps        44 levels, 45,059 ids, 32,768 inputs (14 s), 24
                           layers. 408.3 million parameters.
:soundstream_22kbps_65536  2.65 and 2.62.
                           Not found in the paper: which length has how many
                           layers, steps and batch.
"""

from ml_collections import ConfigDict

from configs import published

_LEVELS = {'12kbps': 24, '18kbps': 36, '22kbps': 44}
_EXPERIMENTS = {
  'soundstream_12kbps': ('12kbps', 8192, 12),
  'soundstream_12kbps_65536': ('12kbps', 65_536, 24),
  'soundstream_18kbps_65536': ('18kbps', 65_536, 24),
  'soundstream_22kbps': ('22kbps', 32_768, 24),
  'soundstream_22kbps_65536': ('22kbps', 65_536, 24),
}


def get_config(arg: str = 'soundstream_12kbps') -> ConfigDict:
  if arg not in _EXPERIMENTS:
    raise ValueError(
      f'configs/audio.py has {", ".join(_EXPERIMENTS)}, not {arg!r}'
    )
  rate, context_length, num_layers = _EXPERIMENTS[arg]
  c = published.get_config()
  c.model.vocab_size = 1024 * _LEVELS[rate] + 3
  c.model.context_length = context_length
  c.model.num_layers = num_layers
  return c
