"""Drills: that they pass, and that they do not pass for nothing."""

import dataclasses
import json
import pathlib
import re
import signal
import sys

import numpy as np
import pytest
from etils import epath

from perceiver_ar import checkpoint, saved_step
from perceiver_ar.drill import drills, faults
from perceiver_ar.drill.faults import Fault
from perceiver_ar.drill.scene import (
  NUM_STEPS,
  SAVE_EVERY,
  Failed,
  Job,
  Scene,
  Trace,
)
from perceiver_ar.errors import UserError
from perceiver_ar.main import main

ROOT = pathlib.Path(__file__).parents[1]
_EXACT = Fault('exact', '', lambda scene: None)
_FLOATS = dataclasses.replace(_EXACT, exact=False)
_ROW = {'loss': 1.0, 'data_digest': 'a'}
_TRACE = Trace(
  [{'step': step} | _ROW for step in range(3)],
  {'params/x': ['f4', [1], 'a']},
  pathlib.Path(),
)


def changed(step, **values):
  rows = [row | values if row['step'] == step else row for row in _TRACE.rows]
  return dataclasses.replace(_TRACE, rows=rows)


@pytest.mark.parametrize('fault', [_EXACT, _FLOATS])
def test_equal_runs_and_steps_left_out_are_the_same(fault):
  drills.compare(_TRACE, _TRACE, fault)
  fault = dataclasses.replace(fault, without=(1,))
  drills.compare(changed(1, loss=2.0), _TRACE, fault)


@pytest.mark.parametrize(
  ('got', 'match'),
  [
    (changed(2, loss=1.0000001), 'step 2 has loss 1.0000001, and .* 1.0'),
    (changed(2, data_digest='b'), 'step 2 has data_digest b'),
    (changed(2, skipped=1), 'step 2 has skipped 1, and .* None'),
    (dataclasses.replace(_TRACE, rows=_TRACE.rows[:2]), 'other steps'),
    (dataclasses.replace(_TRACE, rows=_TRACE.rows * 2), 'other steps'),
    (
      dataclasses.replace(_TRACE, arrays={'params/x': ['f4', [1], 'b']}),
      'params/x ends with',
    ),
  ],
)
def test_a_run_that_is_another_fails(got, match):
  with pytest.raises(Failed, match=match):
    drills.compare(got, _TRACE, _EXACT)


def test_other_hosts_may_round_otherwise_and_must_see_the_same_data():
  drills.compare(changed(2, loss=1.0001), _TRACE, _FLOATS)
  for got in (changed(2, loss=1.1), changed(2, data_digest='b')):
    with pytest.raises(Failed):
      drills.compare(got, _TRACE, _FLOATS)


def test_the_list_names_every_fault(capsys):
  with pytest.raises(SystemExit, match='0'):
    main(['drill', '--list'])
  said = capsys.readouterr().out
  assert all(fault.name in said for fault in faults.FAULTS)


@pytest.mark.parametrize(
  ('words', 'match'),
  [
    (['nothing'], "no drill 'nothing'; there is kill-step, "),
    ([], 'needs NAMEs of faults, or --all'),
    (['hang', '--all'], 'needs NAMEs of faults, or --all'),
    (['hang', '--processes=0'], '--processes=0 must be at least 1'),
  ],
)
def test_a_mistake_is_a_sentence(words, match, capsys):
  with pytest.raises(SystemExit, match='2'):
    main(['drill', *words])
  assert match in capsys.readouterr().err


def _finish(scene):
  scene.finish()


def _raises(error):
  def play(scene):
    raise error

  return play


@pytest.fixture
def pretended(tmp_path, monkeypatch):
  """No process is started; the names of the scenes that were begun."""
  begun = []

  def scene(self, name):
    begun.append(name)
    return Scene(self.folder / name, 1, [], [])

  monkeypatch.setattr(drills.tempfile, 'mkdtemp', lambda **_: str(tmp_path))
  monkeypatch.setattr(drills.Drills, 'scene', scene)
  monkeypatch.setattr(Scene, 'resume', lambda *_, **__: Job([], []))
  monkeypatch.setattr(Scene, '_trace', lambda _: _TRACE)
  return begun


def test_what_a_fault_raises_is_its_verdict_and_the_others_are_played(
  pretended, tmp_path
):
  errors = [
    saved_step.Damaged(epath.Path('checkpoints/8'), 'cut short'),
    UserError('metrics.jsonl line 2 is not JSON'),
    Failed('process 1 ended with status 0'),
    FileNotFoundError(2, 'No such file', 'away'),
  ]
  played = [Fault(f'{i}', '', _raises(x)) for i, x in enumerate(errors)]
  played.append(Fault('sound', '', _finish))
  *failed, sound = drills.run(played, 1)
  assert (sound.verdict, sound.said) == ('passed', '')
  for fault, error, verdict in zip(played[:4], errors, failed, strict=True):
    assert verdict.verdict == 'failed'
    assert str(error) in verdict.said
    assert verdict.said.endswith(f'; see {tmp_path / fault.name}')
  assert failed[3].said.startswith('FileNotFoundError: ')


def test_an_undisturbed_run_that_fails_is_made_once_and_told_to_all(
  pretended, monkeypatch, tmp_path
):
  folder = epath.Path('checkpoints/8')
  broken = _raises(saved_step.Damaged(folder, 'cut short'))
  monkeypatch.setattr(Scene, '_trace', broken)
  verdicts = drills.run([_EXACT] * 3, 1)
  assert pretended == ['undisturbed']
  said = (
    'undisturbed, it fails: checkpoint checkpoints/8 is damaged: cut short; '
    f'see {tmp_path / "undisturbed"}'
  )
  assert [(v.verdict, v.said) for v in verdicts] == [('failed', said)] * 3


@pytest.fixture(scope='module')
def jobs_of():
  """Drills for so many processes; undisturbed runs are made once."""
  made = {}

  def get(num_processes):
    if num_processes not in made:
      made[num_processes] = drills.Drills(num_processes)
    return made[num_processes]

  yield get
  for played in made.values():
    played.remove()


@pytest.mark.slow
@pytest.mark.parametrize('num_processes', [1, 2])
def test_every_drill_passes(num_processes, tmp_path):
  output = tmp_path / 'verdicts.json'
  words = [f'--processes={num_processes}', f'--output={output}']
  with pytest.raises(SystemExit) as ended:
    main(['drill', '--all', *words])
  verdicts = {v['fault']: v for v in json.loads(output.read_text())}
  assert ended.value.code == 0, verdicts
  assert set(verdicts) == {fault.name for fault in faults.FAULTS}
  alone = {'slow'} if num_processes == 1 else set()
  not_tried = {k for k, v in verdicts.items() if v['verdict'] != 'passed'}
  # Nor where no disk can be mounted.
  assert alone <= not_tried <= alone | {'disk-full'}, verdicts


@pytest.mark.slow
@pytest.mark.parametrize(
  ('name', 'removed', 'why'),
  [
    ('kill-step', 'keeps_rows_that_come_again', 'other steps are in metrics'),
    ('kill-save', 'writes_where_it_is_read', 'half of a checkpoint was taken'),
    ('kill-restore', 'moves_what_it_reads', "said 'goes on from step 8"),
    ('sigterm', 'knows_no_signals', "said 'SIGTERM: step .* nothing to save"),
    ('hang', 'never_looks_up', 'did not end within 90 s'),
    ('slow', 'names_nobody', "said 'process 1 .*is slow"),
    ('other-hosts', 'begins_the_data_again', 'step 8 has data_digest'),
    ('truncated', 'takes_damage_for_a_crash', 'status 1, not one of .0,'),
    # What is off by a bit is trained on; if it is far off, to no good.
    (
      'flipped',
      'believes_every_checksum',
      r'said .*is damaged: .* trained to|last good checkpoint is step 8',
    ),
    ('emptied', 'takes_damage_for_a_crash', 'status 1, not one of .0,'),
    ('missing', 'takes_damage_for_a_crash', 'status 1, not one of .0,'),
    ('disk-full', 'passes_over_saves_that_fail', 'ended with status 0'),
    ('storage', 'passes_over_saves_that_fail', 'ended with status 0'),
    ('nan-once', 'takes_any_gradient', 'step 7 was not skipped'),
    ('nan-many', 'skips_for_ever', 'ended with status 0'),
    ('shard-gone', 'explains_nothing', r'status 1, .*array_record is missing'),
    ('shard-corrupt', 'reads_anything', 'ended with status 0'),
    ('config', 'takes_any_config', 'ended with status 0'),
  ],
)
def test_a_drill_fails_without_the_protection(
  name, removed, why, jobs_of, monkeypatch
):
  (fault,) = drills.chosen([name])
  played = jobs_of(fault.num_processes)
  played.undisturbed(fault.without)
  program = [sys.executable, f'{ROOT}/tests/unprotected.py', removed]
  monkeypatch.setattr(played, 'program', program)
  if name == 'hang':  # which would be waited for to the end
    monkeypatch.setattr('perceiver_ar.drill.scene._PATIENCE', 90.0)
  verdict = played.play(fault)
  if verdict.verdict == 'not tried':
    pytest.skip(verdict.said)
  assert verdict.verdict == 'failed', verdict
  assert re.search(why, verdict.said), verdict


def test_every_fault_has_a_protection_to_remove():
  (marks,) = [
    mark
    for mark in test_a_drill_fails_without_the_protection.pytestmark
    if mark.name == 'parametrize'
  ]
  assert [row[0] for row in marks.args[1]] == [x.name for x in faults.FAULTS]


def _some_start(scene, rng, moves):
  """A start that does not come to its end; the steps that damage costs."""
  if moves and rng.random() < 0.4:
    scene.num_processes = int(rng.integers(1, 4))
  reached = len(scene.rows())
  ways = ['save', 'restore', 'damage']
  if reached <= NUM_STEPS - 4:  # or it could be over before
    ways += ['kill', 'sigterm']
  at = int(rng.integers(min(reached, NUM_STEPS - 4), NUM_STEPS - 3))
  on = int(rng.integers(3))
  match rng.choice(ways):
    case 'kill':
      job = scene.resume(faults={'kill_at': at}, on=on)
    case 'save':
      job = scene.resume(faults={'kill_in_save': 1, 'pace': 0.02}, on=on)
    case 'restore':
      fatal = {'kill_in_restore': True, 'kill_at': at}
      job = scene.resume(faults=fatal, on=on)
    case 'sigterm':
      scene.stop_at(at)
      return 0
    case _:
      steps = checkpoint.saved_steps(scene.seen)
      if len(steps) > 1:  # else nothing would be left
        how = rng.choice([faults._truncate, faults._flip, faults._empty])
        how(scene.seen / 'checkpoints' / str(steps[-1]), 0)
        return SAVE_EVERY
      return 0
  scene.demand_restart(job, -signal.SIGKILL)
  return 0


@pytest.mark.slow
@pytest.mark.parametrize('seed', range(4))
def test_whatever_happens_the_run_ends_as_if_nothing_had(seed, jobs_of):
  """Trains some steps, kills, saves, corrupts, changes hosts, resumes."""
  rng = np.random.default_rng(seed)
  played = jobs_of(int(rng.integers(1, 4)))
  before, wanted = played.num_processes, played.undisturbed()
  scene = played.scene(f'random-{seed}')
  hosts = {before}
  costs = 0
  for _ in range(5):
    # Where hosts stay the same, so does every bit.
    costs = max(costs, _some_start(scene, rng, moves=seed % 2 == 1))
    hosts.add(scene.num_processes)
  scene.finish()
  # Those since a save, those that are made while it is written, and those that
  # damage costs.
  assert scene.final and scene.lost <= 2 * SAVE_EVERY + costs
  drills.compare(scene.final, wanted, _EXACT if len(hosts) == 1 else _FLOATS)
  drills.compare_params(scene.final, wanted)
