import io
import time

import pytest

from perceiver_ar import progress


class _Terminal(io.StringIO):
  def isatty(self) -> bool:
    return True


@pytest.fixture
def clock(monkeypatch):
  """A clock that only moves when told to: `clock.now += 5`."""

  class Clock:
    now = 100.0

  monkeypatch.setattr(progress.time, 'monotonic', lambda: Clock.now)
  return Clock


def test_short_work_is_silent_in_a_file(clock, capsys):
  with progress.Progress('read', 10, 'files') as bar:
    for _ in range(10):
      clock.now += 0.9
      bar.advance(1)
  captured = capsys.readouterr()
  assert captured.err == captured.out == ''


def test_long_work_prints_few_lines_with_rate_and_time_left(clock, capsys):
  with progress.Progress('train', 1_000, 'steps') as bar:
    for step in range(100):
      clock.now += 0.5
      bar.advance(1, note=f'loss {100 - step}.5')
  lines = capsys.readouterr().err.splitlines()
  assert len(lines) == 6  # one per 10 s of 50 s, and the last word
  assert lines[0] == ('train: 20/1,000 steps, 2 steps/s, 8:10 left, loss 81.5')
  assert lines[-1].startswith('train: 100/1,000 steps')


def test_work_done_before_does_not_count_as_speed(clock, capsys):
  with progress.Progress('train', 1_000, 'steps', completed=900) as bar:
    clock.now += 20
    bar.advance(10)
  line = capsys.readouterr().err.splitlines()[0]
  assert '910/1,000 steps, 0.5 steps/s, 3:00 left' in line


def test_the_rate_is_that_of_the_last_minute(clock, capsys):
  with progress.Progress('train', 10_000, 'steps') as bar:
    clock.now += 1_000  # a compilation
    bar.advance(1)
    for _ in range(100):
      clock.now += 1
      bar.advance(1)
  assert '1 steps/s' in capsys.readouterr().err.splitlines()[-1]


def test_other_hosts_are_silent(clock, capsys):
  with progress.Progress('train', 10, 'steps', visible=False) as bar:
    clock.now += 60
    bar.advance(1)
  assert capsys.readouterr().err == ''


def test_a_terminal_gets_a_bar(monkeypatch):
  terminal = _Terminal()
  monkeypatch.setattr(progress.sys, 'stderr', terminal)
  monkeypatch.setenv('TERM', 'xterm')
  with progress.Progress('train', 3, 'steps') as bar:
    for _ in range(3):
      bar.advance(1, note='loss 1.93')
  shown = terminal.getvalue()
  assert '3/3 steps' in shown and 'loss 1.93' in shown and '\x1b[' in shown


def test_an_error_passes_through(capsys):
  with (
    pytest.raises(ValueError, match='broken'),
    progress.Progress('train', 3, 'steps') as bar,
  ):
    bar.advance(1)
    raise ValueError('broken')


def test_a_call_costs_next_to_nothing(monkeypatch):
  monkeypatch.setattr(progress.sys, 'stderr', _Terminal())
  with progress.Progress('train', 20_000, 'steps') as bar:
    times = []
    for _ in range(20_000):
      start = time.perf_counter()
      bar.advance(1, note='loss 1.93')
      times.append(time.perf_counter() - start)
  assert sorted(times)[len(times) // 2] < 20e-6
