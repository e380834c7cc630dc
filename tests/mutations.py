"""Bad inputs: valid ones broken in many small ways, and noise by a grammar.

All of it follows from a `random.Random`, so a seed gives the same inputs.
"""

import copy
import json
import random
import struct
import zlib
from collections.abc import Callable, Sequence
from typing import Any, TypeAlias

Make: TypeAlias = Callable[[random.Random], bytes]

_BYTES = (0, 1, 0x2F, 0x51, 0x7F, 0x80, 0x90, 0xB0, 0xF0, 0xF7, 0xFE, 0xFF)
_SIZES = (0, 1, 2**7, 2**15 - 1, 2**16 - 1, 2**24, 2**31 - 1, 2**31, 2**32 - 1)
WORDS = (
  *(b'', b'null', b'true', b'NaN', b'Infinity', b'-1', b'0', b'1e999', b'0.5'),
  *(b'"', b'{', b'}', b'[', b']', b',', b':', b'\\u0000', b'\\ud800', b'\xff'),
  *(b'../', b'/etc/passwd', b'..\\', b'\0', b'9' * 25, b'9' * 5000),
  *(b'[' * 3000, b'{"a":' * 3000, b'(' * 300, b'-' * 300, b'\xc2\xb2'),
)
_VALUES: tuple[Any, ...] = (
  *(None, True, False, -1, 0, 1, 3, 2**31, 2**63, 2**64, 10**400, 0.5, -0.0),
  *(float('nan'), float('inf'), 1e308, '', 'a', '..', '../x', '/etc/passwd'),
  *('\0', '\ud800', 'x' * 3000, [], [[]], [0], [[1, 2], [3]], [None], {}),
  *({'kind': 'table', 'rows': [[1]]}, {'': 1}, {'kind': None}),
)


def of_bytes(seeds: Sequence[bytes], words: Sequence[bytes] = ()) -> Make:
  """One of the seeds after one to four small changes, or bytes of no sense."""

  def make(rng: random.Random) -> bytes:
    if rng.random() < 0.1:
      return rng.randbytes(rng.randrange(64))
    data = bytearray(rng.choice(seeds))
    for _ in range(rng.randint(1, 4)):
      _change(data, rng, seeds, words)
    return bytes(data)

  return make


def _change(
  data: bytearray,
  rng: random.Random,
  seeds: Sequence[bytes],
  words: Sequence[bytes],
) -> None:
  at = rng.randrange(len(data) + 1)
  end = min(len(data), at + rng.randrange(1, 17))
  kind = rng.randrange(9 if words else 8)
  if kind == 0 and at < len(data):
    data[at] ^= 1 << rng.randrange(8)
  elif kind == 1 and at < len(data):
    data[at] = rng.choice(_BYTES)
  elif kind == 2:
    del data[at:end]
  elif kind == 3:
    data[at:at] = rng.randbytes(rng.randrange(1, 9))
  elif kind == 4:
    data[at:at] = data[at:end] * rng.randrange(1, 5)
  elif kind == 5:
    data[at : at + 4] = rng.choice(_SIZES).to_bytes(4)
  elif kind == 6:
    del data[at:]
  elif kind == 7:
    other = rng.choice(seeds)
    start = rng.randrange(len(other) + 1)
    data[at:] = other[start:]
  elif kind == 8:
    data[at:end] = rng.choice(words)


def of_json(seeds: Sequence[Any]) -> Make:
  """JSON with one to three of its values, keys or members changed."""
  texts = [json.dumps(seed) for seed in seeds]
  broken = of_bytes([text.encode() for text in texts], WORDS)

  def make(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
      return broken(rng)
    tree = json.loads(rng.choice(texts))
    for _ in range(rng.randint(1, 3)):
      tree = changed(tree, rng)
    return json.dumps(tree).encode()

  return make


def changed(tree: Any, rng: random.Random) -> Any:
  """The tree with another value somewhere; containers are changed in place."""
  if not isinstance(tree, dict | list) or not tree or rng.random() < 0.1:
    return _other(tree, rng)
  keys = list(tree) if isinstance(tree, dict) else range(len(tree))
  key = rng.choice(keys)
  if isinstance(tree, dict) and rng.random() < 0.1:
    tree[rng.choice(('', 'x', '../x', 'kind'))] = tree.pop(key)
  elif rng.random() < 0.05:
    del tree[key]
  else:
    tree[key] = changed(tree[key], rng)
  return tree


def _other(value: Any, rng: random.Random) -> Any:
  """A value that is near, or of no sense."""
  if rng.random() < 0.5:
    return copy.deepcopy(rng.choice(_VALUES))
  if isinstance(value, bool):
    return not value
  if isinstance(value, int):
    return value + rng.choice((-1, 1, value, 100))
  if isinstance(value, float):
    return value * rng.choice((-1.0, 0.5, 2.0, 10.0))
  if isinstance(value, str):
    return value[: rng.randrange(len(value) + 1)] + rng.choice(('', 'x', '/'))
  return []


def of_midi(seeds: Sequence[bytes]) -> Make:
  """Files of chunks that may lie about themselves; and `of_bytes`."""
  broken = of_bytes(seeds)

  def make(rng: random.Random) -> bytes:
    if rng.random() < 0.5:
      return broken(rng)
    bodies = [_track(rng) for _ in range(rng.choice((0, 1, 1, 2, 3)))]
    chunks = [
      (b'MTrk' if rng.random() < 0.98 else rng.randbytes(4))
      + _or_any(len(body), 4, rng)
      + body
      for body in bodies
    ]
    header = b'MThd' + _or_any(6, 4, rng) + _or_any(1, 2, rng)
    header += _or_any(len(bodies), 2, rng) + _or_any(480, 2, rng)
    return header + b''.join(chunks)

  return make


def _or_any(number: int, size: int, rng: random.Random) -> bytes:
  if rng.random() < 0.03:
    number = rng.choice((*_SIZES, rng.randrange(2**32))) % 2 ** (8 * size)
  return number.to_bytes(size)


def _track(rng: random.Random) -> bytes:
  """Events in grammar, most of them; of few pitches, so that they meet."""
  body = bytearray()
  num_kinds = rng.choice((7, 9, 11, 12))
  for _ in range(rng.randrange(30)):
    body += _varint(rng)
    kind = rng.randrange(num_kinds)
    channel = rng.choice((0, 0, 0, 9, 15))
    if kind < 5:
      note = bytes([rng.randrange(60, 63), rng.choice((0, 64, 127))])
      body += bytes([rng.choice((0x80, 0x90, 0x90)) | channel]) + note
    elif kind < 7:
      body += bytes([0xB0 | channel, 64, rng.choice((0, 63, 64, 127))])
    elif kind == 7:
      body += bytes([rng.choice((0xC0, 0xD0)) | channel, 0])
    elif kind == 8:
      body += bytes([0xE0 | channel, 0, 0x40])
    elif kind == 9:
      tempo = rng.choice((0, 1, 500_000, 2**24 - 1))
      body += b'\xff\x51' + rng.choice((b'\x03', _varint(rng)))
      body += tempo.to_bytes(3)
    elif kind == 10:
      content = rng.randbytes(rng.randrange(4))
      about = bytes([0xFF, rng.randrange(256)])
      body += rng.choice((about, b'\xf0', b'\xf7'))
      body += rng.choice((bytes([len(content)]), _varint(rng))) + content
    else:  # perhaps of the running status
      body += rng.randbytes(rng.randrange(1, 4))
  return bytes(body)


def _varint(rng: random.Random) -> bytes:
  return rng.choice(
    (b'\0', b'\0', b'\x10', b'\x60', b'\x83\x60', b'\x81\0')
    + ((b'\xff' * 3 + b'\x7f', b'\xff' * 5) if rng.random() < 0.02 else ())
  )


def of_png(seeds: Sequence[bytes]) -> Make:
  """PNG files with changed chunks, whose checksums mostly are right again."""
  files = [_chunks(seed) for seed in seeds]
  broken = of_bytes(seeds)

  def make(rng: random.Random) -> bytes:
    if rng.random() < 0.3:
      return broken(rng)
    chunks = list(rng.choice(files))
    for _ in range(rng.randint(1, 3)):
      _change_chunk(chunks, rng)
    return seeds[0][:8] + b''.join(png_chunk(*chunk) for chunk in chunks)

  return make


_CHUNKS = (b'IHDR', b'IDAT', b'IEND', b'PLTE', b'tRNS', b'iCCP', b'zTXt')
_MORE_CHUNKS = (*_CHUNKS, b'iTXt', b'acTL', b'fcTL', b'fdAT', b'eXIf', b'pHYs')


def _change_chunk(
  chunks: list[tuple[bytes, bytes]], rng: random.Random
) -> None:
  if not chunks:
    return
  at = rng.randrange(len(chunks))
  kind, payload = chunks[at]
  what = rng.randrange(6)
  if what == 0:
    del chunks[at]
  elif what == 1:
    chunks.insert(rng.randrange(len(chunks) + 1), chunks[at])
  elif what == 2:
    bomb = zlib.compress(bytes(rng.choice((0, 100, 200_000))))
    text = rng.choice((b'a\0\0', b'a\0\1\0\0\0', b'', b'a\0')) + bomb
    chunks.insert(at, (rng.choice(_MORE_CHUNKS), text))
  elif what == 3 and kind == b'IHDR':
    width, height = rng.choice(_SIZES), rng.choice(_SIZES)
    chunks[at] = kind, struct.pack('>II', width, height) + payload[8:]
  else:
    changed = bytearray(payload)
    _change(changed, rng, [payload], ())
    chunks[at] = kind, bytes(changed)


def _chunks(data: bytes) -> list[tuple[bytes, bytes]]:
  chunks, at = [], 8
  while at < len(data):
    size = int.from_bytes(data[at : at + 4])
    chunks.append((data[at + 4 : at + 8], data[at + 8 : at + 8 + size]))
    at += 12 + size
  return chunks


def png_chunk(kind: bytes, payload: bytes) -> bytes:
  checksum = zlib.crc32(kind + payload).to_bytes(4)
  return len(payload).to_bytes(4) + kind + payload + checksum
