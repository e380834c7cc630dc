"""Turns published weights into a workdir that can be evaluated and sampled.

  python tools/import_official.py --npz=FILE --workdir=DIR --check
  python tools/import_official.py --pickle=FILE --workdir=DIR \\
      --context_length=8192 --position_source=data

--npz: weights `p/MODULE/LEAF`, a `config` in JSON, and perhaps inputs, which
become a small data set in DIR/data, and outputs, which --check compares with
ours. --pickle: a checkpoint, nested dicts of module -> leaf -> array; only
numpy arrays are read from it, so it cannot run anything.

What neither shapes nor the file tell comes from the flags below, whose
defaults are the published ones; a flag cannot contradict the file.

--check prints JSON: `logits` and `loss` are largest differences, `total_loss`
is relative to the sum of the losses, `gradients` to the largest gradient; null
is what the file does not have. Beyond `tolerance` nothing is imported and the
exit status is 1; it is 2 where the file cannot be used at all.
"""

import argparse
import dataclasses
import hashlib
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import official_check
import official_config
import official_data
import official_files
import official_weights
from flax import linen as nn
from official_files import Published

from perceiver_ar import checkpoint, workdir
from perceiver_ar.config import Config
from perceiver_ar.data import tokens
from perceiver_ar.errors import UserError
from perceiver_ar.models.perceiver_ar import PerceiverAR


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
  """What a workdir keeps of a data set."""

  fingerprint: str
  codec: tokens.Codec
  layout: dict[str, Any]


def main(argv: Sequence[str] | None = None) -> int:
  args = _parse(argv)
  try:
    return _run(args)
  except UserError as error:
    print(f'import_official: {error}', file=sys.stderr)
    return 2


def _run(args: argparse.Namespace) -> int:
  if args.output and not args.check:
    raise UserError(
      f'--output={args.output} is for the result of --check; give that as well'
    )
  if args.npz:
    published = official_files.read_npz(Path(args.npz))
  else:
    published = official_files.read_pickle(Path(args.pickle))
  flags = {key: getattr(args, key) for key in official_config.DEFAULTS}
  given = {key: value for key, value in flags.items() if value is not None}
  config, params, notes = load(published, given)
  for note in notes:
    _say(note)
  if args.check and not _check(published, config, params, args.output):
    _say(f'nothing is written to {args.workdir}: the check failed')
    return 1
  write(published, config, params, Path(args.workdir).absolute())
  return 0


def load(
  published: Published, flags: dict[str, Any]
) -> tuple[Config, Any, list[str]]:
  """The config, the parameters, and notes for the user."""
  config, notes = official_config.make_config(published, flags)
  flat = official_weights.convert(published.weights, config.model)
  params = jax.tree.map(jnp.asarray, flat)
  expected = _abstract_params(config)
  found = jax.tree.map(lambda x: (x.shape, x.dtype), params)
  assert found == jax.tree.map(lambda x: (x.shape, x.dtype), expected)
  kinds = {str(array.dtype) for array in published.weights.values()}
  if kinds != {'float32'}:
    notes.append(f'weights of {", ".join(sorted(kinds))} become float32')
  return config, params, [*published.notes, *notes]


def _abstract_params(config: Config) -> Any:
  model, one = config.model, jnp.int32(1)
  tokens_BM = jax.ShapeDtypeStruct((1, model.context_length), one.dtype)
  positions_BMP = jax.ShapeDtypeStruct(
    (*tokens_BM.shape, len(model.position_sizes)), one.dtype
  )
  init = lambda key, tokens_BM, positions_BMP: PerceiverAR(model).init(
    key, tokens_BM, positions_BMP, num_latents=model.num_latents
  )
  boxed = jax.eval_shape(init, jax.random.key(0), tokens_BM, positions_BMP)
  return nn.unbox(boxed)['params']


def _check(
  published: Published, config: Config, params: Any, output: str
) -> bool:
  if wrong := official_check.inconsistency(published):
    _say(wrong)
  examples = official_data.read(published, config.model)
  result = official_check.compare(published, config.model, params, examples)
  line = json.dumps(result)
  print(line)
  if output:
    try:
      Path(output).write_text(line + '\n')
    except OSError as error:
      raise UserError(
        f'--output={output} cannot be written ({error.strerror}); choose '
        'another file'
      ) from error
  return result['ok']


def write(
  published: Published, config: Config, params: Any, folder: Path
) -> None:
  """Writes config, data and a checkpoint at step 0.

  A workdir that has this import already is completed; any other is refused.
  """
  _check_free(folder, params)
  data, path = _write_data(published, config, folder / 'data')
  config = dataclasses.replace(
    config, data=dataclasses.replace(config.data, path=path)
  )
  workdir.begin(folder, config, data)
  with checkpoint.Checkpoints(folder, config.checkpoint) as checkpoints:
    checkpoints.save(0, {'params': params}, config=config, loss=None)
  count = official_config.num_weights(published.weights)
  _say(f'{folder} holds the model of {published.path}, {count:,} numbers')


def _check_free(folder: Path, params: Any) -> None:
  steps = checkpoint.saved_steps(folder) if folder.exists() else []
  if not steps:
    return
  if 0 in steps:
    device = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    abstract = jax.tree.map(
      lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), params
    )
    _, saved = checkpoint.restore_params(folder, abstract, 0)
    same = jax.tree.map(lambda a, b: bool((a == b).all()), saved, params)
    if jax.tree.all(same):
      return
  raise UserError(
    f'{folder} holds checkpoints of another model; choose another --workdir'
  )


def _write_data(
  published: Published, config: Config, folder: Path
) -> tuple[_Data, str]:
  """The data set of the file's inputs; its path is '' if they make none."""
  model = config.model
  codec = official_data.codec(model)
  examples = official_data.read(published, model)
  try:
    documents = official_data.documents(examples)
    assert examples is not None
    layout = official_data.layout(examples, model)
  except UserError as error:
    _say(f'no data set is written: {error}')
    content = published.path.read_bytes()
    data = _Data(
      fingerprint=hashlib.sha256(content).hexdigest(),
      codec=codec,
      layout=official_data.unknown_layout(model),
    )
    return data, ''
  manifest = official_data.write(folder, documents, layout, codec)
  data = _Data(fingerprint=manifest.fingerprint, codec=codec, layout=layout)
  return data, str(folder)


def _say(message: str) -> None:
  """On stderr: the output is for programs."""
  print(message, file=sys.stderr)


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  add = parser.add_argument
  source = parser.add_mutually_exclusive_group(required=True)
  source.add_argument('--npz', help='file with weights, config and inputs')
  source.add_argument('--pickle', help='file with a checkpoint')
  add('--workdir', required=True, help='folder to write, as `train` would')
  add('--check', action='store_true', help='compare with the outputs, first')
  add('--output', default='', help='file for the JSON of --check')
  add('--context_length', type=int, help='M (1024)')
  add('--num_latents', type=int, help='N (1024)')
  add('--num_cross_heads', type=int, help='of the cross-attend (16)')
  add('--num_self_heads', type=int, help='of the other layers (16)')
  add(
    '--position_encoding',
    choices=('rotary', 'sinusoidal', 'learned'),
    help='rotary, or absolute with a fixed or a learned table (rotary)',
  )
  add(
    '--position_source',
    choices=('data', 'from_end', 'from_end_negated'),
    help="the document's own, or counted back from the last token (data)",
  )
  add('--rotary_fraction', type=float, help='of the channels of a head (0.5)')
  add('--rotary_head_fraction', type=float, help='of the heads (1.0)')
  add('--rotary_max_wavelength', type=int, help='(the context length)')
  return parser.parse_args(argv)


if __name__ == '__main__':
  sys.exit(main())
