"""What gke.py has kubectl do, and what it says of it."""

import pathlib
import sys

import pytest
import yaml

sys.path.insert(0, str(pathlib.Path(__file__).parents[2] / 'launch'))

import gke

_ARGV = [
  '--topology=v5p:4x4x8',
  '--image=repo/it:1',
  '--bucket=gs://runs',
  '--namespace=ml',
  '--',
  'train',
  '--config=configs/books.py:long',
]

# Keeps what it is given, and fails if told so. To it as to a cluster, applying
# what is there changes nothing, and creating it is an error.
_KUBECTL = """#!/bin/sh
cd FOLDER
echo "$@" > args
cat > manifest
[ ! -e fails ] || { echo no cluster >&2; exit 3; }
[ -e jobset ] || { touch jobset; echo created; exit; }
[ "$1" = create ] || { echo unchanged; exit; }
echo 'Error from server (AlreadyExists): error when creating "STDIN":' \\
  'jobsets.jobset.x-k8s.io "books-long" already exists' >&2
exit 1
"""


@pytest.fixture
def kubectl(tmp_path, monkeypatch):
  """A kubectl of a cluster that is a folder."""
  script = tmp_path / 'bin' / 'kubectl'
  script.parent.mkdir()
  script.write_text(_KUBECTL.replace('FOLDER', str(tmp_path)))
  script.chmod(0o755)
  monkeypatch.setenv('PATH', f'{script.parent}:/usr/bin:/bin')
  return tmp_path


def test_it_creates_what_a_dry_run_prints(capsys, kubectl):
  gke.main(['--dry_run', *_ARGV])
  manifest = yaml.safe_load(capsys.readouterr().out)
  assert gke.main(_ARGV) == 0
  assert (kubectl / 'args').read_text() == 'create -f -\n'
  assert yaml.safe_load((kubectl / 'manifest').read_text()) == manifest
  told = capsys.readouterr().out
  assert 'kubectl delete jobset books-long --namespace=ml' in told


def test_a_job_that_is_there_is_not_called_started(capsys, kubectl):
  assert gke.main(_ARGV) == 0
  capsys.readouterr()
  assert gke.main(_ARGV) == 2
  captured = capsys.readouterr()
  assert not captured.out
  assert captured.err.startswith('gke.py: there is a JobSet books-long')
  assert captured.err.count('\n') == 1
  # Its pods save before they go, and two runs must not write to one folder.
  delete = 'kubectl delete jobset books-long --namespace=ml'
  assert f'{delete} --cascade=foreground' in captured.err


def test_a_dry_run_creates_nothing(kubectl):
  assert gke.main(['--dry_run', *_ARGV]) == 0
  assert not (kubectl / 'args').exists()


def test_a_failing_kubectl_is_not_success(capfd, kubectl):
  (kubectl / 'fails').touch()
  assert gke.main(_ARGV) == 3
  captured = capfd.readouterr()
  assert captured.err.startswith('no cluster\n')
  assert 'exit status 3' in captured.err
  assert not captured.out


def test_no_kubectl_is_said(capsys, monkeypatch):
  monkeypatch.setenv('PATH', '/nowhere')
  assert gke.main(_ARGV) == 2
  captured = capsys.readouterr()
  assert captured.err.startswith('gke.py: kubectl is not on PATH')
  assert captured.err.count('\n') == 1 and not captured.out
