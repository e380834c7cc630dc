"""The run's history on the page: starts, seconds, and what happened."""

from collections.abc import Sequence

from perceiver_ar.lines import Row
from perceiver_ar.report import charts, ledger, page

MISSING = 'There is no journal: nothing is known of its starts.'
_MAX_EVENTS = 100


def section(account: ledger.Ledger | None) -> str:
  """Where the time went, and the events."""
  if account is None:
    return page.section('History', page.missing(MISSING))
  return page.section(
    'History',
    *_times(account),
    page.heading('Starts', f'{len(account.starts):,}'),
    page.facts(
      [(str(n), ledger.say(s)) for n, s in enumerate(account.starts, 1)]
    ),
    *_events(account.events),
  )


def _times(account: ledger.Ledger) -> list[str]:
  spent = {k: v for k, v in account.seconds.items() if v > 0 or k == 'step'}
  share = lambda seconds: f'{seconds / (account.wall or 1.0):.1%}'
  names = {kind: ledger.NAMES.get(kind, kind) for kind in spent}
  values = {names[kind]: seconds for kind, seconds in spent.items()}
  rows = [
    (name, page.duration(seconds), share(seconds))
    for name, seconds in values.items()
  ]
  return [
    page.figure(charts.bars(values, 'seconds', share)),
    page.numbers(('time', 'share'), rows),
    page.note(
      f'Of {page.duration(account.wall)} since the first start. Steps that '
      'count are those whose work was not lost, without the time that they '
      'waited for data: their share is the goodput.'
    ),
  ]


def _events(events: Sequence[Row]) -> list[str]:
  if not events:
    return []
  shown = events[-_MAX_EVENTS:]
  more = (
    f', the last {len(shown):,} of them' if len(shown) < len(events) else ''
  )
  rows = [
    (ledger.at(row['time']), f'{_name(row)}{_facts(row)}') for row in shown
  ]
  return [page.heading('Events', f'{len(events):,}{more}'), page.facts(rows)]


def _name(row: Row) -> str:
  return row['event'].replace('_', ' ')


def _facts(row: Row) -> str:
  facts = [
    f'{name.replace("_", " ")} {_value(value)}'
    for name, value in row.items()
    if name not in ('time', 'at', 'event')
  ]
  return f': {", ".join(facts)}' if facts else ''


def _value(value: object) -> str:
  if isinstance(value, int):
    return f'{value:,}'
  return f'{value:.5g}' if isinstance(value, float) else str(value)
