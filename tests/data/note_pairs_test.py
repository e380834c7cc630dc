"""Ends find their notes again from nothing but their order."""

import random

import pytest

from perceiver_ar.data import note_pairs


def song(seed, num_pitches, num_notes):
  """Notes (start, end, pitch), each on an instrument of its own."""
  rng = random.Random(seed)
  notes = []
  for _ in range(num_notes):
    start = rng.randrange(num_notes)
    notes.append(
      (start, start + rng.randrange(1, 9), rng.randrange(num_pitches))
    )
  return sorted(notes, key=lambda note: note[0])


def happenings(notes):
  """(time, note, is_end) as an encoder orders them."""
  starts = [(start, i, False) for i, (start, _, _) in enumerate(notes)]
  ends = [(end, i, True) for i, (_, end, _) in enumerate(notes)]
  return sorted(starts + ends)


def pitches(notes):
  """All that events say: when, which pitch, whether it ends."""
  return [
    (time, notes[note][2], is_end) for time, note, is_end in happenings(notes)
  ]


def paired(notes):
  """The notes with the ends that they have found."""
  return paired_and_disordered(notes)[0]


def paired_and_disordered(notes):
  pairing = note_pairs.Pairing()
  now = 0
  for time, note, is_end in happenings(notes):
    if time > now:
      pairing.wait()
      now = time
    if is_end:
      pairing.end(notes[note][2], time)
    else:
      pairing.begin(notes[note][2], note)
  pairing.finish()
  found = [
    (start, pairing.end_of[i], pitch)
    for i, (start, _, pitch) in enumerate(notes)
  ]
  return found, pairing.num_disordered


@pytest.mark.parametrize('seed', range(30))
def test_some_pairing_with_the_same_order_is_found(seed):
  notes = song(seed, num_pitches=1 + seed % 7, num_notes=60)
  found, num_disordered = paired_and_disordered(notes)
  assert pitches(found) == pitches(notes) and num_disordered == 0


def test_what_is_too_dense_to_keep_its_order_is_counted(monkeypatch):
  monkeypatch.setattr(note_pairs, '_MOST_PAIRINGS', 2)
  monkeypatch.setattr(note_pairs, '_JOINED', 1)
  is_kept = []
  for seed in range(60):
    notes = song(seed, num_pitches=1 + seed % 7, num_notes=60)
    found, num_disordered = paired_and_disordered(notes)
    is_kept.append(num_disordered == 0)
    assert (pitches(found) == pitches(notes)) == is_kept[-1]
  assert any(is_kept) and not all(is_kept)


def test_of_one_instrument_the_oldest_note_ends_first():
  notes = [(0, 5, 60), (1, 6, 60), (2, 7, 60)]
  assert paired(notes) == notes


def test_a_later_end_tells_which_note_an_earlier_one_was():
  # At 20 the pitch 60 ends before the pitch 64, so its older note is left.
  notes = [(0, 20, 60), (4, 20, 64), (5, 10, 60)]
  assert paired(notes) == notes


def test_ends_in_no_order_are_paired_all_the_same():
  pairing = note_pairs.Pairing()
  for note, pitch in enumerate([60, 62, 64]):
    pairing.begin(pitch, note)
  for pitch in (64, 62, 60):
    pairing.end(pitch, 3)
  assert pairing.end_of == {0: 3, 1: 3, 2: 3}
  assert pairing.num_disordered == 2
  assert not any(map(pairing.num_open, (60, 62, 64)))
