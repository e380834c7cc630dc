"""The commands of docs/launch.md: those that can be tried here work."""

import pathlib
import shlex
import subprocess
import sys

import pytest

from perceiver_ar import config_files

_ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(_ROOT / 'launch'))

import gke  # noqa: E402


def _commands() -> list[list[str]]:
  """The page's indented lines, those that go on joined, as words."""
  text = (_ROOT / 'docs' / 'launch.md').read_text().replace('\\\n', '')
  lines = [line for line in text.splitlines() if line.startswith('    ')]
  return [shlex.split(line.rstrip('|')) for line in lines if '...' not in line]


def _with(*words: str) -> list[list[str]]:
  """The commands that begin so, or a file that does."""
  found = [c for c in _commands() if c[: len(words)] == list(words)]
  assert found
  return found


@pytest.mark.filterwarnings('ignore:the load_module')  # config_flags uses it
def test_configs_are_there():
  """With their keys, and sizes that agree."""
  commands = [[w for w in c if w.startswith('--config')] for c in _commands()]
  configs = [words for words in commands if words]
  assert len(configs) >= 7
  for words in configs:
    config_files.resolve(words, None)


def test_gke_takes_its_command(capsys):
  [command] = _with('python', 'launch/gke.py')
  assert gke.main(['--dry_run', *command[2:]]) == 0
  assert 'kind: JobSet' in capsys.readouterr().out


@pytest.mark.parametrize('verb', ['create', 'run', 'logs', 'delete'])
def test_tpu_vms_take_their_commands(monkeypatch, verb):
  [[_, *variables]] = _with('export', 'TPU_NAME=books')
  for variable in variables:
    monkeypatch.setenv(*variable.split('=', 1))
  [command] = _with('launch/tpu_vm.sh', verb)
  subprocess.run(
    [*command[:2], '--dry_run', *command[2:]], check=True, cwd=_ROOT
  )


@pytest.mark.slow
def test_the_plan_of_a_container_is_made():
  [command] = _with('docker', 'run', 'REGISTRY/perceiver-ar:1', 'plan')
  subprocess.run(
    [sys.executable, '-m', 'perceiver_ar.main', *command[3:]],
    check=True,
    cwd=_ROOT,
  )
