"""Standard MIDI files to the notes of a performance, and back.

Notes, times and pedals are those of pretty_midi and note-seq to the last bit,
because results on published performances are compared per event: another
rounding makes other events. Files come from anywhere, so whatever is in them
ends in notes or in one sentence, within bounded memory.
"""

import dataclasses
import struct
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from perceiver_ar.data import midi_events
from perceiver_ar.errors import UserError

MAX_BYTES = 4 * 2**20  # the longest recorded performances have a tenth of it
MAX_SECONDS = 24 * 3600
_MICROSECONDS_PER_QUARTER = 500_000  # what a file says that does not say it
_DRUMS = 9  # a channel
_SUSTAIN = 64  # a controller


@dataclasses.dataclass(frozen=True, eq=False)
class Notes:
  """A performance: seconds, MIDI pitches and velocities of its notes.

  Where notes begin together, their order counts.
  """

  start_N: np.ndarray
  end_N: np.ndarray
  pitch_N: np.ndarray
  velocity_N: np.ndarray

  def __len__(self) -> int:
    return len(self.start_N)


class _Instrument(NamedTuple):
  is_drum: bool
  notes: list[tuple[int, int, int, int]]  # start, end, pitch, velocity
  pedals: list[tuple[int, bool]]  # tick, whether it goes down


def read(data: bytes) -> Notes:
  """The notes of a file, as long as the sustain pedal makes them sound."""
  if len(data) > MAX_BYTES:
    raise UserError(
      f'this MIDI file has more than {MAX_BYTES:,} bytes, which is no '
      'performance; leave it out'
    )
  ticks_per_quarter, chunks = midi_events.tracks(data)
  tempo = [(0, _tick_scale(_MICROSECONDS_PER_QUARTER, ticks_per_quarter))]
  instruments: list[_Instrument] = []
  for number, chunk in enumerate(chunks):
    try:
      events = midi_events.read(chunk)
    except ValueError as error:
      raise UserError(
        f'this MIDI file is corrupt: track {number + 1} of {len(chunks)} '
        f'{error}; get it again, or leave it out'
      ) from error
    if number == 0:
      tempo = _tempo_map(events, tempo, ticks_per_quarter)
    instruments += _instruments(events)
  notes = _sustained(instruments, tempo)
  if len(notes) and notes.end_N.max() > MAX_SECONDS:
    raise UserError(
      f'this MIDI file lasts {notes.end_N.max():,.0f} seconds, and a '
      f'performance at most {MAX_SECONDS:,}; leave it out'
    )
  return notes


# The order of these operations decides the last bit of every time.
def _tick_scale(tempo: int, ticks_per_quarter: int) -> float:
  return 60.0 / ((6e7 / tempo) * ticks_per_quarter)


def _tempo_map(
  events: list[midi_events.Event],
  tempo: list[tuple[int, float]],
  ticks_per_quarter: int,
) -> list[tuple[int, float]]:
  """From which tick on a tick lasts how many seconds."""
  tempo = list(tempo)
  for event in events:
    if event.status != midi_events.TEMPO:
      continue
    scale = _tick_scale(event.first, ticks_per_quarter)
    if event.tick == 0:
      tempo = [(0, scale)]
    elif scale != tempo[-1][1]:
      tempo.append((event.tick, scale))
  return tempo


def _seconds(
  ticks: Sequence[int], tempo: list[tuple[int, float]]
) -> np.ndarray:
  begin_S = np.array([tick for tick, _ in tempo], np.int64)
  scale_S = np.array([scale for _, scale in tempo])
  seconds = [0.0]
  for length, scale in zip(np.diff(begin_S), scale_S, strict=False):
    seconds.append(seconds[-1] + scale * length)
  tick_N = np.array(ticks, np.int64)
  at_N = np.searchsorted(begin_S, tick_N, side='right') - 1
  return np.array(seconds)[at_N] + scale_S[at_N] * (tick_N - begin_S[at_N])


def _instruments(events: list[midi_events.Event]) -> list[_Instrument]:
  """Those of one track, by program and channel, in the order of note ends.

  A note-off ends every open note of its pitch, but not one of its own tick if
  there are others. Controllers from before an instrument's first note belong
  to every later one of their channel.
  """
  instruments: dict[tuple[int, int], _Instrument] = {}
  early: dict[int, list[tuple[int, bool]]] = {}
  open_notes: dict[tuple[int, int], list[tuple[int, int]]] = {}
  programs = [0] * 16
  for tick, status, channel, first, second in events:
    key = (programs[channel], channel)
    if status == midi_events.PROGRAM:
      programs[channel] = first
    elif status == midi_events.NOTE_ON and second:
      open_notes.setdefault((channel, first), []).append((tick, second))
    elif status in (midi_events.NOTE_OFF, midi_events.NOTE_ON):
      notes = open_notes.pop((channel, first), [])
      ended = [note for note in notes if note[0] != tick]
      if ended and len(ended) < len(notes):
        kept = [note for note in notes if note[0] == tick]
        open_notes[channel, first] = kept
      if ended and key not in instruments:
        pedals = early.get(channel, [])
        instruments[key] = _Instrument(channel == _DRUMS, [], pedals)
      for start, velocity in ended:
        instruments[key].notes.append((start, tick, first, velocity))
    elif status in (midi_events.CONTROL, midi_events.BEND):
      if key in instruments:
        pedals = instruments[key].pedals
      else:
        pedals = early.setdefault(channel, [])
      if status == midi_events.CONTROL and first == _SUSTAIN:
        pedals.append((tick, second >= 64))
  return list(instruments.values())


def _sustained(
  instruments: list[_Instrument], tempo: list[tuple[int, float]]
) -> Notes:
  """All notes in one list, each until the pedal lets it go."""
  parts: list[Notes] = []
  pedals: list[np.ndarray] = []
  last = 0.0
  for one in instruments:
    starts, ends, pitches, velocities = zip(*one.notes, strict=True)
    notes = Notes(
      _seconds(starts, tempo),
      _seconds(ends, tempo),
      np.array(pitches, np.int32),
      np.array(velocities, np.int32),
    )
    parts.append(notes)
    pedals.append(_seconds([tick for tick, _ in one.pedals], tempo))
    last = max(last, pedals[-1].max(initial=0))
    if not one.is_drum:
      last = max(last, notes.end_N.max())
  for i, one in enumerate(instruments):
    is_down_P = np.array([is_down for _, is_down in one.pedals], bool)
    if is_down_P.any() and not one.is_drum:
      parts[i] = _sustain(parts[i], pedals[i], is_down_P, last)
  return Notes(
    np.concatenate([np.zeros(0), *(part.start_N for part in parts)]),
    np.concatenate([np.zeros(0), *(part.end_N for part in parts)]),
    _join([part.pitch_N for part in parts]),
    _join([part.velocity_N for part in parts]),
  )


def _join(parts: list[np.ndarray]) -> np.ndarray:
  return np.concatenate([np.zeros(0, np.int32), *parts])


def _sustain(
  notes: Notes, pedal_P: np.ndarray, is_down_P: np.ndarray, last: float
) -> Notes:
  """One instrument's notes, as long as they sound; `last` lets all go.

  At one time the pedal goes first, down before up, and then notes begin before
  notes end. A note that begins under the pedal ends what sounds of its pitch.
  """
  kind_E = np.concatenate(
    [~is_down_P, np.full(len(notes), 2), np.full(len(notes), 3)]
  )
  time_E = np.concatenate([pedal_P, notes.start_N, notes.end_N])
  note_E = np.concatenate([np.full(len(pedal_P), -1), *[range(len(notes))] * 2])
  order_E = np.lexsort((kind_E, time_E))
  ends, pitches = notes.end_N.tolist(), notes.pitch_N.tolist()
  sounding: list[dict[int, float]] = [
    {} for _ in range(128)
  ]  # and their starts
  held: list[int] = []  # by nothing but the pedal, unless struck again since
  dropped: list[int] = []
  is_down = False
  for kind, time, note in zip(
    kind_E[order_E].tolist(),
    time_E[order_E].tolist(),
    note_E[order_E].tolist(),
    strict=True,
  ):
    if kind == 0:
      is_down = True
    elif kind == 1:
      is_down = False
      for one in held:
        if sounding[pitches[one]].pop(one, None) is not None:
          ends[one] = time
      held.clear()
    elif kind == 2:
      alike = sounding[pitches[note]]
      if is_down:
        for one, start in alike.items():
          ends[one] = time
          if start == time:
            dropped.append(one)
        alike.clear()
      alike[note] = time
    elif not is_down:
      sounding[pitches[note]].pop(note, None)
    elif note in sounding[pitches[note]]:
      held.append(note)
  for one in held:
    if one in sounding[pitches[one]]:
      ends[one] = last
  is_kept_N = np.ones(len(notes), bool)
  is_kept_N[dropped] = False
  return Notes(
    notes.start_N[is_kept_N],
    np.array(ends)[is_kept_N],
    notes.pitch_N[is_kept_N],
    notes.velocity_N[is_kept_N],
  )


def write(notes: Notes, ticks_per_second: int) -> bytes:
  """A file of piano notes, at 120 quarter notes a minute.

  A note-off ends all that sounds of a pitch on a track, so notes of one pitch
  that overlap go to tracks of their own.
  """
  ticks_per_quarter = ticks_per_second * _MICROSECONDS_PER_QUARTER // 10**6
  assert 0 < ticks_per_quarter < 2**15
  tempo = bytes(
    [midi_events.META, midi_events.TEMPO, 3]
  ) + _MICROSECONDS_PER_QUARTER.to_bytes(3)
  tracks = [midi_events.track_chunk([(0, 0, tempo)])]
  tracks += [
    midi_events.track_chunk(track) for track in _voices(notes, ticks_per_second)
  ]
  header = struct.pack('>IHHH', 6, 1, len(tracks), ticks_per_quarter)
  return b''.join([b'MThd', header, *tracks])


def _voices(
  notes: Notes, ticks_per_second: int
) -> list[list[midi_events.Message]]:
  """(tick, order within it, message) of tracks without overlapping notes."""
  tracks: list[list[midi_events.Message]] = [[]]
  free: dict[int, list[int]] = {}  # from which tick on, by pitch and track
  start_N = np.rint(notes.start_N * ticks_per_second).astype(np.int64)
  end_N = np.rint(notes.end_N * ticks_per_second).astype(np.int64)
  for i in np.argsort(start_N, kind='stable').tolist():
    start, end = int(start_N[i]), max(int(end_N[i]), int(start_N[i]) + 1)
    pitch, velocity = int(notes.pitch_N[i]), int(notes.velocity_N[i])
    until = free.setdefault(pitch, [])
    voice = next((v for v, tick in enumerate(until) if tick <= start), None)
    if voice is None:
      voice = len(until)
      until.append(0)
    if voice == len(tracks):
      tracks.append([])
    until[voice] = end
    tracks[voice].append(
      (start, 1, bytes([midi_events.NOTE_ON, pitch, velocity]))
    )
    tracks[voice].append((end, 0, bytes([midi_events.NOTE_ON, pitch, 0])))
  return tracks
