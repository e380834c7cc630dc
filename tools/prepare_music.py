"""Turns piano performances into a data set that the trainer reads.

  python tools/prepare_music.py --input=MAESTRO --output=DATA

MAESTRO is an edition of that collection, as the downloaded zip or its folder,
with its published splits; or any folder or zip of MIDI files. If that has a
folder train/, the folders train/, validation/ and test/ are the splits and the
rest is ignored; where there is no validation/, some are held out by their
names. Every performance is one document: SOS, its events, EOS. With --augment,
the training split has each of them at five speeds in seven keys.

  python tools/prepare_music.py --print_tokens FILE.mid [--vocabulary=308]

prints number and checksum of a file's events, to compare with other encoders.
"""

import argparse
import dataclasses
import hashlib
import json
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

import encoded_parts
import music_sources
import numpy as np
import preparation
import source_files

from perceiver_ar.data import layouts, midi, music, tokens
from perceiver_ar.errors import UserError

_CONFIGS = {
  'maestro-v1.0.0': 'configs/music.py:maestro_v1',
  'maestro-v3.0.0': 'configs/music.py:maestro_v3',
}
_SMALL = 'configs/music.py:small'  # where nothing is published
_STRETCHES = (0.95, 0.975, 1.0, 1.025, 1.05)
_TRANSPOSES = (-3, -2, -1, 0, 1, 2, 3)
_AS_PLAYED = (1.0, 0)
_PER_PART = len(_STRETCHES) * len(_TRANSPOSES)  # one piece, or many as played


@dataclasses.dataclass(frozen=True)
class Encoder:
  """A performance, as played or changed, as a document."""

  num_events: int

  def __call__(self, item: encoded_parts.Item) -> encoded_parts.Document | None:
    path, name, kind, stretch, transpose = item.source
    is_as_played = (stretch, transpose) == _AS_PLAYED
    try:
      notes = music_sources.read_notes(path, name, kind, item.stamp)
      music.check(notes, self.num_events)
    except UserError:
      if is_as_played:
        raise
      return None  # a bad file is rejected once, not in every key
    if not is_as_played:
      changed = music.augment(notes, stretch, transpose)
      if changed is None:
        return None
      notes = changed
    events_T = music.encode(notes, self.num_events)
    tokens_T = events_T + tokens.NUM_RESERVED
    return encoded_parts.Document(
      np.concatenate([[tokens.SOS], tokens_T, [tokens.EOS]]),
      {'events': len(events_T), 'notes': len(notes)},
    )


def main(argv: Sequence[str] | None = None) -> int:
  argv = sys.argv[1:] if argv is None else argv
  if any(arg.split('=')[0] == '--print_tokens' for arg in argv):
    return preparation.run('prepare_music', lambda: _print_tokens(argv))
  args = _parse(argv)
  return preparation.run('prepare_music', lambda: prepare(args))


def prepare(args: argparse.Namespace) -> None:
  """Finds the performances, encodes them and says what there is."""
  preparation.check_apart(args.input, args.output)
  codec = music.MusicCodec(args.vocabulary)
  found = music_sources.find(args.input, args.held_out)
  for note in found.notes:
    print(note)
  manifest = preparation.prepare(
    _items(found, augment=args.augment),
    Encoder(codec.num_events),
    output=args.output,
    kind='music',
    variant=found.variant,
    codec=codec,
    positions=layouts.INDEX,
    job={},
    unit='performances',
    per_part=_PER_PART,
    workers=args.workers,
    strict=args.strict,
    num_files=len(found.split_of),
    published={},
  )
  preparation.summary(manifest, args.output)
  edition = found.variant.removesuffix(source_files.PARTIAL)
  command = [
    f'perceiver-ar train --config={_CONFIGS.get(edition, _SMALL)}',
    shlex.quote(f'--config.data.path={args.output}'),
  ]
  if codec.num_events != music.VOCABULARIES[0]:
    command.append(f'--config.model.vocab_size={codec.vocab_size}')
  print('Next:', *command, '--workdir=runs/music')


def _items(
  found: music_sources.Performances, *, augment: bool
) -> list[encoded_parts.Item]:
  """The variants of a piece stand together, so that it is read once."""
  items = []
  for split in ('train', 'validation', 'test'):
    for file in sorted(f for f, s in found.split_of.items() if s == split):
      name = file.removeprefix(found.folder)
      stamp = found.place.stamp(file)
      for stretch, transpose in _variants(augment and split == 'train'):
        items.append(
          encoded_parts.Item(
            name=_variant_name(name, stretch, transpose),
            split=split,
            source=[*found.place.source(file), stretch, transpose],
            stamp=stamp,
          )
        )
  return items


def _variants(augment: bool) -> list[tuple[float, int]]:
  if not augment:
    return [_AS_PLAYED]
  return [(s, t) for s in _STRETCHES for t in _TRANSPOSES]


def _variant_name(name: str, stretch: float, transpose: int) -> str:
  if (stretch, transpose) == _AS_PLAYED:
    return name
  return f'{name} x{stretch:g} {transpose:+d}'


def _print_tokens(argv: Sequence[str]) -> None:
  parser = argparse.ArgumentParser(description='Events of one MIDI file.')
  parser.add_argument('--print_tokens', required=True, type=Path)
  _add_vocabulary(parser)
  args = parser.parse_args(argv)
  path = args.print_tokens
  try:
    data = path.read_bytes()
  except OSError as error:
    raise UserError(
      f'{path} cannot be read ({error.strerror}); check the name'
    ) from error
  try:
    notes = midi.read(data)
    events_T = music.encode(notes, args.vocabulary)
  except UserError as error:
    raise UserError(f'{path}: {error}') from error
  about = {
    'file': str(path),
    'num_notes': len(notes),
    'num_tokens': len(events_T),
    'sha256_int32_le': hashlib.sha256(
      events_T.astype('<i4').tobytes()
    ).hexdigest(),
  }
  print(json.dumps(about))


def _parse(argv: Sequence[str]) -> argparse.Namespace:
  parser = argparse.ArgumentParser(
    description=__doc__, formatter_class=argparse.RawTextHelpFormatter
  )
  parser.add_argument(
    '--input', required=True, type=Path, help='folder or zip of MIDI files'
  )
  preparation.add_arguments(parser)
  _add_vocabulary(parser)
  parser.add_argument(
    '--augment',
    action='store_true',
    help='train at five speeds (95%% to 105%%) in seven keys (-3 to +3)',
  )
  parser.add_argument(
    '--held_out',
    type=float,
    help='share in the split validation, where there is none '
    f'({source_files.HELD_OUT})',
  )
  return parser.parse_args(argv)


def _add_vocabulary(parser: argparse.ArgumentParser) -> None:
  parser.add_argument(
    '--vocabulary',
    type=int,
    choices=music.VOCABULARIES,
    default=music.VOCABULARIES[0],
    help='events: of all 128 pitches, 388, or of the 88 keys, 308 (388)',
  )


if __name__ == '__main__':
  sys.exit(main())
