"""tpu_vm.sh against a gcloud that records, and hosts that are folders."""

import json
import os
import pathlib
import re
import shlex
import shutil
import signal
import subprocess
import sys
import time

import pytest

_ROOT = pathlib.Path(__file__).parents[2]
_SCRIPT = _ROOT / 'launch' / 'tpu_vm.sh'
_HOST = _ROOT / 'launch' / 'tpu_vm_host.sh'

# Records its arguments. `describe` knows a state; hosts are folders below
# hosts/, where scp copies to and ssh runs commands in.
_GCLOUD = f"""#!{sys.executable}
import json, os, pathlib, shutil, subprocess, sys
words = sys.argv[1:]
here = pathlib.Path(os.environ['STUB'])
with open(here / 'calls', 'a') as calls:
  print(json.dumps(words), file=calls)
if os.environ.get('FAIL') in words:
  sys.exit(7)
if 'describe' in words:
  print(os.environ.get('STATE', 'ACTIVE'))
if 'scp' in words:
  node, _, file = words[5].partition(':')
  (here / 'hosts' / node).mkdir(parents=True, exist_ok=True)
  shutil.copy(words[4], here / 'hosts' / node / file)
if 'ssh' in words:
  home = here / 'hosts' / words[4]
  [command] = [word[10:] for word in words if word.startswith('--command=')]
  path = f'{{here}}/host_bin:/usr/bin:/bin'
  env = {{'HOME': str(home), 'PATH': path, 'STUB': str(here)}}
  subprocess.run(['bash', '-c', command], cwd=home, env=env, check=True)
"""

# Takes pip's and uv's place: an environment with a trainer in it.
_PYTHON = """#!/bin/sh
echo "$@" >> "$HOME/installed"
case "$*" in
  *'uv venv'*)
    mkdir -p "$HOME/perceiver-ar.venv/bin"
    cp "$STUB/trainer" "$HOME/perceiver-ar.venv/bin/perceiver-ar" ;;
esac
"""

# Ends with the statuses of a file, one after the other.
_TRAINER = """#!/usr/bin/env bash
printf '%s\\n' "$@" >> "$HOME/trained"
echo . >> "$HOME/times"
exit "$(sed -n "$(wc -l < "$HOME/times")p" "$HOME/statuses")"
"""

# Makes no folder outside of the host's.
_MKDIR = """#!/bin/sh
case "$*" in
  *' /tmp/perceiver-ar.data'*) ;;
  *) exec /bin/mkdir "$@" ;;
esac
"""


def _write(path, text):
  path.parent.mkdir(parents=True, exist_ok=True)
  path.write_text(text)
  path.chmod(0o755)


@pytest.fixture
def stub(tmp_path, monkeypatch):
  _write(tmp_path / 'bin' / 'gcloud', _GCLOUD)
  _write(tmp_path / 'host_bin' / 'python3', _PYTHON)
  _write(tmp_path / 'host_bin' / 'sleep', '#!/bin/sh\nexec /bin/sleep 0.01\n')
  _write(tmp_path / 'trainer', _TRAINER)
  monkeypatch.setenv('STUB', str(tmp_path))
  monkeypatch.setenv('PATH', f'{tmp_path}/bin:/usr/bin:/bin')
  for name in ('TPU_NAME', 'ZONE', 'ACCELERATOR_TYPE', 'NUM_SLICES'):
    monkeypatch.delenv(name, raising=False)
  yield tmp_path
  for file in tmp_path.glob('hosts/*/perceiver-ar.pid'):
    command = pathlib.Path('/proc', file.read_text().strip(), 'cmdline')
    if command.exists() and 'tpu_vm_host' in command.read_text():
      os.kill(int(file.read_text()), signal.SIGTERM)


def _run(*words: str, status: int = 0, env: dict[str, str] | None = None):
  result = subprocess.run(
    [_SCRIPT, *words],
    capture_output=True,
    text=True,
    env=os.environ | (env or {}),
    timeout=60,
  )
  assert result.returncode == status, result.stderr
  return result


def _calls(stub):
  """What gcloud was told, less `compute tpus`."""
  path = stub / 'calls'
  lines = path.read_text().splitlines() if path.exists() else []
  calls = [json.loads(line) for line in lines]
  assert all(call[:2] == ['compute', 'tpus'] for call in calls)
  return [call[2:] for call in calls]


_WHERE = ['--name=it', '--zone=us-east5-a']
_TRAIN = ['--', 'train', '--config=c.py:a b', '--workdir=gs://runs/it']
_DESCRIBE = [
  *('queued-resources', 'describe', 'it', '--zone=us-east5-a'),
  '--format=value(state.state)',
]


def test_create_asks_for_one_slice(stub):
  result = _run('create', *_WHERE, '--type=v5p-256', env={'STATE': 'WAITING'})
  create = [
    *('queued-resources', 'create', 'it', '--zone=us-east5-a'),
    '--accelerator-type=v5p-256',
    '--runtime-version=v2-alpha-tpuv5',
    '--node-id=it',
  ]
  assert _calls(stub) == [create, _DESCRIBE]
  assert result.stdout == 'WAITING\n'


def test_create_asks_for_slices_on_spot(stub):
  flags = ['--type=v5litepod-16', '--num_slices=3', '--spot', '--runtime=mine']
  _run('create', *_WHERE, *flags)
  words = _calls(stub)[0]
  assert {'--spot', '--node-count=3', '--node-prefix=it'} < set(words)
  assert '--runtime-version=mine' in words
  assert not any(word.startswith('--node-id') for word in words)


def test_flags_come_from_the_environment(stub):
  env = {
    'TPU_NAME': 'it',
    'ZONE': 'us-east5-a',
    'ACCELERATOR_TYPE': 'v6e-16',
    'NUM_SLICES': '2',
  }
  _run('create', env=env)
  assert '--node-count=2' in _calls(stub)[0]
  assert '--runtime-version=v2-alpha-tpuv6e' in _calls(stub)[0]
  _run('create', '--num_slices=1', env=env)
  assert '--node-id=it' in _calls(stub)[2]


def _wait_for(path, text):
  for _ in range(500):
    if path.exists() and text in path.read_text():
      return
    time.sleep(0.01)
  raise AssertionError(f'{path} never said {text}')


def test_run_installs_and_trains_on_every_slice(stub):
  for node in ('it-0', 'it-1'):
    _write(stub / 'hosts' / node / 'statuses', '75\n0\n')
  _run('run', *_WHERE, '--num_slices=2', *_TRAIN)
  calls = _calls(stub)
  assert calls[0] == _DESCRIBE
  assert [call[1:2] for call in calls[1:]] == [['scp']] * 2 + [['ssh']] * 4
  assert all('--worker=all' in call for call in calls[1:])
  # All hosts are ready before the first one starts to wait for the others.
  nodes = [call[2] for call in calls[3:]]
  assert nodes == ['it-0', 'it-1', 'it-0', 'it-1']
  for node in ('it-0', 'it-1'):
    home = stub / 'hosts' / node
    _wait_for(home / 'perceiver-ar.log', 'finished')
    assert (home / 'trained').read_text().splitlines() == 2 * _TRAIN[1:]
    copied = home / 'perceiver-ar' / 'perceiver_ar' / 'main.py'
    assert copied.read_bytes() == (_ROOT / 'perceiver_ar/main.py').read_bytes()
    assert '--editable=.[tpu]' in (home / 'installed').read_text()


@pytest.mark.parametrize('verb', ['evaluate', 'sample'])
def test_run_evaluates_and_samples(stub, verb):
  home = stub / 'hosts' / 'it'
  _write(home / 'statuses', '75\n0\n')
  words = [verb, '--workdir=gs://runs/it']
  _run('run', *_WHERE, '--', *words)
  _wait_for(home / 'perceiver-ar.log', 'finished')
  assert (home / 'trained').read_text().splitlines() == 2 * words


def test_run_copies_data_before_it_trains(stub):
  home = stub / 'hosts' / 'it'
  _write(home / 'statuses', '0\n')
  _write(
    stub / 'host_bin' / 'gcloud',
    f'#!/bin/sh\n[ ! -e {home}/trained ] && echo "$@" > {home}/copied\n',
  )
  _write(stub / 'host_bin' / 'mkdir', _MKDIR)
  _run('run', *_WHERE, '--data=gs://runs/pg19', *_TRAIN)
  _wait_for(home / 'perceiver-ar.log', 'finished')
  path = (home / 'copied').read_text().split()[-1]
  assert 'gs://runs/pg19' in (home / 'copied').read_text()
  trained = (home / 'trained').read_text().splitlines()
  assert trained[-1] == f'--config.data.path={path}'


def test_run_copies_the_checkout_as_it_is(stub):
  """Changed and new files go along; ignored and deleted ones do not."""
  checkout = stub / 'checkout'
  (checkout / 'launch').mkdir(parents=True)
  for script in (_SCRIPT, _HOST):
    shutil.copy(script, checkout / 'launch')
  for name in ('kept', 'changed', 'deleted'):
    (checkout / name).write_text('old')
  (checkout / '.gitignore').write_text('ignored\n')
  git = ['git', '-C', str(checkout)]
  subprocess.run([*git, 'init', '--quiet'], check=True)
  subprocess.run([*git, 'add', '--all'], check=True)
  (checkout / 'changed').write_text('new')
  (checkout / 'added').write_text('new')
  (checkout / 'ignored').write_text('new')
  (checkout / 'deleted').unlink()
  home = stub / 'hosts' / 'it'
  _write(home / 'statuses', '0\n')
  script = checkout / 'launch' / _SCRIPT.name
  subprocess.run([script, 'run', *_WHERE, *_TRAIN], check=True, timeout=60)
  copied = home / 'perceiver-ar'
  assert {p.name: p.read_text() for p in copied.iterdir() if p.is_file()} == {
    '.gitignore': 'ignored\n',
    'kept': 'old',
    'changed': 'new',
    'added': 'new',
  }
  _wait_for(home / 'perceiver-ar.log', 'finished')


def test_run_replaces_a_run_of_before(stub):
  """Which is told to stop, and has ended when the next begins."""
  waits = (
    '#!/usr/bin/env bash\n'
    'trap \'echo saved >> "$HOME/order"; exit 75\' TERM\n'
    'echo began >> "$HOME/order"\n'
    'while true; do /bin/sleep 0.05; done\n'
  )
  _write(stub / 'trainer', waits)
  home = stub / 'hosts' / 'it'
  _run('run', *_WHERE, *_TRAIN)
  _wait_for(home / 'order', 'began')
  _run('run', *_WHERE, *_TRAIN)
  _wait_for(home / 'order', 'began\nsaved\nbegan\n')
  log = (home / 'perceiver-ar.log').read_text()
  assert log.index('saved') < log.index('stopped') < log.rindex('starts')
  os.kill(int((home / 'perceiver-ar.pid').read_text()), signal.SIGTERM)
  _wait_for(home / 'order', 'began\nsaved\nbegan\nsaved\n')


def test_run_waits_for_nothing_that_is_not_active(stub):
  result = _run(
    'run', *_WHERE, *_TRAIN, status=2, env={'STATE': 'PROVISIONING'}
  )
  assert 'PROVISIONING' in result.stderr
  assert _calls(stub) == [_DESCRIBE]


@pytest.mark.parametrize(
  ('flags', 'node', 'worker'),
  [([], 'it', '0'), (['--num_slices=2', '--worker=all'], 'it-0', 'all')],
)
def test_logs_follows_a_host(stub, flags, node, worker):
  _write(stub / 'hosts' / node / 'perceiver-ar.log', 'step 1\n')
  _write(stub / 'host_bin' / 'tail', '#!/bin/sh\nexec /usr/bin/tail -n 200 $4')
  result = _run('logs', *_WHERE, *flags)
  assert result.stdout == 'step 1\n'
  [words] = _calls(stub)
  assert words[:3] == ['tpu-vm', 'ssh', node]
  assert f'--worker={worker}' in words


def test_delete_gives_all_of_it_back(stub):
  _run('delete', *_WHERE)
  assert _calls(stub) == [
    [
      *('queued-resources', 'delete', 'it', '--zone=us-east5-a'),
      *('--force', '--quiet'),
    ]
  ]


@pytest.mark.parametrize(
  ('verb', 'more', 'num_lines'),
  [
    ('create', ['--type=v4-8'], 2),
    ('run', _TRAIN, 1 + 2 + 4),
    ('logs', [], 1),
    ('delete', [], 1),
  ],
)
def test_a_dry_run_prints_what_would_be_done(stub, verb, more, num_lines):
  flags = [*_WHERE, '--num_slices=2', '--dry_run']
  printed = _run(verb, *flags, *more).stdout.splitlines()
  assert not _calls(stub)
  assert len(printed) == num_lines
  for line in printed:
    words = shlex.split(line)
    assert words[:3] == ['gcloud', 'compute', 'tpus']
    assert '--zone=us-east5-a' in words


@pytest.mark.parametrize(
  ('verb', 'more', 'fails', 'num_calls'),
  [
    ('create', ['--type=v4-8'], 'create', 1),
    ('run', _TRAIN, 'describe', 1),
    ('run', _TRAIN, 'scp', 2),
    ('run', _TRAIN, 'ssh', 3),
    ('logs', [], 'ssh', 1),
    ('delete', [], 'delete', 1),
  ],
)
def test_a_failing_gcloud_ends_it(stub, verb, more, fails, num_calls):
  result = _run(verb, *_WHERE, *more, status=7, env={'FAIL': fails})
  assert 'exit status 7' in result.stderr
  assert len(_calls(stub)) == num_calls


@pytest.mark.parametrize(
  ('words', 'says'),
  [
    ([], 'create, run, logs or delete'),
    (['start', *_WHERE], "'start'"),
    (['delete', '--zone=z'], '--name'),
    (['delete', '--name=it'], '--zone'),
    (['create', *_WHERE], '--type'),
    (['create', *_WHERE, '--type=v9-8'], '--type=v9-8'),
    (['create', *_WHERE, '--type', 'v4-8'], '--FLAG=VALUE'),
    (['create', *_WHERE, '--type=v4-8', '--num_slices=0'], '--num_slices=0'),
    (['logs', *_WHERE, '--worker=first'], '--worker=first'),
    (['run', *_WHERE, '--max_restarts=x', *_TRAIN], '--max_restarts=x'),
    (['run', *_WHERE], '-- train'),
    (['run', *_WHERE, '--data=pg19', *_TRAIN], '--data=pg19'),
    (
      ['run', *_WHERE, '--data=gs://a', *_TRAIN, '--config.data.path=b'],
      '--config.data.path',
    ),
    (['run', *_WHERE, *_TRAIN, '--config.data.path=gs://a'], '--data=gs://'),
    (['run', *_WHERE, *_TRAIN, '--config.data.path', 'gs://a'], '--data=gs://'),
    (['run', *_WHERE, '--', 'plan'], '-- train'),
    (['run', *_WHERE, '--', 'sample'], '--workdir=gs://BUCKET/RUN'),
    (['run', *_WHERE, '--', 'evaluate', '--workdir=runs/a'], 'gs://'),
    (['run', *_WHERE, '--', 'train', '--workdir=runs/a'], 'gs://'),
  ],
)
def test_a_mistake_is_one_sentence(stub, words, says):
  result = _run(*words, status=2)
  assert says in result.stderr
  assert result.stderr.startswith('tpu_vm.sh: ')
  assert result.stderr.count('\n') == 1
  assert not _calls(stub)


def test_help_is_enough(stub):
  text = _run('--help').stdout
  cases = re.compile(r'^    (--\w+)(?:=\*)?\) ', re.MULTILINE)
  flags = cases.findall(_SCRIPT.read_text())
  assert len(flags) == 10
  assert all(f'\n  {flag} ' in text for flag in flags)
  assert _run('run', '--help').stdout == text


@pytest.mark.parametrize(
  ('statuses', 'status', 'times'),
  [
    ([0], 0, 1),
    ([75, 75, 75, 0], 0, 4),  # saved is no failure, and has no limit
    ([2, 0], 2, 1),
    ([137, 75, 134, 0], 0, 4),
    ([1, 137, 143, 0], 143, 3),
  ],
)
def test_exit_statuses_say_what_is_next(stub, statuses, status, times):
  home = stub / 'hosts' / 'it'
  _write(home / 'perceiver-ar.venv' / 'bin' / 'perceiver-ar', _TRAINER)
  _write(home / 'statuses', ''.join(f'{s}\n' for s in statuses))
  env = {'HOME': str(home), 'PATH': f'{stub}/host_bin:/usr/bin:/bin'}
  result = subprocess.run(
    [_HOST, 'loop', '2', 'train'], env=env, capture_output=True, timeout=60
  )
  assert result.returncode == status
  assert len((home / 'times').read_text().splitlines()) == times
