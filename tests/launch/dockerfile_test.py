"""What can be known of the image without building it."""

import json
import os
import pathlib
import shlex
import subprocess
import sys
import tomllib

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_PROJECT = tomllib.loads((_ROOT / 'pyproject.toml').read_text())['project']


def _instructions():
  """Each with its arguments, continued lines joined."""
  lines = (_ROOT / 'Dockerfile').read_text().replace('\\\n', '').splitlines()
  kept = [line for line in lines if line and not line.startswith('#')]
  return [line.split(' ', 1) for line in kept]


def _arguments(name):
  return [argument for word, argument in _instructions() if word == name]


def test_it_does_not_run_as_root():
  assert int(_arguments('USER')[-1]) > 0  # a number: Kubernetes checks it


def test_it_starts_the_trainer():
  [entry] = _arguments('ENTRYPOINT')
  [command] = json.loads(entry)
  assert command in _PROJECT['scripts']


def test_all_that_is_copied_is_sent_to_the_build():
  sent = (_ROOT / '.dockerignore').read_text().splitlines()
  copied = [name for words in _arguments('COPY') for name in words.split()[:-1]]
  assert copied
  for name in copied:
    assert (_ROOT / name).exists()
    assert f'!{name}' in sent
  assert {line[1:] for line in sent if line.startswith('!')} == set(copied)


@pytest.mark.parametrize('extra', ['tpu', 'cuda', ''])
def test_dependencies_are_those_of_the_project(extra, tmp_path):
  [install] = [run for run in _arguments('RUN') if 'requirements.txt' in run]
  (tmp_path / 'python').symlink_to(sys.executable)
  (tmp_path / 'pip').write_text('#!/bin/sh\ncat requirements.txt\n')
  (tmp_path / 'pip').chmod(0o755)
  (tmp_path / 'pyproject.toml').symlink_to(_ROOT / 'pyproject.toml')
  result = subprocess.run(
    ['sh', '-c', install],
    cwd=tmp_path,
    env={'PATH': f'{tmp_path}:{os.environ["PATH"]}', 'EXTRA': extra},
    capture_output=True,
    text=True,
    check=True,
  )
  more = _PROJECT['optional-dependencies'][extra] if extra else []
  assert result.stdout.splitlines() == _PROJECT['dependencies'] + more
  assert shlex.split(install)[0] == 'python'


def test_no_extra_names_the_project_itself():
  """Before its source is there, pip would look for it elsewhere."""
  extras = _PROJECT['optional-dependencies'].values()
  assert not [x for xs in extras for x in xs if x.startswith(_PROJECT['name'])]


def test_dependencies_come_before_the_source():
  """Else every change of a line downloads all of them again."""
  words = [' '.join(instruction) for instruction in _instructions()]
  [source] = [i for i, w in enumerate(words) if w.startswith('COPY perceiver')]
  [install] = [i for i, w in enumerate(words) if '--requirement' in w]
  assert install < source
