"""Each command does what it says; a mistake costs one sentence, no more."""

import contextlib
import json
import pathlib
import shutil

import jax
import numpy as np
import pytest
from runs import ROOT, TINY, compiled_once, contents, damage

from perceiver_ar import flops, main
from perceiver_ar.data import layouts, text, writer

__all__ = ['compiled_once']

# ml_collections loads config files in a way that Python will drop.
pytestmark = pytest.mark.filterwarnings('ignore:the load_module')

# What commands on a checkpoint say that they run on.
_DEVICES = '8 x cpu (data 8); chunked attention, float32\n'
COMMANDS = {
  'train': ('--config', '--workdir', '--debug', '--coordinator'),
  'evaluate': [
    '--split',
    '--num_latents',
    '--context_length',
    '--stride',
    '--max_examples',
    '--step',
    '--output',
    '--workdir',
    '--config',
  ],
  'sample': [
    '--num_samples',
    '--length',
    '--prompt',
    '--temperature',
    '--top_p',
    '--top_k',
    '--seed',
    '--num_latents',
    '--refill_latents',
    '--step',
    '--output',
    '--workdir',
    '--config',
  ],
  'plan': (
    '--topology',
    '--num_slices',
    '--command',
    '--sweep',
    '--output',
    '--config',
  ),
  'replay': ('--step', '--output', '--workdir', '--config'),
  'checkpoint': ('list', 'verify', '--output', '--workdir', '--debug'),
  'report': ('WORKDIR', '--output', '--debug'),
}


def run(*words):
  with pytest.raises(SystemExit) as stopped:
    main.main([str(word) for word in words])
  return stopped.value.code


@pytest.fixture(scope='module')
def trained(tmp_path_factory):
  folder = tmp_path_factory.mktemp('trained') / 'run'
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(flops, 'matmul_rate', lambda dtype, size: 1e9)
    more = ('--config.train.num_steps=8', '--config.evaluate.every=0')
    assert run('train', TINY, f'--workdir={folder}', *more) == 0
  return folder


@pytest.fixture
def copied(trained, tmp_path):
  return pathlib.Path(shutil.copytree(trained, tmp_path / 'run'))


@pytest.fixture(scope='module')
def other_data(tmp_path_factory):
  """A data set of five ids."""
  path = tmp_path_factory.mktemp('data') / 'ids'
  codec = text.IdsCodec(8)
  with writer.Writer(
    path, kind='text', variant='', codec=codec, positions=layouts.INDEX
  ) as target:
    for split in ('train', 'validation'):
      tokens = np.array([2, 3, 4, 5, 6, 7, 1])
      target.add(split, tokens, name='x', counts={})
  return path


BAD_TRAINING = {
  'unknown key': (
    ['--config.model.num_latent=4'],
    ['model.num_latent', 'num_latents'],
  ),
  'unknown section': (['--config.modle.width=4'], ['modle', 'model']),
  'wrong type': (['--config.model.width=wide'], ['width', 'wide']),
  'more latents than inputs': (
    ['--config.model.num_latents=33'],
    ['model.num_latents 33', 'context_length 32'],
  ),
  'heads': (
    ['--config.model.num_self_heads=5'],
    ['width 32', 'num_self_heads 5', '35'],
  ),
  'mesh': (['--config.mesh.model=3'], ['model 3', '8 devices']),
  'batch': (['--config.train.batch_size=12'], ['12', 'size 8']),
  'microbatches': (
    ['--config.train.num_microbatches=2'],
    ['train.batch_size / train.num_microbatches 4', 'size 8'],
  ),
  'no data': (['--config.data.kind=prepared'], ['data.path', 'empty']),
  'data that is not there': (
    ['--config.data.kind=prepared', '--config.data.path=/nowhere/at/all'],
    ['/nowhere/at/all', 'tools/prepare_*.py'],
  ),
  'data without a manifest': (
    ['--config.data.kind=prepared', f'--config.data.path={ROOT}'],
    [str(ROOT), 'manifest.json'],
  ),
  'unknown flag': (['--num_steps=4'], ['--num_steps=4', '--help']),
  'a word too many': (['again'], ['again', '--help']),
}


@pytest.mark.parametrize('name', BAD_TRAINING)
def test_training_refuses_in_one_sentence(name, tmp_path, capsys):
  words, named = BAD_TRAINING[name]
  assert run('train', TINY, f'--workdir={tmp_path / "run"}', *words) == 2
  assert_one_sentence(capsys, named)
  assert not (tmp_path / 'run').exists()


def assert_one_sentence(capsys, named):
  out, err = capsys.readouterr()
  # Its place and what it runs on, where it got so far.
  err = err.removeprefix('alone: 1 process\n')
  err = err.removeprefix(_DEVICES)
  assert err.count('\n') == 1, err
  assert err.startswith('perceiver-ar')
  assert 'Traceback' not in err
  for words in named:
    assert words in err, err
  assert not out


@pytest.mark.parametrize(
  ('words', 'named'),
  [
    ([], ['COMMAND']),
    (['tarin', '--workdir=x'], ['tarin', 'train']),
    (['train', TINY], ['--workdir']),
    (['train', '--workdir=x'], ['--config=FILE.py']),
    (['train', '--workdir=x', '--config=none.py'], ['none.py']),
    (['train', '--workdir=x', f'{TINY[:-5]}:huge'], ['huge', 'tiny']),
    (['sample', '--workdir=x'], ['x/config.json', '--workdir']),
    (['sample', '--workdir=x', '--top_k=few'], ['--top_k', 'few']),
    (['checkpoint', 'list', '--workdir=x'], ['x holds no checkpoint']),
    (['checkpoint', 'mend', '--workdir=x'], ['mend', 'verify']),
    (['checkpoint', 'list'], ['list needs --workdir=DIR']),
    (['checkpoint', 'verify', 'x'], ['--workdir=DIR, not x']),
    (['checkpoint', 'diff', '--workdir=x'], ['diff A B']),
    (['checkpoint', 'diff', *'xyz'], ['diff A B']),
    (['checkpoint', 'diff', 'x', 'y'], ['x holds no checkpoint']),
    (['report'], ['WORKDIR']),
    (['report', 'x'], ['x/config.json', 'folder of a run']),
    (['report', 'x', '--workdir=y'], ['--workdir=y', '--help']),
    (['plan', TINY], ['--topology']),
    (['plan', '--topology=cpu:8'], ['plan needs --config=FILE.py']),
    (['plan', TINY, '--topology=v9:4x4'], ['v9', 'v5p']),
    (['plan', TINY, '--topology=cpu:8', '--output=no/x.json'], ['no/x.json']),
    (
      ['plan', TINY, '--topology=cpu:8', '--config.mesh.model=3'],
      ['model 3', '8 devices'],
    ),
    (
      ['plan', TINY, '--topology=cpu:8', '--command=sample'],
      ['sample.num_samples 2', 'size 8'],
    ),
  ],
)
def test_a_wrong_command_line_is_refused_in_one_sentence(
  words, named, tmp_path, monkeypatch, capsys
):
  monkeypatch.chdir(tmp_path)
  assert run(*words) == 2
  assert_one_sentence(capsys, named)
  assert not list(tmp_path.iterdir())


def test_a_workdir_that_is_a_file_is_refused(tmp_path, capsys):
  (tmp_path / 'file').write_text('mine')
  assert run('train', TINY, f'--workdir={tmp_path / "file"}') == 2
  assert_one_sentence(capsys, [f'{tmp_path / "file"}'])
  assert (tmp_path / 'file').read_text() == 'mine'


BAD_USE = {
  'no such step': (['evaluate', '--step=7'], ['no step 7', '4, 8']),
  'stride': (['evaluate', '--stride=17'], ['stride 17', 'num_latents 16']),
  'context': (['evaluate', '--context_length=9'], ['16', '9']),
  'split': (['evaluate', '--split=test'], ['test', 'validation']),
  'endless split': (['evaluate', '--split=train'], ['--max_examples']),
  'another model': (
    ['evaluate', '--config.model.num_layers=2'],
    ['model.num_layers: 1 -> 2'],
  ),
  'temperature': (['sample', '--temperature=-1'], ['temperature', '-1.0']),
  'samples': (['sample', '--num_samples=3'], ['num_samples 3', 'size 8']),
  'missing prompt': (['sample', '--prompt=none.txt'], ['none.txt']),
  'prompt': (['sample', '--prompt=latin.txt'], ['latin.txt', 'UTF-8']),
  'folder as prompt': (['sample', '--prompt=.'], ['--prompt=.']),
  'text as prompt': (['sample', '--prompt=words.txt'], ["'words'", 'ids']),
  'unknown flag': (['sample', '--beam=3'], ['--beam=3', '--help']),
}


@pytest.mark.parametrize('name', BAD_USE)
def test_using_a_run_wrongly_changes_nothing(
  name, trained, tmp_path, monkeypatch, capsys
):
  words, named = BAD_USE[name]
  if words[0] == 'sample' and name != 'samples':
    words = [*words, '--num_samples=8']
  (tmp_path / 'latin.txt').write_bytes('é'.encode('latin-1'))
  (tmp_path / 'words.txt').write_text('words')
  monkeypatch.chdir(tmp_path)
  before = contents(trained)
  assert run(*words, f'--workdir={trained}') == 2
  assert_one_sentence(capsys, named)
  assert contents(trained) == before or name == 'text as prompt'


def test_data_with_another_vocabulary_is_not_evaluated(
  trained, other_data, capsys
):
  words = ('--config.data.kind=prepared', f'--config.data.path={other_data}')
  assert run('evaluate', f'--workdir={trained}', *words) == 2
  assert_one_sentence(capsys, ['vocabulary ids 259', 'ids 8'])


def test_evaluation_and_samples_come_as_json_too(copied, tmp_path, capsys):
  words = ('--max_examples=5', '--num_latents=20', '--stride=10')
  output = tmp_path / 'a.json'
  where = f'--workdir={copied}'
  assert run('evaluate', where, f'--output={output}', *words) == 0
  report = json.loads(output.read_text())
  said = capsys.readouterr()
  assert json.loads(said.out) == report
  assert _DEVICES in said.err
  assert json.loads((copied / 'evaluation.json').read_text()) == report
  assert report['num_tokens'] == 5 * 31
  assert (report['step'], report['num_latents']) == (8, 20)

  words = ('--num_samples=8', '--length=30', '--step=4')
  prompt = tmp_path / 'prompt.txt'
  prompt.write_text('5 6 7')
  words += (f'--prompt={prompt}', f'--output={output}')
  assert run('sample', where, *words) == 0
  assert _DEVICES in capsys.readouterr().err
  report = json.loads(output.read_text())
  assert json.loads((copied / 'samples/samples.json').read_text()) == report
  assert (report['step'], report['prompts'][0]['num_tokens']) == (4, 3)
  assert len(report['samples']) == 8
  for about in report['samples']:
    written = (copied / 'samples' / about['file']).read_text().split()
    assert len(written) == about['num_tokens']
    assert about['num_tokens'] == 30 or about['ended']


def test_checkpoints_are_listed_and_verified(copied, tmp_path, capsys):
  where, output = f'--workdir={copied}', tmp_path / 'a.json'
  assert run('checkpoint', 'list', where, f'--output={output}') == 0
  assert [row['step'] for row in json.loads(output.read_text())] == [4, 8]
  assert run('checkpoint', 'verify', where) == 0
  assert capsys.readouterr().out.count('sound') == 2
  damage(copied, 8, 'flipped')
  assert run('checkpoint', 'verify', where, f'--output={output}') == 1
  rows = json.loads(output.read_text())
  assert [(row['step'], row['ok']) for row in rows] == [(4, True), (8, False)]
  assert rows[1]['reason']
  assert run('evaluate', where, '--step=8') == 2
  assert 'checkpoints/8 is damaged' in capsys.readouterr().err


@pytest.mark.parametrize(
  'words',
  [
    ['drill', '--list'],
    ['report', 'nothing'],
    ['checkpoint', 'list', '--workdir=nothing'],
    ['checkpoint', 'diff', 'nothing', 'other'],
  ],
  ids=' '.join,
)
def test_a_run_keeps_its_accelerators_whoever_looks_at_it(words, monkeypatch):
  told = []
  monkeypatch.setattr(jax.config, 'update', lambda *said: told.append(said))
  run(*words)
  assert ('jax_platforms', 'cpu') in told


def test_a_run_whose_checkpoints_are_all_damaged_says_so(copied, capsys):
  damage(copied, 4, 'flipped')
  damage(copied, 8, 'truncated')
  before = contents(copied)
  assert run('sample', f'--workdir={copied}', '--num_samples=8') == 2
  assert_one_sentence(capsys, ['damaged', 'no sound checkpoint'])
  assert contents(copied) == before
  words = ('--config.train.num_steps=8', '--config.evaluate.every=0')
  assert run('train', TINY, f'--workdir={copied}', *words) == 2
  assert (
    'choose another --workdir to train from the start'
    in capsys.readouterr().err
  )
  assert {p.name for p in (copied / 'damaged').iterdir()} == {'4-1', '8-1'}


def test_a_report_is_a_page_and_a_few_lines(copied, capsys):
  before = contents(copied)
  assert run('report', copied) == 0
  out = capsys.readouterr().out.splitlines()
  assert out[0] == 'step 8 of 8' and out[-1] == f'{copied}/report.html'
  assert any('ended: done' in line for line in out)
  assert any(line.startswith('goodput ') for line in out)
  written = contents(copied)
  assert b'steps that count' in written.pop('report.html')
  assert written == before


def test_a_plan_is_a_page_and_json(tmp_path, capsys):
  output = tmp_path / 'plan.json'
  words = ('plan', TINY, '--topology=cpu:8', f'--output={output}')
  assert run(*words) == 0
  out, err = capsys.readouterr()
  assert 'compiling for 8 x CPU' in err
  assert 'fits' in out
  report = json.loads(output.read_text())
  assert report['fits']
  assert report['mesh'] == {'slice': 1, 'data': 8, 'context': 1, 'model': 1}


def test_debug_shows_where_a_mistake_came_from(tmp_path, capsys):
  assert run('sample', f'--workdir={tmp_path}', '--debug') == 2
  told = capsys.readouterr().err
  assert 'Traceback' in told
  assert 'in read_config' in told
  assert told.splitlines()[-1].startswith('perceiver-ar: ')


@pytest.mark.parametrize('command', COMMANDS)
def test_help_names_every_flag(command, capsys):
  assert run(command, '--help') == 0
  told = capsys.readouterr().out
  for flag in COMMANDS[command]:
    assert flag in told


def test_importing_the_command_line_is_quick_and_writes_nothing(tmp_path):
  with contextlib.chdir(tmp_path):
    assert run('--help') == 0
  assert not list(tmp_path.iterdir())
