"""What the ledger says is what one computes by hand."""

import itertools

from perceiver_ar.report import ledger


def start(began, first_step, **changes):
  return {
    'time': began + 2.0,
    'event': 'start',
    'began': began,
    'first_step': first_step,
    'changes': [],
    'place': {'processes': 2, 'devices': '8 x v5p'},
  } | changes


def line(time, event, **facts):
  return {'time': time, 'event': event} | facts


def steps(first, end, seconds=1.0, **more):
  return [{'step': i, 'seconds': seconds} | more for i in range(first, end)]


def make(rows, some):
  account = ledger.make(rows, some)
  assert account is not None
  return account


# Killed in step 26, of which 20 are saved; again by hand; then to the end.
ROWS = [
  start(1000.0, 0),
  line(1010.0, 'seconds', start=5.0, compile=5.0, step=0.0),
  line(1033.0, 'save', step=20, seconds=3.0),
  line(1033.0, 'seconds', start=5.0, compile=5.0, step=20.0, save=3.0),
  start(1100.0, 20, changes=['optax: 0.2 -> 0.3']),
  line(1103.0, 'lost', steps=6, seconds=6.0),
  line(1104.0, 'set_aside', step=26, reason='cut short'),
  line(1104.0, 'skipped', step=1021, loss='NaN'),
  line(1115.0, 'seconds', start=8.0, step=7.0),
  line(1115.0, 'end', reason='SIGTERM', status=75),
  start(1150.0, 27),
  line(1160.0, 'seconds', start=4.0, step=3.0, evaluation=3.0),
  line(1160.0, 'end', reason='done', status=0),
]
STEPS = [
  *steps(0, 20),
  *steps(20, 27, data_wait=[0.0, 0.25]),
  *steps(27, 30),
]


def test_the_ledger_of_a_run_with_three_starts():
  account = make(ROWS, STEPS)
  assert account.wall == 160.0
  expected = {'step': 28.25, 'data': 1.75, 'lost': 6.0, 'start': 17.0}
  expected |= {'compile': 5.0, 'save': 3.0, 'evaluation': 3.0, 'end': 0.0}
  expected['unfinished'] = 0.0
  assert account.seconds == expected | {'down': 160.0 - 64.0}
  assert account.goodput == 28.25 / 160.0
  assert sum(account.seconds.values()) == account.wall


def test_starts_that_failed_are_time_and_belong_to_none():
  failed = [
    line(1060.0, 'failed_start', reason='no host 1', status=75, seconds=9.0),
    line(1061.0, 'set_aside', step=26, reason='cut short'),
  ]
  account = make([*ROWS[:4], *failed, *ROWS[4:]], STEPS)
  plain = make(ROWS, STEPS)
  assert account.starts == plain.starts
  assert account.seconds['start'] == plain.seconds['start'] + 9.0
  assert sum(account.seconds.values()) == account.wall == plain.wall
  assert 'starts that failed: 1' in '\n'.join(ledger.describe(account))
  last = make([*ROWS[:4], *failed], STEPS[:22])
  assert last.starts[-1].how == plain.starts[0].how
  # Two steps since it was last heard of, of which one waited for data.
  assert last.starts[-1].last == 1035.0
  assert sum(last.seconds.values()) == last.wall == 35.0


def test_a_step_that_hangs_is_time_of_the_run():
  hung = [
    *ROWS[:4],
    line(1333.0, 'seconds', start=5.0, compile=5.0, step=320.0, save=3.0),
    line(1333.0, 'end', reason='hung in step 20', status=75),
  ]
  account = make(hung, steps(0, 20))
  assert account.seconds['unfinished'] == 300.0
  assert account.seconds['down'] == 0.0
  assert sum(account.seconds.values()) == account.wall == 333.0
  assert 'steps that did not end 5 min' in '\n'.join(ledger.describe(account))
  # Some of them may have ended, and been lost: a start later, or two.
  lost = line(1403.0, 'lost', steps=4, seconds=4.0)
  for again in ([], [start(1390.0, 16)]):
    rows = [*hung, *again, start(1400.0, 16), lost]
    account = make(rows, steps(0, 16))
    assert account.seconds['unfinished'] == 300.0
  # Metrics that are late by a moment, at every save, are no hang.
  done = [*hung[:-1], line(1333.0, 'end', reason='done', status=0)]
  assert make(done, steps(0, 20)).seconds['unfinished'] == 0.0


def test_every_start_says_how_it_ended():
  told = [ledger.say(x) for x in make(ROWS, STEPS).starts]
  assert 'from step 0 on 8 x v5p, ended without a word (killed' in told[0]
  assert told[0].endswith('after 33 s')
  assert 'ended: SIGTERM after 15 s; changed: optax: 0.2 -> 0.3' in told[1]
  assert 'from step 27' in told[2] and 'ended: done after 10 s' in told[2]


def test_the_few_lines_say_what_to_look_at():
  told = '\n'.join(ledger.describe(make(ROWS, STEPS)))
  for words in (
    'goodput 17.7%: of 3 min since the first start, 28 s',
    'steps done in vain 6 s',
    'steps done in vain, after a crash: 6',
    'checkpoints set aside: 1 (step 26)',
    'skipped steps: 1 (step 1,021)',
  ):
    assert words in told


def test_the_memory_of_saves_and_restores_is_told():
  told = lambda rows: '\n'.join(ledger.describe(make([*ROWS, *rows], STEPS)))
  assert 'memory' not in told(
    [line(1103.0, 'memory', doing='save', bytes=None)]
  )
  some = [('save', 10**8), ('save', 3 * 10**8), ('restore', 2 * 10**8)]
  rows = [line(1103.0, 'memory', doing=x, step=2, bytes=n) for x, n in some]
  words = 'memory of the host, at most: 0.3 GB to save, 0.2 GB to restore'
  assert words in told(rows)


def test_a_run_that_goes_on_is_known_to_its_last_step():
  rows = ROWS[:4]
  # Of 30 steps the journal knows 20.
  account = make(rows, steps(0, 30))
  assert 'no end yet' in account.starts[-1].how
  assert account.starts[-1].last == 1043.0
  assert account.goodput == 30.0 / 43.0
  assert account.seconds['down'] == 0.0
  # It may have been told of something since.
  later = [*rows, line(1090.0, 'slow', what='process 1')]
  assert make(later, steps(0, 30)).wall == 90.0


def test_no_moment_of_a_run_has_a_goodput_beyond_one():
  for num_rows, num_steps in itertools.product(range(1, 5), range(30)):
    account = make(ROWS[:num_rows], steps(0, num_steps))
    assert 0 <= account.goodput <= 1


def test_steps_from_before_the_journal_do_not_count():
  account = make([*ROWS[-3:]], STEPS)
  assert account.seconds['step'] == 3.0 and account.wall == 10.0


def test_without_a_start_there_is_no_ledger():
  assert ledger.make([], STEPS) is None
  assert ledger.make([line(1.0, 'set_aside', step=4)], STEPS) is None


def test_many_changes_are_counted():
  some = [f'key{i}: 0 -> 1' for i in range(11)]
  told = ledger.say(make([start(0.0, 0, changes=some)], []).starts[0])
  assert 'key7: 0 -> 1; and 3 more' in told and 'key8' not in told


def test_what_comes_before_the_next_start_does_not_prolong_the_last():
  rows = [*ROWS[4:10], line(1140.0, 'set_aside', step=27), *ROWS[10:]]
  assert make(rows, STEPS).starts[0].last == 1115.0
  assert [row['step'] for row in make(rows, STEPS).events[1:]] == [26, 1021, 27]
