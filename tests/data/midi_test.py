"""Files become the notes that the published event sequences were made of."""

import io
import struct

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar.data import midi
from perceiver_ar.errors import UserError

ON, OFF, PEDAL = 'note_on', 'note_off', 'control_change'


def smf(*tracks, ticks_per_quarter=500):
  """Tracks of (tick, message); a tick lasts a millisecond."""
  file = mido.MidiFile(type=1, ticks_per_beat=ticks_per_quarter)
  for events in tracks:
    track = mido.MidiTrack()
    last = 0
    for tick, message in events:
      track.append(message.copy(time=tick - last))
      last = tick
    file.tracks.append(track)
  data = io.BytesIO()
  file.save(file=data)
  return data.getvalue()


def on(pitch, velocity=64, channel=0):
  return mido.Message(ON, note=pitch, velocity=velocity, channel=channel)


def off(pitch, channel=0):
  return mido.Message(OFF, note=pitch, channel=channel)


def pedal(value, channel=0):
  return mido.Message(PEDAL, control=64, value=value, channel=channel)


def tempo(microseconds):
  return mido.MetaMessage('set_tempo', tempo=microseconds)


def rows(data):
  """(start, end, pitch, velocity), times in milliseconds."""
  notes = midi.read(data)
  return [
    (round(start * 1000), round(end * 1000), pitch, velocity)
    for start, end, pitch, velocity in zip(
      notes.start_N, notes.end_N, notes.pitch_N, notes.velocity_N, strict=True
    )
  ]


def test_a_note_off_ends_every_open_note_of_its_pitch():
  data = smf([(0, on(60, 1)), (5, on(60, 2)), (9, off(60)), (12, off(60))])
  assert rows(data) == [(0, 9, 60, 1), (5, 9, 60, 2)]


def test_but_not_one_that_has_just_begun():
  data = smf([(0, on(60, 1)), (5, on(60, 2)), (5, off(60)), (9, off(60))])
  assert rows(data) == [(0, 5, 60, 1), (5, 9, 60, 2)]
  assert rows(smf([(5, on(60)), (5, off(60)), (9, off(60))])) == []


def test_a_note_on_without_velocity_is_a_note_off():
  assert rows(smf([(0, on(60)), (7, on(60, 0))])) == [(0, 7, 60, 64)]


def test_notes_that_never_end_are_left_out():
  assert rows(smf([(0, on(60)), (0, on(61)), (7, off(61))])) == [(0, 7, 61, 64)]


def test_the_pedal_holds_notes_until_it_goes_up():
  data = smf(
    [
      (0, on(60)),
      (2, pedal(64)),
      (5, off(60)),
      (6, on(62)),
      (20, pedal(63)),
      (25, off(62)),
    ]
  )
  assert rows(data) == [(0, 20, 60, 64), (6, 25, 62, 64)]


def test_under_the_pedal_a_new_note_ends_the_older_of_its_pitch():
  data = smf(
    [
      (0, pedal(127)),
      (1, on(60, 1)),
      (5, off(60)),
      (8, on(60, 2)),
      (9, off(60)),
      (30, pedal(0)),
    ]
  )
  assert rows(data) == [(1, 8, 60, 1), (8, 30, 60, 2)]


def test_a_note_struck_twice_at_once_under_the_pedal_is_one():
  data = smf([(0, pedal(127)), (1, on(60, 1)), (1, on(60, 2)), (5, off(60))])
  assert rows(data) == [(1, 5, 60, 2)]


def test_a_pedal_that_stays_down_goes_up_at_the_last_event():
  data = smf(
    [(0, pedal(127)), (1, on(60)), (5, off(60)), (9, on(64)), (40, off(64))]
  )
  assert rows(data) == [(1, 40, 60, 64), (9, 40, 64, 64)]


def test_pedals_belong_to_their_track_and_channel():
  data = smf(
    [(0, pedal(127)), (1, on(60)), (5, off(60)), (30, pedal(0))],
    [(1, on(60)), (5, off(60))],
    [
      (0, pedal(127, channel=1)),
      (1, on(70)),
      (5, off(70)),
      (30, pedal(0, channel=1)),
    ],
  )
  assert rows(data) == [(1, 30, 60, 64), (1, 5, 60, 64), (1, 5, 70, 64)]


def test_drums_have_no_pedal():
  data = smf(
    [
      (0, pedal(127, channel=9)),
      (1, on(40, channel=9)),
      (5, off(40, channel=9)),
      (30, pedal(0, channel=9)),
    ]
  )
  assert rows(data) == [(1, 5, 40, 64)]


def test_tempo_changes_count_for_all_tracks():
  data = smf(
    [(0, tempo(1_000_000)), (10, tempo(500_000)), (30, tempo(250_000))],
    [(0, on(60)), (10, off(60)), (20, on(61)), (50, off(61))],
  )
  # 10 ticks of 2 ms, 20 of 1 ms, then of half a millisecond.
  assert rows(data) == [(0, 20, 60, 64), (30, 50, 61, 64)]


def test_times_are_exact_to_the_last_bit():
  data = smf([(1234567, on(60)), (1234568, off(60))], ticks_per_quarter=480)
  scale = 60.0 / ((6e7 / 500_000) * 480)
  notes = midi.read(data)
  assert notes.start_N[0] == scale * 1234567
  assert notes.end_N[0] == scale * 1234568


def test_what_mido_reads_of_a_written_file_are_its_notes():
  notes = midi.Notes(
    np.array([0.0, 0.25, 1.0]),
    np.array([0.5, 3.0, 1.5]),
    np.array([60, 21, 108]),
    np.array([1, 64, 127]),
  )
  data = midi.write(notes, 1000)
  file = mido.MidiFile(file=io.BytesIO(data))
  assert file.type == 1 and file.length == pytest.approx(3.0)
  messages = [
    (message.type, message.note, message.velocity)
    for message in file.tracks[1]
    if not message.is_meta
  ]
  assert messages == [
    ('note_on', 60, 1),
    ('note_on', 21, 64),
    ('note_on', 60, 0),
    ('note_on', 108, 127),
    ('note_on', 108, 0),
    ('note_on', 21, 0),
  ]
  assert all(track[-1].type == 'end_of_track' for track in file.tracks)


def test_notes_of_one_pitch_that_overlap_survive_on_tracks_of_their_own():
  notes = midi.Notes(
    np.array([0.0, 0.1, 0.2, 0.5]),
    np.array([0.5, 0.3, 0.4, 0.6]),
    np.array([60, 60, 60, 60]),
    np.array([1, 2, 3, 4]),
  )
  data = midi.write(notes, 1000)
  assert len(mido.MidiFile(file=io.BytesIO(data)).tracks) == 4
  assert sorted(rows(data)) == [
    (0, 500, 60, 1),
    (100, 300, 60, 2),
    (200, 400, 60, 3),
    (500, 600, 60, 4),
  ]


def test_a_silence_longer_than_a_delta_time_can_be_written():
  notes = midi.Notes(
    np.array([6000.0]), np.array([6001.0]), np.array([60]), np.array([64])
  )
  back = midi.read(midi.write(notes, 65_000))
  assert back.start_N[0] == pytest.approx(6000.0)


def _file(body, division=480, num_tracks=1):
  header = struct.pack('>IHHh', 6, 1, num_tracks, division)
  return b'MThd' + header + b'MTrk' + len(body).to_bytes(4) + body


@pytest.mark.parametrize(
  ('data', 'said'),
  [
    (b'', 'no MIDI file'),
    (b'RIFF' + bytes(100), 'no MIDI file'),
    (_file(b'', division=-7640), 'film frames'),
    (_file(b'', division=0), 'film frames'),
    (_file(b'', num_tracks=0), 'no tracks'),
    (_file(b'', num_tracks=2), 'cut off in track 2 of 2'),
    (_file(b'\0\x90\x3c\x40')[:-2], 'cut off in track 1 of 1'),
    (_file(b'\0\x90\x3c'), 'ends in the middle'),
    (_file(b'\0\x90\x3c\xa8'), 'data byte 168'),
    (_file(b'\0\x3c\x40'), 'no status'),
    (_file(b'\0\xf4\x40'), 'unknown status 0xf4'),
    (_file(b'\0\xff\x51\x03\0\0\0'), 'tempo of 0'),
    (_file(b'\xff\xff\xff\xff\x7f\x90\x3c\x40'), 'more than four bytes'),
    (_file(b'\0\x90\x3c\x40\xff\xff\xff\x7f\x3c\0'), 'lasts 279,620 seconds'),
    (bytes(midi.MAX_BYTES + 1), 'more than 4,194,304 bytes'),
  ],
)
def test_a_bad_file_ends_in_one_sentence(data, said):
  with pytest.raises(UserError, match=said) as error:
    midi.read(data)
  assert '\n' not in str(error.value)


@given(st.binary(max_size=200), st.integers(0, 3))
@settings(max_examples=300, deadline=None)
def test_any_track_is_notes_or_one_sentence(body, num_tracks):
  try:
    notes = midi.read(_file(body, num_tracks=num_tracks))
  except UserError:
    return
  assert (notes.end_N >= notes.start_N).all()


def test_unknown_chunks_are_skipped():
  data = smf([(0, on(60)), (7, off(60))])
  alien = b'XFIH' + (3).to_bytes(4) + b'abc'
  assert rows(data[:14] + alien + data[14:]) == rows(data)
