"""Events are the published ones, and come back from the files they make."""

import hashlib
import io
import json
import pathlib
import random
import runpy

import mido
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from perceiver_ar.data import midi, music, note_pairs
from perceiver_ar.errors import UserError

_ROOT = pathlib.Path(__file__).parents[2]
_GOLDEN = _ROOT / 'tests' / 'golden' / 'maestro_tokens.json'


def notes_of(*rows):
  """(start, end, pitch, velocity), in seconds."""
  start, end, pitch, velocity = zip(*rows, strict=True)
  return midi.Notes(
    np.array(start, float),
    np.array(end, float),
    np.array(pitch, np.int32),
    np.array(velocity, np.int32),
  )


def performance(seed, num_tracks=1):
  """A file of chords, repeated notes, pedals and changes of tempo."""
  rng = random.Random(seed)
  file = mido.MidiFile(type=1, ticks_per_beat=rng.choice([96, 384, 480]))
  for _ in range(num_tracks):
    track = mido.MidiTrack()
    file.tracks.append(track)
    pitches = rng.sample(range(21, 109), rng.choice([2, 5, 30]))
    for _ in range(200):
      time = rng.choice([0, 0, 0, 1, 2, 7, 50, 200, 1000])
      kind = rng.random()
      if kind < 0.45:
        message = mido.Message(
          'note_on', note=rng.choice(pitches), velocity=rng.randrange(128)
        )
      elif kind < 0.75:
        message = mido.Message('note_off', note=rng.choice(pitches))
      elif kind < 0.95:
        message = mido.Message(
          'control_change',
          control=rng.choice([64, 64, 67]),
          value=rng.choice([0, 63, 64, 127]),
        )
      else:
        message = mido.MetaMessage('set_tempo', tempo=rng.randrange(9**5, 9**6))
      track.append(message.copy(time=time))
  data = io.BytesIO()
  file.save(file=data)
  return data.getvalue()


def reference_notes(data):
  """Notes [start, end, pitch, velocity] of a file with one instrument."""
  file = mido.MidiFile(file=io.BytesIO(data))
  quarter = file.ticks_per_beat
  tick, begin, base, scale = 0, 0, 0.0, 60.0 / (120.0 * quarter)
  waiting, notes, pedals = {}, [], []
  for message in file.tracks[0]:
    tick += message.time
    now = base + scale * (tick - begin)
    if message.type == 'set_tempo':
      base, begin = now, tick
      scale = 60.0 / ((6e7 / message.tempo) * quarter)
    elif message.type == 'control_change' and message.control == 64:
      pedals.append((now, message.value >= 64))
    elif message.type == 'note_on' and message.velocity:
      waiting.setdefault(message.note, []).append((tick, now, message.velocity))
    elif message.type in ('note_on', 'note_off'):
      some = waiting.pop(message.note, [])
      old = [one for one in some if one[0] != tick]
      if old and len(old) < len(some):
        waiting[message.note] = [one for one in some if one[0] == tick]
      notes += [[at, now, message.note, velo] for _, at, velo in old]
  return notes, pedals


def reference_sustain(notes, pedals):
  happenings = [(at, 0 if down else 1, []) for at, down in pedals]
  happenings += [(note[0], 2, note) for note in notes]
  happenings += [(note[1], 3, note) for note in notes]
  happenings.sort(key=lambda one: one[:2])
  is_down, active, gone = False, [], []
  for time, kind, note in happenings:
    if kind < 2:
      is_down = kind == 0
      if not is_down:
        for one in [one for one in active if one[1] < time]:
          one[1] = time
          active = [other for other in active if other is not one]
    elif kind == 2:
      if is_down:
        for one in [one for one in active if one[2] == note[2]]:
          one[1] = time
          gone += [one] if one[0] == time else []
          active = [other for other in active if other is not one]
      active.append(note)
    elif not is_down:
      active = [other for other in active if other is not note]
  for one in active:
    one[1] = happenings[-1][0]
  return [one for one in notes if not any(one is other for other in gone)]


def reference_events(notes, lowest, num_pitches):
  notes = sorted(notes, key=lambda note: (note[0], note[2]))
  happenings = []
  for index, (start, end, _, _) in enumerate(notes):
    first, last = int(start * 100 + 0.5), int(end * 100 + 0.5)
    happenings.append((first, index, False))
    happenings.append((last + (last == first), index, True))
  now, loudness, events = 0, 0, []
  for step, index, is_off in sorted(happenings):
    while step - now > 100:
      events.append(2 * num_pitches + 99)
      now += 100
    if step > now:
      events.append(2 * num_pitches + step - now - 1)
      now = step
    _, _, pitch, velocity = notes[index]
    if not is_off and (velocity - 1) // 4 + 1 != loudness:
      loudness = (velocity - 1) // 4 + 1
      events.append(2 * num_pitches + 100 + loudness - 1)
    events.append(pitch - lowest + num_pitches * is_off)
  return events


@pytest.mark.parametrize('seed', range(20))
def test_events_are_those_of_the_rules(seed):
  data = performance(seed)
  notes = reference_sustain(*reference_notes(data))
  for num_events, lowest, num_pitches in ((388, 0, 128), (308, 21, 88)):
    ids = music.MusicCodec(num_events).read(data)
    expected = reference_events(notes, lowest, num_pitches)
    np.testing.assert_array_equal(ids - 3, expected)


def test_events_of_a_chord_by_hand():
  notes = notes_of(
    (2.5, 3.0, 64, 80), (2.5, 2.504, 60, 80), (2.501, 3.0, 62, 77)
  )
  on, off, shift, velocity = 0, 128, 255, 355
  expected = [
    *(shift + 100, shift + 100, shift + 50, velocity + 20),
    *(on + 60, on + 64, on + 62),
    *(shift + 1, off + 60),
    *(shift + 49, off + 64, off + 62),
  ]
  np.testing.assert_array_equal(music.encode(notes, 388), expected)


def test_both_vocabularies_are_full():
  velocities = [4 * i + 1 for i in range(32)]
  for num_events, low, high in ((388, 0, 127), (308, 21, 108)):
    rows = [(0, 1, pitch, 1) for pitch in range(low, high + 1)]
    rows += [(i, i + 2.01, low, v) for i, v in enumerate(velocities)]
    rows += [(99, 99 + i / 100, low, 1) for i in range(1, 101)]
    gaps = np.cumsum([200, *range(1, 101)]) / 100
    rows += [(a, a + 0.001, low, 1) for a in gaps + 100]
    seen = set(music.encode(notes_of(*rows), num_events).tolist())
    assert min(seen) == 0 and max(seen) == num_events - 1
    assert len(seen) >= num_events - 2


@pytest.mark.parametrize('num_events', music.VOCABULARIES)
@pytest.mark.parametrize('seed', range(20))
def test_files_of_events_have_the_same_events(seed, num_events):
  codec = music.MusicCodec(num_events)
  ids = codec.read(performance(seed, num_tracks=1 + seed % 3))
  data, num_repairs = codec.write(ids)
  assert num_repairs == 0
  np.testing.assert_array_equal(codec.read(data), ids)
  np.testing.assert_array_equal(codec.encode(codec.decode(ids).notes), ids)


def test_many_notes_of_a_step_keep_their_order():
  rng = np.random.default_rng(0)
  starts = 1 + np.sort(rng.uniform(-0.0049, 0.0049, 200))
  rows = [(s, 2, int(p), 64) for s, p in zip(
    starts, rng.integers(21, 109, 200), strict=True)]  # fmt: skip
  codec = music.MusicCodec(388)
  ids = codec.encode(notes_of(*rows))
  data, _ = codec.write(ids)
  np.testing.assert_array_equal(codec.read(data), ids)


@given(
  st.lists(st.integers(-5, 400), max_size=300),
  st.sampled_from(music.VOCABULARIES),
)
@settings(max_examples=200, deadline=None)
def test_any_ids_are_a_valid_file(ids, num_events):
  codec = music.MusicCodec(num_events)
  data, num_repairs = codec.write(ids)
  assert 0 <= num_repairs <= 2 * len(ids)
  file = mido.MidiFile(file=io.BytesIO(data))
  sounding = [m.note for t in file.tracks for m in t if m.type == 'note_on']
  assert len(sounding) % 2 == 0
  notes = codec.decode(ids).notes
  assert 2 * len(notes) == len(sounding)
  if len(notes):  # what is mended stays as it is
    mended = codec.read(data)
    again, num_repairs = codec.write(mended)
    assert num_repairs == 0 and len(codec.read(again)) == len(mended)


def test_events_that_do_not_come_back_are_counted(monkeypatch):
  monkeypatch.setattr(note_pairs, '_MOST_PAIRINGS', 2)
  monkeypatch.setattr(note_pairs, '_JOINED', 1)
  is_same = []
  for seed in range(20):
    rng = np.random.default_rng(seed)
    steps = np.sort(rng.integers(0, 90, (60, 2)), axis=1).tolist()
    rows = [(a, b + 1, int(rng.integers(60, 65)), 64) for a, b in steps]
    notes = notes_of(*((a / 100, b / 100, *more) for a, b, *more in rows))
    ids = music.encode(notes, 388)
    decoded = music.decode(ids, 388)
    again = music.encode(decoded.notes, 388)
    is_same.append(np.array_equal(ids, again))
    assert is_same[-1] == (decoded.num_repairs == 0)
  assert any(is_same) and not all(is_same)


ON, OFF, SHIFT, VELOCITY = 3, 3 + 128, 3 + 255, 3 + 355


@pytest.mark.parametrize(
  ('ids', 'num_repairs', 'num_notes'),
  [
    ([], 0, 0),
    ([0, 1, 2], 0, 0),
    ([VELOCITY + 20, ON + 60, SHIFT + 9, OFF + 60], 0, 1),
    ([ON + 60, SHIFT + 9, OFF + 60], 1, 1),  # no velocity
    ([OFF + 60, SHIFT + 9], 1, 0),  # no note
    ([VELOCITY + 20, ON + 60, OFF + 60, SHIFT + 9], 1, 0),  # no length
    ([VELOCITY + 20, ON + 60, SHIFT + 9], 1, 1),  # no end
    ([VELOCITY + 20, SHIFT + 9, ON + 60], 1, 0),  # neither
    (
      [VELOCITY + 20, ON + 60, ON + 64, SHIFT + 9, OFF + 64, OFF + 60],
      *(1, 2),  # the older note ends last
    ),
    ([391, -1, 10**9], 3, 0),
    ([SHIFT + 100] * 86_401, 1, 0),  # longer than a day
    ([VELOCITY + 20] + [ON + 60] * 65 + [SHIFT + 1], 65, 64),
  ],
)
def test_repairs_are_counted(ids, num_repairs, num_notes):
  decoded = music.MusicCodec(388).decode(ids)
  assert decoded.num_repairs == num_repairs
  assert len(decoded.notes) == num_notes


def test_noise_is_decoded_in_bounded_time():
  ids = np.random.default_rng(0).integers(3, 391, 3000)
  data, num_repairs = music.MusicCodec(388).write(ids)
  assert num_repairs > 0 and data.startswith(b'MThd')


def test_the_time_of_events():
  codec = music.MusicCodec(388)
  assert codec.seconds([2, SHIFT + 100, ON + 60, SHIFT + 5, OFF + 60]) == 1.05
  assert codec.seconds([]) == 0.0


def test_what_is_beyond_a_piano_needs_all_pitches():
  notes = notes_of((0, 1, 20, 64))
  assert len(music.encode(notes, 388)) == 4
  with pytest.raises(UserError, match='pitch 20 is outside 21 to 108'):
    music.encode(notes, 308)


def test_a_silent_file_is_no_performance():
  data, _ = music.MusicCodec(388).write([])
  with pytest.raises(UserError, match='no notes'):
    music.MusicCodec(388).read(data)


def test_variants_are_stretched_and_transposed():
  notes = notes_of((1, 2, 60, 64), (2, 4, 107, 64))
  changed = music.augment(notes, 1.05, 1)
  assert changed is not None
  np.testing.assert_allclose(changed.start_N, [1.05, 2.1])
  np.testing.assert_allclose(changed.end_N, [2.1, 4.2])
  np.testing.assert_array_equal(changed.pitch_N, [61, 108])
  assert music.augment(notes, 1.0, 2) is None
  assert music.augment(notes_of((0, 1, 22, 64)), 1.0, -2) is None
  beyond = notes_of((0, 1, 10, 64))
  assert music.augment(beyond, 1.05, 0) is not None  # not pushed there


def test_the_two_vocabularies_are_told_apart():
  one, two = map(music.MusicCodec, music.VOCABULARIES)
  assert (one.kind, two.kind) == ('events388', 'events308')
  assert (one.vocab_size, two.vocab_size) == (391, 311)
  assert one.sha256 != two.sha256
  with pytest.raises(UserError, match='388 or 308'):
    music.MusicCodec(128)


@pytest.mark.slow
def test_ten_real_performances_have_the_published_events(tmp_path):
  tool = runpy.run_path(str(_ROOT / 'tools' / 'demo_music.py'))
  tool['collect'](tmp_path / 'pieces')
  golden = json.loads(_GOLDEN.read_text())
  assert len(golden) == 10
  for name, expected in golden.items():
    data = (tmp_path / 'pieces' / name).read_bytes()
    for num_events in music.VOCABULARIES:
      codec = music.MusicCodec(num_events)
      ids = codec.read(data)
      digest = hashlib.sha256((ids - 3).astype('<i4').tobytes()).hexdigest()
      about = expected[f'vocab_{num_events}']
      assert len(ids) == about['num_tokens'], name
      assert digest == about['sha256_int32_le'], name
      written, num_repairs = codec.write(ids)
      assert num_repairs == 0
      np.testing.assert_array_equal(codec.read(written), ids)
