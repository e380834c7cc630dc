"""Which note an end belongs to, where several of a pitch sound.

Events say which pitch ends, not which note of it. It is the oldest, as far as
one can tell. But when several instruments hold a pitch it may be any, and only
the order of events tells: at one time, notes end in the order in which they
began. So all pairings that keep this order are followed, and where several
remain, the one is taken that comes closest to `the oldest first`.
"""

from typing import Any, TypeAlias

_NO_NOTE = -1
# Of one instrument there is one pairing, of a band there are some hundreds;
# what a bad model makes of it has no end.
_MOST_PAIRINGS = 1024
_MOST_WORK = 5_000_000  # notes of pairings: seconds, in all
_JOINED = 64  # of each side, where two groups with many pairings become one

# Pitches and notes that still sound, in one order for all of a group.
_Open: TypeAlias = tuple[tuple[int, int], ...]
# How it came to that: (note, time, what was before), or (None, both before).
_Trail: TypeAlias = tuple[Any, Any, Any] | None
# Of what sounds, and the note that ended last: how many older notes were passed
# over, and the best way that leads there.
_States: TypeAlias = dict[tuple[_Open, int], tuple[int, _Trail]]


class _Group:
  """Pitches whose pairings depend on each other."""

  def __init__(self, states: _States):
    self.states = states

  def sounding(self) -> list[int]:
    """The pitches, one for each note; the same in all states."""
    sounding, _ = next(iter(self.states))
    return [pitch for pitch, _ in sounding]


class Pairing:
  """Notes are numbered as they begin; `end_of` is complete after `finish`.

  With `num_disordered` at 0, notes that end at one time have kept their order.
  """

  def __init__(self):
    self.end_of: dict[int, int] = {}
    self.num_disordered = 0  # ends; their order is lost
    self._groups: dict[int, _Group] = {}
    # What ended last at this time; a group if that is one of several notes.
    self._last: _Group | int = _NO_NOTE
    self._work = 0

  def num_open(self, pitch: int) -> int:
    group = self._groups.get(pitch)
    return group.sounding().count(pitch) if group else 0

  def begin(self, pitch: int, note: int) -> None:
    group = self._groups.get(pitch)
    if group is None:
      group = self._groups[pitch] = _Group({((), _NO_NOTE): (0, None)})
    group.states = {
      ((*sounding, (pitch, note)), last): how
      for (sounding, last), how in group.states.items()
    }

  def end(self, pitch: int, time: int) -> None:
    """Ends one of the notes of a pitch that has some."""
    group = self._groups[pitch]
    if isinstance(self._last, _Group) and self._last is not group:
      self._last = self._after(self._last, group, pitch)
      group = self._groups[pitch]
    states = self._ended(group, pitch, time, is_ordered=True)
    if not states:  # not what an encoder makes, or too dense to follow it all
      self.num_disordered += 1
      states = self._ended(group, pitch, time, is_ordered=False)
    self._work += len(states) * (1 + len(group.sounding()))
    most = _MOST_PAIRINGS if self._work < _MOST_WORK else 1
    group.states = _thinned(states, most)
    if pitch not in group.sounding():
      del self._groups[pitch]
    self._last = group
    if len(group.states) == 1:
      ((_, last),) = group.states
      self._settle(group)
      self._last = last

  def wait(self) -> None:
    """Time goes on: what ends from now on may be older again."""
    if isinstance(self._last, _Group):
      self._settle(self._last)
    self._last = _NO_NOTE

  def finish(self) -> None:
    self.wait()
    for group in set(self._groups.values()):
      self._record(min(group.states.values(), key=_passed_over)[1])

  def _ended(
    self, group: _Group, pitch: int, time: int, *, is_ordered: bool
  ) -> _States:
    states: _States = {}
    for (sounding, last), (passed_over, trail) in group.states.items():
      floor = self._last if isinstance(self._last, int) else last
      older = 0
      for at, (one, note) in enumerate(sounding):
        if one != pitch:
          continue
        if note > floor or not is_ordered:
          key = sounding[:at] + sounding[at + 1 :], note
          if key not in states or passed_over + older < states[key][0]:
            states[key] = (passed_over + older, (note, time, trail))
        older += 1
    return states

  def _after(self, last: _Group, group: _Group, pitch: int) -> _Group | int:
    """What the next end has to come after.

    Only where that differs, and matters, do both groups become one.
    """
    lasts = [note for _, note in last.states]
    ends = {n for open_, _ in group.states for p, n in open_ if p == pitch}
    if not any(min(lasts) < note <= max(lasts) for note in ends):
      self._settle(last)
      return min(lasts)
    left, right = last.states, group.states
    if len(left) * len(right) > 8 * _MOST_PAIRINGS:
      left, right = _thinned(left, _JOINED), _thinned(right, _JOINED)
    joint = _Group({})
    for (first, note), (passed_over, trail) in left.items():
      for (second, _), (more, other) in right.items():
        key, how = (first + second, note), (None, trail, other)
        if key not in joint.states or passed_over + more < joint.states[key][0]:
          joint.states[key] = (passed_over + more, how)
    for one in joint.sounding():
      self._groups[one] = joint
    return joint

  def _settle(self, group: _Group) -> None:
    """Forgets which note ended last; with that, choices may have been made."""
    states: _States = {}
    for (sounding, _), how in group.states.items():
      key = sounding, _NO_NOTE
      if key not in states or _passed_over(how) < _passed_over(states[key]):
        states[key] = how
    group.states = states
    if len(states) > 1:
      return
    (((sounding, _), (_, trail)),) = states.items()
    self._record(trail)
    # Nothing is left to choose, so nothing depends on each other.
    for one in group.sounding():
      mine = tuple(pair for pair in sounding if pair[0] == one)
      self._groups[one] = _Group({(mine, _NO_NOTE): (0, None)})

  def _record(self, trail: _Trail) -> None:
    trails = [trail]
    while trails:
      one = trails.pop()
      while one is not None:
        note, time, before = one
        if note is None:
          trails.append(time)
        else:
          self.end_of[note] = time
        one = before


def _passed_over(how: tuple[int, _Trail]) -> int:
  return how[0]


def _thinned(states: _States, most: int) -> _States:
  """The best and, evenly, others, where there are more than can be followed."""
  if len(states) <= most:
    return states
  ranked = sorted(states.items(), key=lambda state: _passed_over(state[1]))
  return dict(ranked[:: -(-len(ranked) // most)])
