"""All that is installed is pinned, and what is pinned can be asked about."""

import json
import pathlib
import re
import subprocess
import sys
from importlib import metadata

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import audit

_ROOT = pathlib.Path(__file__).parents[2]


def canonical(name):
  return re.sub('[-_.]+', '-', name).lower()


def needed(name, extras, seen):
  """Adds what an installed package needs, and what that needs."""
  if (name, extras) in seen:
    return
  seen.add((name, extras))
  try:
    requires = metadata.requires(name) or []
  except metadata.PackageNotFoundError:  # of an extra that is not installed
    return
  for requirement in map(Requirement, requires):
    marker = requirement.marker
    if marker is None or any(
      marker.evaluate({'extra': extra}) for extra in ('', *extras)
    ):
      needed(canonical(requirement.name), frozenset(requirement.extras), seen)


def test_every_package_is_pinned():
  lines = (_ROOT / 'constraints.txt').read_text().splitlines()
  pinned = [re.fullmatch('([A-Za-z0-9_.-]+)==[0-9][^ ]*', x) for x in lines]
  assert all(pinned) and lines == sorted(lines, key=str.lower)
  names = {canonical(found[1]) for found in pinned if found}
  assert len(names) == len(lines)
  seen = set()
  needed('perceiver-ar', frozenset({'dev', 'tpu', 'demo', 'prepare'}), seen)
  missing = {name for name, _ in seen} - names - {'perceiver-ar'}
  here = {name for name in missing if is_installed(name)}
  assert not here, 'pin them in constraints.txt'


def is_installed(name):
  try:
    return bool(metadata.version(name))
  except metadata.PackageNotFoundError:
    return False


_SKIPPED = {'name': 'b', 'skip_reason': 'Dependency not found on PyPI: b'}
_SOUND = {'name': 'a', 'version': '1', 'vulns': []}
_BAD = {
  'name': 'c',
  'version': '2',
  'vulns': [{'id': 'PYSEC-1', 'fix_versions': ['3'], 'aliases': []}],
}


@pytest.mark.parametrize(
  ('packages', 'status', 'said'),
  [
    ([_SOUND], 0, '0 vulnerabilities are known of 1 packages'),
    ([_SOUND, _SKIPPED], 0, 'not asked: Dependency not found on PyPI: b'),
    ([_SOUND, _BAD], 1, 'c 2: PYSEC-1, mended in 3'),
    ([_SKIPPED], 2, 'cannot be asked, so nothing is known (Dependency not'),
    ([], 2, 'there are no packages'),
    (None, 2, '(no route to host)'),
  ],
)
def test_no_answer_is_not_taken_for_a_good_one(
  monkeypatch, capsys, packages, status, said
):
  answer = (
    json.dumps({'dependencies': packages}) if packages is not None else ''
  )

  def run(command, **_):
    return subprocess.CompletedProcess(
      command, 1, answer, 'x\nno route to host'
    )

  monkeypatch.setattr(subprocess, 'run', run)
  assert audit.main() == status
  captured = capsys.readouterr()
  assert said in captured.out + captured.err
  if status == 2:
    assert captured.err.count('\n') == 1
