"""What the tools read of other people's files, with inputs to be broken."""

import io
import json
import os
import pathlib
import pickle
import random
import sys
import tarfile
import zipfile
from pathlib import Path

import fuzz_parsers
import mutations
import numpy as np

from perceiver_ar.data import midi
from perceiver_ar.errors import UserError

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'tools'))


def _picture(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  import pictures

  path = folder / 'picture'
  formats = ('JPEG', 'BMP', 'PPM', 'TIFF', 'GIF', 'WEBP')
  broken = mutations.of_bytes(
    [fuzz_parsers.saved('RGB', name) for name in formats]
  )
  png = mutations.of_png([fuzz_parsers.saved('RGBA', 'PNG')])

  def make(rng: random.Random) -> bytes:
    return (png if rng.random() < 0.3 else broken)(rng)

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    pixels_HWC = pictures.centre(str(path), 4)
    assert pixels_HWC.shape == (4, 4, 3) and pixels_HWC.dtype == np.uint8

  return make, parse


class _NoProgress:
  """Bars take longer than what is tested."""

  def __init__(self, *about: object):
    del about

  def __enter__(self) -> '_NoProgress':
    return self

  def __exit__(self, *about: object) -> None: ...

  def advance(self, number: int) -> None: ...


def _maestro(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  """The lists of MAESTRO's editions."""
  import music_sources

  del folder
  rows = [
    {'midi_filename': '2004/a.midi', 'split': 'train'},
    {'midi_filename': '2006/b.midi', 'split': 'validation'},
  ]
  columns = {k: {str(i): r[k] for i, r in enumerate(rows)} for k in rows[0]}
  of_json = mutations.of_json([rows, columns])
  table = b'split,midi_filename\ntrain,2004/a.midi\ntest,"2006/b, c.midi"\n'
  of_csv = mutations.of_bytes([table], mutations.WORDS)

  def make(rng: random.Random) -> bytes:
    return (of_json if rng.random() < 0.5 else of_csv)(rng)

  def parse(data: bytes) -> None:
    is_json = data[:1] in (b'[', b'{')
    read = music_sources._json_rows if is_json else music_sources._csv_rows
    for name in music_sources._splits('list', data, read):
      assert not Path(name).is_absolute() and '..' not in Path(name).parts

  return make, parse


def _jsonl(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  """Lines of texts."""
  import text_places

  path = folder / 'a.jsonl'

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    source = ('json', len(data), str(path), 0, len(data), 'text')
    assert text_places.read(source).decode() is not None

  return mutations.of_json([{'text': 'a text'}, 'a text']), parse


def _pickle(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  """Weights, pickled by every protocol."""
  import official_files

  array = np.arange(6, dtype=np.float32).reshape(2, 3)
  tree = {'perceiver_ar/x': {'w': array, 'b': np.asfortranarray(array + 1)}}
  seeds = [pickle.dumps(tree, protocol) for protocol in range(6)]
  path = folder / 'weights'
  words = [
    b'cposix\nsystem\n',
    b'cnumpy\ndtype\n',
    b'R',
    b'b',
    b'0',
    b'\x94',
    b'r\xff\xff\xff\x7f',
    b'\x96' + (2**36).to_bytes(8, 'little'),
    b'(S',
    b'V8',
    b'O',
  ]

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    weights = official_files.read_pickle(path).weights
    assert sum(array.nbytes for array in weights.values()) <= len(data)
    assert all(not a.dtype.hasobject for a in weights.values())

  return mutations.of_bytes(seeds, words), parse


def _npz(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  import official_files

  seeds = []
  for save in (np.savez, np.savez_compressed):
    out = io.BytesIO()
    about = np.array(json.dumps({'m': 4}))
    save(out, **{'p/x/w': np.ones((2, 3), np.float32), 'config': about})
    seeds.append(out.getvalue())
  path = folder / 'weights.npz'

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    weights = official_files.read_npz(path).weights
    assert weights and all(a.nbytes < 2**26 for a in weights.values())

  return mutations.of_bytes(seeds), parse


def _tar(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  """The tar of an edition of ImageNet; what its members name is not read."""
  import image_files
  import imagenet64

  setattr(imagenet64, 'Progress', _NoProgress)  # noqa: B010
  out = io.BytesIO()
  with tarfile.open(fileobj=out, mode='w') as tar:
    for name in ('train_64x64', 'train_64x64/1.png', 'train_64x64/2.png'):
      member = tarfile.TarInfo(name)
      member.size = 5 if name.endswith('.png') else 0
      member.type = tarfile.REGTYPE if member.size else tarfile.DIRTYPE
      tar.addfile(member, io.BytesIO(b'x' * member.size))
  seed = out.getvalue()[: 6 * 512]
  path = folder / 'train_64x64.tar'
  broken = mutations.of_bytes([seed])

  def make(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
      return broken(rng)
    data = bytearray(seed)
    for _ in range(rng.randint(1, 3)):  # in a header, whose sum is right again
      at = 512 * rng.choice((0, 1, 3)) + rng.choice((0, 0, 100, 124, 156, 157))
      field = rng.choice(
        (
          *(b'../x.png\0', b'/x.png\0', b'\xff' * 12, b'\x80' + bytes(11)),
          *(b'1', b'2', b'x', b'L', b'5', b'00000000777\0', rng.randbytes(3)),
        )
      )
      data[at : at + len(field)] = field
    for at in (0, 512, 1536):
      header = data[at : at + 148] + b' ' * 8 + data[at + 156 : at + 512]
      data[at + 148 : at + 156] = b'%06o\0 ' % sum(header)
    return bytes(data)

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    for item in imagenet64._oord_items('train', path):
      assert not Path(item.name).is_absolute() and '..' not in item.name
      _, where, offset, size = item.source
      assert min(offset, size) >= 0 and where == str(path)
      try:
        assert len(image_files.read_bytes(where, offset, size)) <= len(data)
      except UserError:
        assert size > 2**20

  return make, parse


def _zip(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  """A zip of performances, and all that is read of it."""
  import music_sources

  seeds = []
  for how in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', how) as file:
      for name in 'abc':
        file.writestr(f'train/{name}.mid', b'MThd' * 9)
      file.writestr('test/b.mid', b'MThd' * 9)
    seeds.append(out.getvalue())
  path = folder / 'in.zip'

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    os.utime(path, ns=(0, 0))
    music_sources._opened_zip.cache_clear()
    found = music_sources.find(path, None)
    for name in found.split_of:
      assert '..' not in Path(name).parts and not Path(name).is_absolute()
      assert len(found.place.read(name, midi.MAX_BYTES)) <= midi.MAX_BYTES + 1

  return mutations.of_bytes(seeds), parse


def _topology(folder: Path) -> tuple[mutations.Make, fuzz_parsers.Parse]:
  """Chips and their grids, of plans and of launches."""
  sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / 'launch'))
  import tpus

  from perceiver_ar import chips
  from perceiver_ar.plan import machine

  del folder
  words = [*mutations.WORDS, b'x', b'x4', b'0', b'65536', b'v5p']
  seeds = [b'v5p:4x4x8', b'v5e:16x16', b'cpu:8', b'7x:2x2x1', b'tpu7x:4x4x4']

  def parse(data: bytes) -> None:
    text = data.decode(errors='surrogateescape')
    try:
      found = tpus.find_slice(text)
      assert 1 <= found.num_hosts < 4096 and 1 <= found.chips_per_host <= 4
    except tpus.UserError:
      pass
    name, sizes = machine.parsed(text)
    assert all(0 < size < 10**6 for size in sizes) and len(sizes) <= 4
    assert name == 'cpu' or chips.find_chip(name).num_dims

  return mutations.of_bytes(seeds, words), parse


PARSERS: dict[str, fuzz_parsers.Parser] = {
  'picture': _picture,
  'maestro': _maestro,
  'jsonl': _jsonl,
  'pickle': _pickle,
  'npz': _npz,
  'tar': _tar,
  'zip': _zip,
  'topology': _topology,
}
