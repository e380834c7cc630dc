"""All that is installed is pinned, and what is pinned can be asked about."""

import itertools
import json
import pathlib
import re
import subprocess
import sys
import tomllib
from importlib import metadata

import pytest
from packaging.requirements import Requirement

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'tools'))

import audit

_ROOT = pathlib.Path(__file__).parents[2]


def canonical(name):
  return re.sub('[-_.]+', '-', name).lower()


def needed(requires, extras, seen):
  """Adds what is needed and installed, and what that needs."""
  for requirement in map(Requirement, requires):
    marker = requirement.marker
    if marker is None or any(
      marker.evaluate({'extra': extra}) for extra in ('', *extras)
    ):
      one = canonical(requirement.name), frozenset(requirement.extras)
      if one not in seen and is_installed(one[0]):
        seen.add(one)
        needed(metadata.requires(one[0]) or (), one[1], seen)


def test_every_package_is_pinned():
  lines = (_ROOT / 'constraints.txt').read_text().splitlines()
  pinned = [re.fullmatch('([A-Za-z0-9_.-]+)==[0-9][^ ]*', x) for x in lines]
  assert all(pinned) and lines == sorted(lines, key=str.lower)
  names = {canonical(found[1]) for found in pinned if found}
  assert len(names) == len(lines)
  about = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']
  extras = about['optional-dependencies']
  ours = [*about['dependencies'], *itertools.chain(*extras.values())]
  seen = set()
  needed(ours, (), seen)
  assert ('jax', frozenset({'cuda13'})) in seen  # extras are looked into
  # Which is not installed where there is no GPU.
  assert {'jax-cuda13-plugin', 'jax-cuda13-pjrt', 'nvidia-cudnn-cu13'} <= names
  missing = {name for name, _ in seen} - names - {'perceiver-ar'}
  assert not missing, 'pin them in constraints.txt'


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
