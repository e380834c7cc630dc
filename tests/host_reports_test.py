"""What processes tell each other at every step."""

import jax
import numpy as np
import pytest
from jax.sharding import Mesh

from perceiver_ar import distributed, host_reports
from perceiver_ar.host_reports import Report


def report(own=0.1, data=0.0, stop=0, digest=1):
  return Report(
    stop=stop, save=False, digest=digest, data_seconds=data, own_seconds=own
  )


@pytest.mark.parametrize('digest', [0, 1, 2**32, 2**64 - 1])
def test_a_report_arrives_as_it_was_sent(digest):
  mesh = Mesh(np.array(jax.devices()[:1]), ('data',))
  exchange = host_reports.Exchange(mesh)
  sent = Report(
    stop=15,
    save=True,
    failed=True,
    digest=digest,
    bad_records=3,
    data_seconds=0.25,
    own_seconds=1.5,
  )
  assert exchange.read(exchange.send(sent, 'step 1')) == [sent]


def test_the_slow_host_is_named_with_its_share(monkeypatch):
  monkeypatch.setattr(distributed._job, 'names', ['a', 'b', 'c'])
  steps = [[report(), report(own=0.5, data=0.3), report()]] * 3
  said = host_reports.slowest(steps, seconds=1.0)
  assert said.startswith(
    'process 1 (b) is slow: of 1 s a step its host takes 0.5'
  )
  assert '0.3 of them for data' in said


def test_of_two_hosts_the_slow_one_is_held_against_the_other():
  said = host_reports.slowest([[report(own=0.5), report(own=0.25)]], 1.0)
  assert said.startswith('process 0')
  assert said.endswith('others take 0.25')


@pytest.mark.parametrize(
  ('own', 'seconds'),
  [([0.1, 0.1, 0.1], 1.0), ([0.1, 0.14, 0.1], 1.0), ([0.01, 0.05, 0.01], 1.0)],
)
def test_hosts_that_cost_little_are_not_named(own, seconds):
  steps = [[report(own=x) for x in own]]
  assert host_reports.slowest(steps, seconds) == ''
