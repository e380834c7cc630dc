"""Piano performances to the events of Performance RNN, and back.

The events are those that Music Transformer and Perceiver AR were trained on:
NOTE_ON and NOTE_OFF of every pitch, TIME_SHIFT of 10 ms to 1 s, VELOCITY of 32
bins. The 308 of them know the 88 keys of a piano, the 388 every MIDI pitch.
"""

import dataclasses
import hashlib
from collections.abc import Sequence

import numpy as np

from perceiver_ar.data import midi, note_pairs, tokens
from perceiver_ar.data.midi import Notes
from perceiver_ar.errors import UserError

VOCABULARIES = (388, 308)
PIANO = (21, 108)  # its lowest and its highest key
STEPS_PER_SECOND = 100
_NUM_SHIFTS = 100  # steps, at most, in one TIME_SHIFT
_NUM_BINS = 32
_VELOCITIES_PER_BIN = 4
_UNSAID_BIN = 25  # of notes before any VELOCITY: mezzo-forte
_MOST_VOICES = 64  # that a pitch can have at once
_TICKS_PER_STEP = 10  # of files that we write, unless they need finer ones
_FINEST_TICKS = 650


@dataclasses.dataclass(frozen=True)
class Events:
  """Where in a vocabulary each kind of event begins."""

  num_events: int

  @property
  def lowest(self) -> int:
    return 0 if self.num_events == 388 else PIANO[0]

  @property
  def num_pitches(self) -> int:
    return 128 if self.num_events == 388 else PIANO[1] - PIANO[0] + 1

  @property
  def note_off(self) -> int:
    return self.num_pitches

  @property
  def shift(self) -> int:
    """Of TIME_SHIFT(1)."""
    return 2 * self.num_pitches

  @property
  def velocity(self) -> int:
    """Of the VELOCITY of bin 1."""
    return self.shift + _NUM_SHIFTS


@dataclasses.dataclass(frozen=True, eq=False)
class Decoded:
  """The notes of any events, and what had to be mended for that.

  Times are whole ticks. They differ within a step, so that the notes of a step
  keep their order.
  """

  notes: Notes
  num_repairs: int
  ticks_per_step: int


def encode(notes: Notes, num_events: int) -> np.ndarray:
  """The events [T] of a performance, from 0 on."""
  check(notes, num_events)
  events = Events(num_events)
  order_N = np.lexsort((notes.pitch_N, notes.start_N))
  start_N = _steps(notes.start_N[order_N])
  end_N = _steps(notes.end_N[order_N])
  end_N += end_N == start_N
  pitch_N = notes.pitch_N[order_N] - events.lowest
  bin_N = (notes.velocity_N[order_N] - 1) // _VELOCITIES_PER_BIN
  step_E = np.concatenate([start_N, end_N])
  is_off_E = np.repeat([False, True], len(notes))
  note_E = np.tile(np.arange(len(notes)), 2)
  order_E = np.lexsort((is_off_E, note_E, step_E))
  step_E, is_off_E = step_E[order_E], is_off_E[order_E]
  pitch_E, bin_E = pitch_N[note_E[order_E]], bin_N[note_E[order_E]]
  gap_E = np.diff(step_E, prepend=0)
  num_shifts_E = -(-gap_E // _NUM_SHIFTS)
  is_new_E = np.zeros(len(step_E), bool)
  is_new_E[~is_off_E] = np.diff(bin_E[~is_off_E], prepend=-1) != 0
  last_E = np.cumsum(num_shifts_E + is_new_E + 1) - 1
  size = int(last_E[-1]) + 1 if len(last_E) else 0
  # Shifts of a second, wherever nothing else comes to stand.
  ids_T = np.full(size, events.velocity - 1, np.int32)
  ids_T[last_E] = pitch_E + events.note_off * is_off_E
  ids_T[last_E[is_new_E] - 1] = events.velocity + bin_E[is_new_E]
  at_E = (last_E - is_new_E - 1)[gap_E > 0]
  ids_T[at_E] = events.shift + (gap_E[gap_E > 0] - 1) % _NUM_SHIFTS
  return ids_T


def _steps(second_N: np.ndarray) -> np.ndarray:
  return (second_N * STEPS_PER_SECOND + 0.5).astype(np.int64)


def check(notes: Notes, num_events: int) -> None:
  """Raises a UserError if these are not notes that `encode` takes."""
  events = Events(num_events)
  if not len(notes):
    raise UserError('there are no notes in it; leave it out')
  lowest, highest = int(notes.pitch_N.min()), int(notes.pitch_N.max())
  last = events.lowest + events.num_pitches - 1
  if lowest < events.lowest or highest > last:
    pitch = lowest if lowest < events.lowest else highest
    raise UserError(
      f'pitch {pitch} is outside {events.lowest} to {last}, the keys of a '
      'piano; the vocabulary of 388 events has them (--vocabulary=388)'
    )


def augment(notes: Notes, stretch: float, transpose: int) -> Notes | None:
  """Slower or faster, higher or lower; None where a piano has no such key."""
  pitch_N = notes.pitch_N + transpose
  if transpose and (pitch_N.min() < PIANO[0] or pitch_N.max() > PIANO[1]):
    return None
  return dataclasses.replace(
    notes,
    start_N=notes.start_N * stretch,
    end_N=notes.end_N * stretch,
    pitch_N=pitch_N,
  )


class _Decoder:
  """Notes as (step, pitch, velocity), from events in any order."""

  def __init__(self, events: Events):
    self._events = events
    self._velocity: int | None = None
    self._pairing = note_pairs.Pairing()
    self.step = 0
    self.rows: list[tuple[int, int, int]] = []
    self.num_repairs = 0

  def add(self, event: int) -> None:
    events = self._events
    if not 0 <= event < events.num_events:
      self.num_repairs += 1
    elif event < events.note_off:
      self._strike(event + events.lowest)
    elif event < events.shift:
      self._release(event - events.note_off + events.lowest)
    elif event < events.velocity:
      self._wait(event - events.shift + 1)
    else:
      self._velocity = (event - events.velocity) * _VELOCITIES_PER_BIN + 1

  def end_steps(self) -> list[int]:
    """When each note ends: those that nothing ends, with the last event."""
    self._pairing.finish()
    self.num_repairs += self._pairing.num_disordered
    end_of = self._pairing.end_of
    for note, (start, _, _) in enumerate(self.rows):
      self.num_repairs += end_of.get(note, start) == start
    return [end_of.get(note, self.step) for note in range(len(self.rows))]

  def _strike(self, pitch: int) -> None:
    if self._pairing.num_open(pitch) == _MOST_VOICES:
      self.num_repairs += 1
      return
    if self._velocity is None:
      self.num_repairs += 1
      self._velocity = (_UNSAID_BIN - 1) * _VELOCITIES_PER_BIN + 1
    self._pairing.begin(pitch, len(self.rows))
    self.rows.append((self.step, pitch, self._velocity))

  def _release(self, pitch: int) -> None:
    if self._pairing.num_open(pitch):
      self._pairing.end(pitch, self.step)
    else:
      self.num_repairs += 1

  def _wait(self, steps: int) -> None:
    self._pairing.wait()
    if self.step + steps > midi.MAX_SECONDS * STEPS_PER_SECOND:
      self.num_repairs += 1
    else:
      self.step += steps


def decode(ids: Sequence[int] | np.ndarray, num_events: int) -> Decoded:
  """Notes of any events; of what `encode` made, such that it makes it again.

  Repairs are events out of place (a NOTE_OFF without a note or before one of an
  older note, notes without a length, without an end or without a velocity), and
  ids that are none. Without repairs, what `encode` made comes back exactly; in
  a few of noise, much denser than any performance, it takes some.
  """
  decoder = _Decoder(Events(num_events))
  for event in np.asarray(ids, np.int64).tolist():
    decoder.add(event)
  end_N = np.array(decoder.end_steps(), np.int64)
  start_N, pitch_N, velocity_N = (
    np.array(decoder.rows, np.int64).reshape(-1, 3).T
  )
  is_long_N = end_N > start_N
  start_N, end_N = start_N[is_long_N], end_N[is_long_N]
  pitch_N, velocity_N = pitch_N[is_long_N], velocity_N[is_long_N]
  offset_N = _offsets(start_N, pitch_N)
  finest = _FINEST_TICKS // 2 - 1
  crowded = int((offset_N > finest).sum())
  offset_N = np.minimum(offset_N, finest)
  # Within half a step, so that all of it is still rounded to this step.
  ticks_per_step = max(_TICKS_PER_STEP, 2 * int(offset_N.max(initial=0)) + 2)
  per_second = ticks_per_step * STEPS_PER_SECOND
  notes = Notes(
    (start_N * ticks_per_step + offset_N) / per_second,
    end_N * ticks_per_step / per_second,
    pitch_N.astype(np.int32),
    velocity_N.astype(np.int32),
  )
  return Decoded(notes, decoder.num_repairs + crowded, ticks_per_step)


def _offsets(start_N: np.ndarray, pitch_N: np.ndarray) -> np.ndarray:
  """Ticks after its step for each note that does not sort after the last."""
  if not len(start_N):
    return start_N
  is_first_N = np.diff(start_N, prepend=-1) > 0
  is_later_N = ~is_first_N & (np.diff(pitch_N, prepend=-1) <= 0)
  count_N = np.cumsum(is_later_N)
  group_N = np.cumsum(is_first_N) - 1
  return count_N - count_N[is_first_N][group_N]


class MusicCodec:
  """Standard MIDI files as events, each three higher."""

  forbidden: tuple[int, ...] = (tokens.PAD, tokens.SOS)
  suffix = '.mid'
  file = ''
  model = b''

  def __init__(self, num_events: int):
    if num_events not in VOCABULARIES:
      raise UserError(
        f'--vocabulary={num_events} is unknown; it must be 388 or 308'
      )
    self.num_events = num_events
    self.kind = f'events{num_events}'
    self.vocab_size = num_events + tokens.NUM_RESERVED
    about = f'{num_events}: note_on, note_off, time_shift, velocity; + 3'
    self.sha256 = hashlib.sha256(about.encode()).hexdigest()

  def read(self, data: bytes) -> np.ndarray:
    return self.encode(midi.read(data))

  def write(self, ids: Sequence[int] | np.ndarray) -> tuple[bytes, int]:
    decoded = self.decode(ids)
    ticks_per_second = decoded.ticks_per_step * STEPS_PER_SECOND
    return midi.write(decoded.notes, ticks_per_second), decoded.num_repairs

  def encode(self, notes: Notes) -> np.ndarray:
    return encode(notes, self.num_events) + tokens.NUM_RESERVED

  def decode(self, ids: Sequence[int] | np.ndarray) -> Decoded:
    return decode(self._events(ids), self.num_events)

  def seconds(self, ids: Sequence[int] | np.ndarray) -> float:
    """How long these events last."""
    shift_T = self._events(ids) - Events(self.num_events).shift + 1
    is_shift_T = (shift_T >= 1) & (shift_T <= _NUM_SHIFTS)
    return float(shift_T[is_shift_T].sum()) / STEPS_PER_SECOND

  def _events(self, ids: Sequence[int] | np.ndarray) -> np.ndarray:
    ids_T = np.asarray(ids, np.int64)
    is_reserved_T = (ids_T >= 0) & (ids_T < tokens.NUM_RESERVED)
    return ids_T[~is_reserved_T] - tokens.NUM_RESERVED
