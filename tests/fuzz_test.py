"""Any input ends in a value or in a sentence, soon, and in little memory."""

import json
import os
import pathlib
import subprocess
import sys

import fuzz
import fuzz_parsers
import fuzz_tools
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

_HERE = pathlib.Path(__file__).parent
_MANY = 100_000
_FEW = 300


def run(names, count, seed, seconds):
  """What became of the inputs, in a process whose memory is limited."""
  result = subprocess.run(
    [sys.executable, str(_HERE / 'fuzz.py'), str(count), str(seed), *names],
    capture_output=True,
    text=True,
    timeout=seconds,
    env=os.environ | {'PYTHONPATH': str(_HERE.parent)},
    check=False,
  )
  assert result.returncode == 0, result.stderr[-5000:]
  reports = json.loads(result.stdout.splitlines()[-1])
  assert list(reports) == list(names)
  return reports


def test_no_parser_breaks_its_promise_soon():
  reports = run(fuzz.PARSERS, _FEW, seed=0, seconds=100)
  assert all(report['inputs'] == _FEW for report in reports.values())
  # Nor is everything refused at the door.
  assert all(report['accepted'] > 0 for report in reports.values()), reports


def check_many(name):
  (report,) = run([name], _MANY, seed=1, seconds=600).values()
  assert report['inputs'] == _MANY
  assert _MANY / 200 < report['accepted'] < _MANY


@pytest.mark.slow
@pytest.mark.parametrize('name', fuzz_parsers.PARSERS)
def test_a_parser_keeps_its_promise(name):
  check_many(name)


@pytest.mark.slow
@pytest.mark.parametrize('name', fuzz_tools.PARSERS)
def test_a_parser_of_the_tools_keeps_its_promise(name):
  check_many(name)


@pytest.fixture(scope='module')
def opened(tmp_path_factory):
  """A parser by its name, opened once."""
  parsers = {}

  def find(name):
    if name not in parsers:
      folder = tmp_path_factory.mktemp(name)
      parsers[name] = fuzz.PARSERS[name](folder)
    return parsers[name]

  return find


@pytest.mark.parametrize('name', ['midi', 'png', 'text', 'config', 'manifest'])
@given(rng=st.randoms(use_true_random=False))
@settings(
  max_examples=200,
  deadline=None,
  suppress_health_check=[
    HealthCheck.too_slow,
    HealthCheck.data_too_large,
    HealthCheck.large_base_example,
    HealthCheck.filter_too_much,
  ],
)
def test_what_breaks_a_parser_is_shown_small(opened, name, rng):
  """The same inputs, chosen and made smaller by hypothesis."""
  make, parse = opened(name)
  fuzz.one(parse, make(rng))
