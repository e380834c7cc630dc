"""The events of Standard MIDI files, read from bytes and written to them."""

import struct
from collections.abc import Iterator
from typing import NamedTuple, TypeAlias

from perceiver_ar.errors import UserError

NOTE_OFF, NOTE_ON, CONTROL, PROGRAM, BEND = 0x80, 0x90, 0xB0, 0xC0, 0xE0
META, TEMPO, _END_OF_TRACK, _TEXT = 0xFF, 0x51, 0x2F, 0x01
_SYSEX = (0xF0, 0xF7)
_LONGEST_DELTA = 2**28 - 1
# Data bytes after each status; those of a whole device are rare in files.
_NUM_DATA = {
  **dict.fromkeys(range(0x80, 0xF0), 2),
  **dict.fromkeys(range(0xC0, 0xE0), 1),
  **{0xF1: 1, 0xF2: 2, 0xF3: 1},
  **dict.fromkeys((0xF6, 0xF8, 0xFA, 0xFB, 0xFC, 0xFE), 0),
}


class Event(NamedTuple):
  """`status` is without its channel; of tempo, `first` is the value."""

  tick: int
  status: int
  channel: int
  first: int
  second: int


# Tick, order among those of a tick, and bytes.
Message: TypeAlias = tuple[int, int, bytes]


def tracks(data: bytes) -> tuple[int, list[bytes]]:
  """Ticks per quarter note, and the contents of the track chunks."""
  if len(data) < 14 or data[:4] != b'MThd':
    raise UserError('this is no MIDI file: it does not begin with MThd')
  size, _, num_tracks, ticks_per_quarter = struct.unpack('>IHHh', data[4:14])
  if ticks_per_quarter <= 0:
    raise UserError(
      'this MIDI file counts time in film frames, not in quarter notes; '
      'convert it with a sequencer, or leave it out'
    )
  chunks: list[bytes] = []
  at = 8 + size
  while len(chunks) < num_tracks:
    kind, length = data[at : at + 4], int.from_bytes(data[at + 4 : at + 8])
    at += 8
    if at > len(data) or at + length > len(data):
      raise UserError(
        f'this MIDI file is cut off in track {len(chunks) + 1} of '
        f'{num_tracks}; get it again, or leave it out'
      )
    if kind == b'MTrk':
      chunks.append(data[at : at + length])
    at += length
  if not chunks:
    raise UserError('this MIDI file has no tracks; leave it out')
  return ticks_per_quarter, chunks


def read(track: bytes) -> list[Event]:
  """What bears on notes in a track; ValueError says what is wrong."""
  try:
    return list(_events(track))
  except IndexError as error:
    raise ValueError('ends in the middle of an event') from error
  except KeyError as error:
    status = error.args[0]
    raise ValueError(f'has an event of unknown status {status:#04x}') from error


def _events(track: bytes) -> Iterator[Event]:
  at = tick = running = 0
  while at < len(track):
    delta, at = _number(track, at)
    tick += delta
    status = track[at]
    if status >= 0x80:
      at += 1
      if status != META:
        running = status
    elif running:
      status = running
    else:
      raise ValueError(f'has no status before data byte {status}')
    if status == META:
      kind = track[at]
      body, at = _body(track, at + 1)
      if kind == TEMPO:
        yield Event(tick, TEMPO, 0, _tempo(body), 0)
    elif status in _SYSEX:
      _, at = _body(track, at)
    else:
      num_data = _NUM_DATA[status]
      values = track[at : at + num_data]
      at += num_data
      if len(values) < num_data:
        raise IndexError
      if num_data and max(values) > 0x7F:
        raise ValueError(f'has data byte {max(values)}, beyond 127')
      if 0x80 <= status < 0xF0:
        yield Event(tick, status & 0xF0, status & 0x0F, values[0], values[-1])


def _number(track: bytes, at: int) -> tuple[int, int]:
  """A number of seven bits a byte, and where it ends."""
  number = 0
  for _ in range(4):
    byte = track[at]
    at += 1
    number = number << 7 | byte & 0x7F
    if byte < 0x80:
      return number, at
  raise ValueError('has a number of more than four bytes')


def _body(track: bytes, at: int) -> tuple[bytes, int]:
  size, at = _number(track, at)
  if at + size > len(track):
    raise IndexError
  return track[at : at + size], at + size


def _tempo(body: bytes) -> int:
  tempo = int.from_bytes(body[:3])
  if len(body) < 3 or not tempo:
    raise ValueError('has a tempo of 0 microseconds')
  return tempo


def track_chunk(messages: list[Message]) -> bytes:
  body = bytearray()
  last = 0
  for tick, _, message in sorted(messages, key=lambda message: message[:2]):
    while tick - last > _LONGEST_DELTA:
      body += _variable(_LONGEST_DELTA) + bytes([META, _TEXT, 0])
      last += _LONGEST_DELTA
    body += _variable(tick - last) + message
    last = tick
  body += bytes([0, META, _END_OF_TRACK, 0])
  return b'MTrk' + len(body).to_bytes(4) + bytes(body)


def _variable(number: int) -> bytes:
  groups = [number & 0x7F]
  while number := number >> 7:
    groups.append(number & 0x7F | 0x80)
  return bytes(reversed(groups))
