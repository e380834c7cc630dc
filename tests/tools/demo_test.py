"""The demo makes what is missing, in order, and says what it runs."""

import importlib
import itertools
import json
import os
import pathlib
import shlex
import signal
import subprocess
import sys
import time
from typing import Any

import pytest

from perceiver_ar.report import comparison, document

_PYTHON = sys.executable
_ROOT = pathlib.Path(__file__).parents[2]

# Stands for Python: notes what it is to run, and leaves what that would leave.
_STUB = """#!{python}
import json, os, pathlib, signal, sys, time
here = pathlib.Path(__file__).parent
if sys.argv[1] == '-m':
  assert sys.argv[2] == 'perceiver_ar.main'
  command, *flags = sys.argv[3:]
else:
  command, *flags = sys.argv[1:]
with (here / 'called').open('a') as log:
  log.write(json.dumps([command, *flags]) + '\\n')
behaviour = json.loads((here / 'behaviour').read_text())
if command == behaviour.get('fails'):
  sys.exit(behaviour['status'])
if command.startswith('tools/demo_'):
  books = pathlib.Path(flags[0].split('=', 1)[1])
  books.mkdir(parents=True, exist_ok=True)
  for number in range(5):
    (books / f'{{number}}.txt').write_text(f'Book {{number}}. ' * 20)
  sys.exit()
if command.startswith('tools/'):
  os.execv({python!r}, [{python!r}, command, *flags])
workdir = pathlib.Path(flags[-1].split('=', 1)[1])
step = behaviour['step']
if command == behaviour.get('waits'):
  def save(*_):
    time.sleep(1)
    (workdir / 'saved').touch()
    sys.exit(130)
  signal.signal(signal.SIGINT, save)
  (here / 'waiting').touch()
  time.sleep(60)
workdir.mkdir(parents=True, exist_ok=True)
folder = workdir / dict(sample='samples').get(command, '.')
folder.mkdir(exist_ok=True)
if command == 'train':
  (workdir / 'checkpoints' / str(step)).mkdir(parents=True, exist_ok=True)
else:
  name = dict(evaluate='evaluation.json', sample='samples.json')[command]
  (folder / name).write_text(json.dumps(dict(step=step)))
"""


class Stage:
  """A workdir, and the commands as a stub that notes how it is called."""

  def __init__(self, folder):
    self.workdir = folder / 'my runs'
    self.stub = folder / 'python'
    self.stub.write_text(_STUB.format(python=_PYTHON))
    self.stub.chmod(0o755)
    self._log = folder / 'called'
    self.waiting = folder / 'waiting'
    self.behave(step=10)

  def behave(self, **behaviour):
    content = json.dumps(behaviour)
    (self.stub.parent / 'behaviour').write_text(content)

  def called(self):
    """The commands since the last time."""
    lines = self._log.read_text().splitlines() if self._log.exists() else []
    self._log.unlink(missing_ok=True)
    return [json.loads(line) for line in lines]


@pytest.fixture
def stage(tmp_path):
  return Stage(tmp_path)


@pytest.fixture
def tool(stage, monkeypatch):
  """The module, with a stub for what it runs."""
  monkeypatch.chdir(_ROOT)
  monkeypatch.syspath_prepend(str(_ROOT / 'tools'))
  module: Any = importlib.import_module('demo')
  monkeypatch.setattr(module.sys, 'executable', str(stage.stub))
  module.reported = []
  monkeypatch.setattr(
    document,
    'write',
    lambda run, commands, _: module.reported.append(commands) or run / 'r.html',
  )
  found = comparison.Comparison(
    '', 'bits per byte', {'this model': 2.125, 'xz -9': 2.5}, 1, ''
  )
  monkeypatch.setattr(document, 'read', lambda path: path)
  monkeypatch.setattr(document, 'compare', lambda run: found)
  return module


def run(tool, stage, what='books'):
  return tool.main([f'--what={what}', f'--workdir={stage.workdir}'])


def names(calls):
  return [command for command, *_ in calls]


def test_every_step_runs_in_order_and_as_printed(tool, stage, capsys):
  assert run(tool, stage) == 0
  out = capsys.readouterr().out
  typed = [line[2:] for line in out.splitlines() if line.startswith('$ ')]
  assert tool.reported == [typed]
  assert [shlex.split(line)[1] for line in typed] == [
    'tools/demo_books.py',
    'tools/prepare_text.py',
    'train',
    'evaluate',
    'sample',
  ]
  assert [shlex.split(line)[1:] for line in typed] == stage.called()
  for wanted in ('2.125', '2.500', 'r.html', 'samples', 'minutes'):
    assert wanted in out


def test_copies_grow_and_go_on_from_each_other(tool, stage):
  assert run(tool, stage, 'copy') == 0
  called = stage.called()
  assert names(called) == 5 * ['train'] + ['evaluate', 'sample']
  for before, after in itertools.pairwise(called[:5]):
    workdir = before[-1].removeprefix('--workdir=')
    assert f'--config.checkpoint.init_from={workdir}' in after
  assert run(tool, stage, 'copy') == 0
  assert names(stage.called()) == ['train']  # which says that it is done


def test_what_is_there_is_not_made_again(tool, stage, capsys):
  assert run(tool, stage) == 0
  stage.called()
  capsys.readouterr()
  assert run(tool, stage) == 0
  assert names(stage.called()) == ['train']
  out = capsys.readouterr().out
  for word in ('is prepared', 'evaluation.json is of step 10', 'samples.json'):
    assert word in out


def test_results_of_an_older_step_are_made_again(tool, stage):
  assert run(tool, stage) == 0
  stage.called()
  stage.behave(step=20)
  assert run(tool, stage) == 0
  assert names(stage.called()) == ['train', 'evaluate', 'sample']


def test_half_a_result_is_made_again(tool, stage):
  assert run(tool, stage) == 0
  stage.called()
  (stage.workdir / 'evaluation.json').write_text('{"step": 1')
  (stage.workdir / 'data' / 'train.array_record').write_bytes(b'torn')
  assert run(tool, stage) == 0
  assert names(stage.called()) == [
    'tools/demo_books.py',
    'tools/prepare_text.py',
    'train',
    'evaluate',
  ]
  tool.records.Documents(str(stage.workdir / 'data'), 'train')


@pytest.mark.parametrize('fails', ['train', 'evaluate', 'sample'])
def test_the_first_failure_ends_it_with_its_status(tool, stage, fails):
  stage.behave(step=10, fails=fails, status=7)
  assert run(tool, stage) == 7
  assert names(stage.called())[-1] == fails
  assert not tool.reported


def test_other_folders_get_a_sentence(tool, stage, monkeypatch, capsys):
  monkeypatch.chdir(stage.stub.parent)
  assert run(tool, stage) == 2
  assert 'folder of the repository' in (said := capsys.readouterr().err)
  assert said.count('\n') == 1


def test_ctrl_c_waits_for_the_command_and_leaves_no_traceback(tool, stage):
  assert run(tool, stage) == 0
  stage.behave(step=20, waits='train')
  code = (
    'import sys; sys.path.insert(0, "tools"); import demo\n'
    f'sys.executable = {str(stage.stub)!r}\n'
    f'sys.exit(demo.main(["--workdir={stage.workdir}"]))'
  )
  process = subprocess.Popen(
    [_PYTHON, '-c', code],
    stderr=subprocess.PIPE,
    stdout=subprocess.DEVNULL,
    text=True,
    start_new_session=True,
  )
  while not stage.waiting.exists():
    assert process.poll() is None
    time.sleep(0.05)
  os.killpg(process.pid, signal.SIGINT)
  _, err = process.communicate(timeout=30)
  assert process.returncode == 130
  assert (stage.workdir / 'saved').exists()
  assert 'run it again' in err and 'Traceback' not in err
