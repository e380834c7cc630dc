r"""Turns images into a data set that the trainer reads.

  python tools/prepare_image.py --input=FOLDER --output=DATA

The folder holds one of

  ImageNet64 of van den Oord et al. (2016): train_64x64.tar, valid_64x64.tar,
    or what they unpack to. Published results are on this one.
  ImageNet64 of Chrabaszcz et al. (2017): train_data_batch_1 .. 10, val_data,
    as they are, as .npz, or in the downloaded zips. It is smoother, so results
    are better and not comparable. Each worker holds a batch, 1.6 GB (and twice
    that for a moment): lower --workers if memory is short.
  Pictures of any size, at any depth. The largest square in the middle of each
    is reduced to --size by a box filter; or --tiles=STRIDE cuts it into
    squares of --size at full, half and quarter scale. If there is a folder
    train/, the folders train/, validation/ and test/ are the splits and the
    rest is ignored; where there is no validation/, some pictures are held out
    by their names. What is transparent becomes white.

Every image is one document: SOS, and then its sub-pixels, each a byte, in one
of three orders: rgb (row by row, the three channels of a pixel together),
planes (all red, then all green, then all blue), permuted (one order for all
images, shuffled with --order_seed).
"""

import argparse
import dataclasses
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import encoded_parts
import image_files
import imagenet64
import numpy as np
import pictures
import preparation
import source_files

from perceiver_ar.data import image, layouts, tokens
from perceiver_ar.errors import UserError

_PER_PART = 1024
_SIZE = 64
_CONFIGS: dict[str, str] = dict.fromkeys(
  imagenet64.EDITIONS, 'configs/images.py:imagenet64'
)
_SMALL = 'configs/images.py:small'  # where nothing is published


def main(argv: Sequence[str] | None = None) -> int:
  args = _parse(argv)
  return preparation.run('prepare_image', lambda: prepare(args))


def prepare(args: argparse.Namespace) -> None:
  """Finds the images, encodes them and says what there is."""
  _check(args)
  layout = layouts.validated(
    {
      'kind': 'raster',
      'height': args.size or _SIZE,
      'width': args.size or _SIZE,
      'channels': 3,
      'order': args.order,
      'seed': args.order_seed or 0,
    }
  )
  found = _find(args)
  for note in found.notes:
    print(note)
  codec = image.ImageCodec(layout)
  manifest = preparation.prepare(
    found.items,
    _Encoder(codec),
    output=args.output,
    kind='images',
    variant=found.variant,
    codec=codec,
    positions=layout,
    job={},  # the items say how they are cut, the layout the rest
    unit='images',
    per_part=_PER_PART,
    workers=args.workers,
    strict=args.strict,
    num_files=len(found.items),
    published={},
  )
  preparation.summary(manifest, args.output)
  edition = found.variant.removesuffix(source_files.PARTIAL)
  command = [
    f'perceiver-ar train --config={_CONFIGS.get(edition, _SMALL)}',
    shlex.quote(f'--config.data.path={args.output}'),
  ]
  print('Next:', *command, '--workdir=runs/images')


@dataclasses.dataclass(frozen=True)
class _Encoder:
  codec: image.ImageCodec

  def __call__(self, item: encoded_parts.Item) -> encoded_parts.Document:
    ids_T = self._ids(*item.source)
    return encoded_parts.Document(
      np.concatenate([[tokens.SOS], ids_T]), {'dims': len(ids_T)}
    )

  def _ids(self, kind: str, *place: Any) -> np.ndarray:
    if kind == 'png':
      return self.codec.read(image_files.read_bytes(*place))
    if kind == 'row':
      return self.codec.encode(imagenet64.read_row(*place))
    cut = {'centre': pictures.centre, 'tile': pictures.tile}[kind]
    return self.codec.encode(cut(*place, self.codec.shape[0]))


def _parse(argv: Sequence[str] | None) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--input', required=True, type=Path, help='folder with the images'
  )
  preparation.add_arguments(parser)
  parser.add_argument(
    '--order',
    choices=layouts.ORDERS,
    default='rgb',
    help='of the sub-pixels (rgb)',
  )
  parser.add_argument(
    '--order_seed', type=int, help='of the order permuted (0)'
  )
  parser.add_argument(
    '--size', type=int, help=f'side of the images cut from pictures ({_SIZE})'
  )
  parser.add_argument(
    '--tiles',
    type=int,
    metavar='STRIDE',
    help='cut pictures into tiles, one every STRIDE points either way',
  )
  parser.add_argument(
    '--held_out',
    type=float,
    help='share in the split validation, where there is none '
    f'({source_files.HELD_OUT})',
  )
  return parser.parse_args(argv)


def _check(args: argparse.Namespace) -> None:
  if args.order_seed is not None and args.order != 'permuted':
    raise UserError(
      f'--order_seed={args.order_seed} is of --order=permuted only; leave one '
      'of them out'
    )
  for name in ('size', 'tiles'):
    value = getattr(args, name)
    if value is not None and value < 1:
      raise UserError(f'--{name}={value} must be at least 1')
  if not args.input.is_dir():
    raise UserError(f'--input={args.input} is no folder; give one with images')
  preparation.check_apart(args.input, args.output)


def _find(args: argparse.Namespace) -> image_files.Found:
  found = imagenet64.find(args.input)
  if found is None:
    how = pictures.Cut(
      size=args.size or _SIZE,
      tiles=args.tiles,
      held_out=args.held_out,
    )
    return pictures.find(args.input, how)
  for name in ('size', 'tiles', 'held_out'):
    if (value := getattr(args, name)) is not None:
      raise UserError(
        f'--{name}={value} is for pictures, and --input={args.input} holds '
        'ImageNet64 with its own size and splits; leave it out'
      )
  return found


if __name__ == '__main__':
  sys.exit(main())
