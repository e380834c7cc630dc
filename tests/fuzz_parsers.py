"""What reads outside input, each with valid inputs that are to be broken."""

import contextlib
import dataclasses
import hashlib
import io
import json
import pathlib
import random
import runpy
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import mutations
import numpy as np
import PIL.Image

from perceiver_ar import config as config_lib
from perceiver_ar.data import (
  codecs,
  image,
  layouts,
  midi,
  music,
  records,
  text,
  tokens,
)

_ROOT = pathlib.Path(__file__).parents[1]
_RASTER = {
  'kind': 'raster',
  'height': 6,
  'width': 9,
  'channels': 3,
  'order': 'rgb',
  'seed': 0,
}

Parse: TypeAlias = Callable[[bytes], None]
Parser: TypeAlias = Callable[[Path], tuple[mutations.Make, Parse]]


def _midi(folder: Path) -> tuple[mutations.Make, Parse]:
  del folder
  notes = midi.Notes(
    np.array([0.0, 0.1, 0.2, 0.5]),
    np.array([0.5, 0.3, 0.4, 0.6]),
    np.array([60, 60, 61, 62]),
    np.array([1, 2, 3, 4]),
  )
  seeds = [midi.write(notes, 1000), midi.write(notes, 65_000)]
  codec = music.MusicCodec(388)

  def parse(data: bytes) -> None:
    notes = midi.read(data)
    assert len(notes) <= len(data)
    assert (notes.start_N >= 0).all() and (notes.end_N >= notes.start_N).all()
    assert ((notes.pitch_N >= 0) & (notes.pitch_N < 128)).all()
    assert ((notes.velocity_N > 0) & (notes.velocity_N < 128)).all()
    ids = codec.encode(notes)
    assert ids.min() >= tokens.NUM_RESERVED and ids.max() < codec.vocab_size

  return mutations.of_midi(seeds), parse


def saved(mode: str, format: str) -> bytes:
  pixels = np.arange(6 * 9 * 3, dtype=np.uint8).reshape(6, 9, 3)
  out = io.BytesIO()
  PIL.Image.fromarray(pixels).convert(mode).save(out, format)
  return out.getvalue()


def _png(folder: Path) -> tuple[mutations.Make, Parse]:
  del folder
  codec = image.ImageCodec(_RASTER)

  def parse(data: bytes) -> None:
    ids = codec.read(data)
    assert len(ids) == 6 * 9 * 3
    assert ids.min() >= tokens.NUM_RESERVED and ids.max() < codec.vocab_size

  return mutations.of_png([saved(m, 'PNG') for m in ('RGB', 'P', 'L')]), parse


def _text(folder: Path) -> tuple[mutations.Make, Parse]:
  del folder
  seeds = ['a line\nand another\r\n', 'Grüße, 世界 🙂\0', '3 4 5', '']
  byte, ids = text.ByteCodec(), text.IdsCodec(100)

  def parse(data: bytes) -> None:
    ids_T = byte.read(data)
    assert byte.write(ids_T) == (data, 0)
    assert (np.diff(ids.read(data)) < 100).all()

  words = [*mutations.WORDS, '٣'.encode(), b' 3 4', b'1' * 19]
  return mutations.of_bytes([s.encode() for s in seeds], words), parse


_SAID = [f'the {n} of a text, in words and {n * n} letters' for n in range(80)]


def _sentencepiece(folder: Path) -> bytes:
  from perceiver_ar.data import subwords

  del folder
  return subwords.train_sentencepiece(_SAID, 290)


def _tokenizer() -> bytes:
  import tokenizers

  tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE())
  level = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
  tokenizer.pre_tokenizer = level
  tokenizer.decoder = tokenizers.decoders.ByteLevel()
  trainer = tokenizers.trainers.BpeTrainer(
    vocab_size=290, show_progress=False, initial_alphabet=level.alphabet()
  )
  tokenizer.train_from_iterator(_SAID, trainer)
  return tokenizer.to_str().encode()


def _subwords(folder: Path) -> tuple[mutations.Make, Parse]:
  """Texts for vocabularies of both libraries."""
  (folder / 'a').write_bytes(_sentencepiece(folder))
  (folder / 'b').write_bytes(_tokenizer())
  both = [
    text.SentencePieceCodec(folder / 'a'),
    text.TokenizersCodec(folder / 'b'),
  ]

  def parse(data: bytes) -> None:
    for codec in both:
      ids_T = codec.read(data)
      assert codec.decode(ids_T) == data.decode()

  seeds = [line.encode() for line in (*_SAID, '<s></s>▁ \ufffd')]
  return mutations.of_bytes(seeds, mutations.WORDS), parse


def _vocabulary(folder: Path) -> tuple[mutations.Make, Parse]:
  """Vocabulary files; what opens reads and writes text."""
  seeds = [_sentencepiece(folder), _tokenizer()]
  path = folder / 'vocabulary'
  kinds = text.SentencePieceCodec, text.TokenizersCodec

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    is_json = data[:1] == b'{'
    codec = kinds[is_json](path)
    ids_T = codec.encode('the 7 of words')
    assert ids_T.min(initial=3) >= 0
    assert ids_T.max(initial=0) < codec.vocab_size
    codec.write(np.arange(min(codec.vocab_size, 400)))

  return mutations.of_bytes(seeds, mutations.WORDS), parse


def _default() -> dict[str, Any]:
  path = _ROOT / 'configs' / 'default.py'
  return runpy.run_path(str(path))['get_config']().to_dict()


def _config(folder: Path) -> tuple[mutations.Make, Parse]:
  """The config.json of a workdir."""
  from perceiver_ar import workdir

  def parse(data: bytes) -> None:
    (folder / 'config.json').write_bytes(data)
    config = config_lib.resolve(workdir.read_config(folder))
    again = config_lib.resolve(json.loads(config.to_json()))
    assert again == config

  return mutations.of_json([_default()]), parse


def _flags(folder: Path) -> tuple[mutations.Make, Parse]:
  """Words of a command line that set keys of a config."""
  from perceiver_ar import config_files

  del folder
  whole = _default()
  # Most by a part of it, which is incomplete: a tenth of the time.
  part = {s: dict(list(whole[s].items())[-4:]) for s in ('model', 'train')}
  seeds = [
    f'--config.{section}.{key}={value}\n'.encode()
    for section, values in (part | {'data': whole['data']}).items()
    for key, value in values.items()
  ]

  def parse(data: bytes) -> None:
    words = data.decode(errors='surrogateescape').split('\n')
    words = [word for word in words if word and '--config=' not in word]
    base = part if zlib.crc32(data) % 20 else whole
    assert isinstance(config_files.resolve(words, base), config_lib.Config)

  return mutations.of_bytes(seeds, mutations.WORDS), parse


_VOCABULARY = dataclasses.asdict(tokens.vocabulary(text.ByteCodec()))
_POSITIONS = (
  layouts.INDEX,
  {'kind': 'index', 'first': 7},
  {'kind': 'table', 'rows': [[1, 2], [3, 4]]},
  _RASTER | {'order': 'permuted', 'seed': 3},
)
_SPLIT = {
  'num_documents': 2,
  'num_rejected': 0,
  'num_tokens': 9,
  'counts': {'bytes': 5},
  'longest': 5,
  'file_size': 10,
  'sha256': '0' * 64,
  'list_sha256': '0' * 64,
}


def _manifest(folder: Path) -> tuple[mutations.Make, Parse]:
  """The manifest of a prepared data set, and what is opened by it."""
  seeds = [
    {
      'version': records.VERSION,
      'kind': 'text',
      'variant': '',
      'vocabulary': _VOCABULARY,
      'positions': positions,
      'dtype': 'uint16',
      'splits': {'train': _SPLIT, 'validation': _SPLIT},
    }
    for positions in _POSITIONS
  ]
  path = folder / records.MANIFEST

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    manifest = records.Manifest.load(folder)
    assert len(manifest.fingerprint) == 64
    layout = layouts.validated(manifest.positions)
    codec = codecs.open_codec(manifest.vocabulary, layout, folder)
    assert codec.vocab_size == manifest.vocabulary.size
    for name in manifest.splits:
      assert records.record_file(folder, name).parent == folder
    _positions_hold(layout)

  return mutations.of_json(seeds), parse


def _positions_hold(layout: dict[str, Any]) -> None:
  most = layouts.max_tokens(layout)
  assert most is None or most < 2**27
  num = min(100, most or 100)
  rows_TP = layouts.positions(layout, np.arange(num))
  assert rows_TP.shape == (num, layouts.num_axes(layout))
  assert rows_TP.min(initial=1) >= 1


def _documents(folder: Path) -> tuple[mutations.Make, Parse]:
  """The list of the documents of a split."""
  about = [
    {'name': 'a', 'num_tokens': 5, 'crc32': 1, 'counts': {'bytes': 3}},
    {'name': 'b', 'num_tokens': 4, 'crc32': 2, 'counts': {'bytes': 2}},
  ]
  one = mutations.of_json(about)
  sound = [json.dumps(line).encode() for line in about]
  path = folder / 'train.jsonl'

  def make(rng: random.Random) -> bytes:
    lines = list(sound)
    lines[rng.randrange(2)] = one(rng)
    return b'\n'.join(lines) + b'\n'

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    # As if the manifest had been written with it.
    written: Any = _SPLIT | {'list_sha256': hashlib.sha256(data).hexdigest()}
    listed = records._read_list(path, records.Split(**written))
    assert listed.num_tokens.min(initial=0) >= 0
    assert all(isinstance(name, str) for name in listed.names)
    assert len(listed.names) == len(listed.num_tokens) == len(listed.crc32)

  return make, parse


def _dataset(folder: Path) -> tuple[mutations.Make, Parse]:
  """The dataset.json of a workdir."""
  from perceiver_ar import workdir

  seeds = [
    {
      'fingerprint': '0' * 64,
      'vocabulary': _VOCABULARY,
      'positions': positions,
    }
    for positions in _POSITIONS
  ]

  def parse(data: bytes) -> None:
    (folder / 'dataset.json').write_bytes(data)
    trained = workdir.read_trained(folder)
    assert isinstance(trained.fingerprint, str)
    _positions_hold(trained.layout)

  return mutations.of_json(seeds), parse


def _step(folder: Path) -> tuple[mutations.Make, Parse]:
  """The manifest of a checkpoint, with a digest that is right."""
  from etils import epath

  from perceiver_ar import saved_step

  manifest = {
    'step': 7,
    'loss': 0.5,
    'arrays': {'params/w': ['float32', [2, 3], '0' * 16]},
    'config_sha256': '0' * 64,
    'versions': {'jax': '0.10.2'},
  }
  make_inner = mutations.of_json([manifest])
  (folder / '7').mkdir()
  path = folder / '7' / '_CHECKPOINT_METADATA'

  def make(rng: random.Random) -> bytes:
    inner = make_inner(rng)
    try:
      inner = json.loads(inner)
    except (ValueError, RecursionError):
      return inner
    about = {'manifest': inner, 'sha256': saved_step.digest(inner)}
    return json.dumps({'custom_metadata': about}).encode()

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    found = saved_step.read_manifest(epath.Path(folder / '7'))
    assert found['step'] == 7 and isinstance(found['config_sha256'], str)
    for dtype, shape, _ in found['arrays'].values():
      assert np.dtype(dtype) is not None and all(n >= 0 for n in shape)

  return make, parse


def _lines(folder: Path) -> tuple[mutations.Make, Parse]:
  """Lines of metrics.jsonl."""
  from etils import epath

  from perceiver_ar import lines

  path = epath.Path(folder / 'metrics.jsonl')
  seeds = [b'{"step": 1, "loss": 2.5}\n{"step": 2, "loss": 2.0}\n']

  def parse(data: bytes) -> None:
    path.write_bytes(data)
    assert all('step' in row for _, row in lines.read(path, 'step'))

  return mutations.of_bytes(seeds, mutations.WORDS), parse


def _place(folder: Path) -> tuple[mutations.Make, Parse]:
  """Addresses of process 0, and what callers say to it."""
  from perceiver_ar import places, roll_call

  del folder
  seeds = [b'10.0.0.1:8476', b'localhost:1', b'[::1]:80', b'a.b-c:65535']
  word = mutations.of_json([{'process': 1, 'of': 4, 'host': 'node7'}])
  address = mutations.of_bytes(seeds, mutations.WORDS)

  def parse(data: bytes) -> None:
    if data[:1] == b'{':
      with contextlib.suppress(ValueError, KeyError, TypeError, RecursionError):
        process, host = roll_call._introduced(json.loads(data), 4)
        assert process in ('1', '2', '3') and isinstance(host, str)
      return
    text = data.decode(errors='surrogateescape')
    place = places.find_place(text, 4, 1, seconds=1)
    host, port = roll_call.parts(place.address)
    assert 0 <= port < 2**16 and isinstance(roll_call.is_loopback(host), bool)

  return lambda rng: (word if rng.random() < 0.5 else address)(rng), parse


PARSERS: dict[str, Parser] = {
  'midi': _midi,
  'png': _png,
  'text': _text,
  'subwords': _subwords,
  'vocabulary': _vocabulary,
  'config': _config,
  'flags': _flags,
  'manifest': _manifest,
  'documents': _documents,
  'dataset': _dataset,
  'step': _step,
  'lines': _lines,
  'place': _place,
}
