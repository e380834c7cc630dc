"""The report is one file that tells the truth about what the run holds."""

import html.parser
import json
import lzma
import re
import sys

import jax
import numpy as np
import pytest
from runs import contents
from tiny import make_config, make_params

from perceiver_ar import workdir
from perceiver_ar.data import layouts, pipeline, text, writer
from perceiver_ar.errors import UserError
from perceiver_ar.report import baselines, charts, document, training

TEXTS = [
  f'Book {i}: ' + 'the sea, the whale & the <sea>. ' * (i + 3) for i in range(5)
]
BUCKETS = [
  {'first': 1, 'end': 4, 'nats_per_token': 2.0},
  {'first': 4, 'end': 8, 'nats_per_token': 1.0},
]
COMMANDS = ['perceiver-ar train --workdir="a & b"', 'perceiver-ar sample']


def prepare(path, texts):
  codec = text.ByteCodec()
  with writer.Writer(
    path, kind='text', variant='', codec=codec, positions=layouts.INDEX
  ) as target:
    for split in ('train', 'validation'):
      for i, content in enumerate(texts):
        target.add(
          split,
          np.concatenate([[2], codec.encode(content), [1]]),
          name=f'{i}.txt',
          counts={
            'bytes': len(content.encode()),
            'words': len(content.split()),
          },
        )


@pytest.fixture
def run(tmp_path):
  """A workdir that has only begun."""
  prepare(tmp_path / 'data', TEXTS)
  config = make_config(
    {'model.vocab_size': 259, 'data.path': str(tmp_path / 'data')}
  )
  documents = pipeline.open_documents(config.data, 'train', seed=1)
  workdir.begin(tmp_path / 'run', config, documents)
  return tmp_path / 'run'


def train(run, num_steps, loss=None):
  about = {'num_targets': 8, 'grad_norm': 2.0, 'learning_rate': 1e-3}
  about |= {'seconds': 0.5}
  noise = np.random.default_rng(0).random(num_steps)
  rows = [
    {'step': i, 'loss': loss or 2 + noise[i]} | about for i in range(num_steps)
  ]
  held_out = {'step': num_steps, 'split': 'validation', 'nats_per_token': 1.25}
  lines = [json.dumps(row) + '\n' for row in [*rows, held_out]]
  (run / 'metrics.jsonl').write_text(''.join(lines))


def evaluate(run, chosen, **changes):
  about = {
    'step': 7,
    'split': 'validation',
    'kind': 'text',
    'variant': '',
    'num_documents': len(chosen),
    'num_tokens': sum(len(TEXTS[i]) + 1 for i in chosen),
    'num_bytes': sum(len(TEXTS[i].encode()) for i in chosen),
    'num_words': 50,
    'nats_per_token': 1.375,
    'accuracy': 0.5,
    'bits_per_byte': 1.984,
    'bits_per_byte_standard_error': 0.125,
    'word_perplexity': 321.0,
    'word_perplexity_standard_error': 12.0,
    'stride': 4,
    'num_latents': 8,
    'context_length': 24,
    'seconds': 3.0,
    'by_position': BUCKETS,
    'by_latent': BUCKETS,
  } | changes
  about = {key: value for key, value in about.items() if value != 'absent'}
  (run / 'evaluation.json').write_text(json.dumps(about))


def sample(run, texts):
  folder = run / 'samples'
  folder.mkdir()
  files = [f'sample-{i}.txt' for i in range(len(texts))]
  for file, content in zip(files, texts, strict=True):
    (folder / file).write_text(content, encoding='utf-8')
  samples = [
    {'file': f, 'prompt': 0, 'num_tokens': 9, 'ended': True} for f in files
  ]
  about = {'step': 7, 'seed': 3, 'temperature': 0.5, 'top_p': 1.0, 'top_k': 0}
  about |= {'prompts': [{'name': '', 'num_tokens': 0}], 'samples': samples}
  about |= {'tokens_per_second': 10.0}
  (folder / 'samples.json').write_text(json.dumps(about))


START = {
  'event': 'start',
  'time': 1002.0,
  'began': 1000.0,
  'first_step': 0,
  'command': 'perceiver-ar train --workdir="a & b"',
  'changes': ['data.path: <a> -> <b>'],
  'software': {'jax': '<0.1>', 'code': 'abc'},
  'place': {'processes': 2, 'devices': '8 x <v5p>', 'host': 'Linux'},
}


def keep_journal(run, *events):
  seconds = {'event': 'seconds', 'time': 1010.0, 'start': 10.0}
  lines = [json.dumps(row) + '\n' for row in (START, seconds, *events)]
  (run / 'journal.jsonl').write_text(''.join(lines))


class Page(html.parser.HTMLParser):
  """The tags, the attributes and the verbatim texts of a page."""

  def __init__(self, content):
    super().__init__()
    self.tags, self.attributes, self.verbatim = [], [], []
    self._in_pre = False
    self.feed(content)

  def handle_starttag(self, tag, attrs):
    self.tags.append(tag)
    self.attributes += attrs
    if tag == 'pre':
      self._in_pre = True
      self.verbatim.append('')

  def handle_endtag(self, tag):
    self._in_pre = self._in_pre and tag != 'pre'

  def handle_data(self, data):
    if self._in_pre:
      self.verbatim[-1] += data


def write(run):
  return document.write(document.read(run), COMMANDS, None).read_text(
    encoding='utf-8'
  )


def write_all(run):
  train(run, 60)
  evaluate(run, range(5))
  sample(run, ['To be <b>', 'or </pre><script>x</script> not\x01'])
  return write(run)


def test_the_page_needs_nothing_from_elsewhere(run):
  content = write_all(run)
  assert 'http' not in content and '@import' not in content
  assert not re.search(r'url\((?!#)', content)
  page = Page(content)
  assert not {'script', 'link', 'img', 'iframe', 'object'} & set(page.tags)
  names = {name for name, _ in page.attributes}
  assert not {name for name in names if name.startswith('on')} | {'src'} & names
  assert [path.name for path in run.iterdir() if 'report' in path.name] == [
    'report.html'
  ]


def test_everything_is_escaped(run):
  page = Page(write_all(run))
  assert page.verbatim[0] == '\nTo be <b>'
  assert page.verbatim[1] == '\nor </pre><script>x</script> not\ufffd'
  assert page.verbatim[-1] == '\n' + '\n'.join(COMMANDS)


def test_charts_on_one_page_do_not_share_ids(run):
  page = Page(write_all(run))
  ids = [value for name, value in page.attributes if name == 'id']
  assert page.tags.count('svg') == 8
  assert len(ids) == len(set(ids))
  refs = {value for name, value in page.attributes if name == 'href'}
  refs |= {
    value[4:-1]
    for name, value in page.attributes
    if name == 'clip-path' and value
  }
  assert refs and refs <= {f'#{name}' for name in ids}


def test_the_same_run_gives_the_same_charts():
  points = np.arange(9), np.linspace(3, 1, 9)
  draw = lambda: charts.loss_curve(points, points, points, 'nats')
  assert draw() == draw()
  assert not re.search('#[0-9a-f]{6}', draw())


def test_compressors_get_the_very_bytes_that_were_evaluated(run):
  for chosen in (range(5), [0, 2], [0]):
    evaluate(run, chosen)
    data = ''.join(TEXTS[i] for i in chosen).encode()
    bits = document.compare(document.read(run)).values
    assert next(iter(bits.values())) == 1.984
    assert bits['xz -9'] == 8 * len(lzma.compress(data, preset=9)) / len(data)
    assert f'{bits["gzip -9"]:.3f}' in write(run)


def test_other_bytes_are_not_compared(run):
  evaluate(run, range(5))
  prepare(run.parent / 'data', TEXTS[1:])
  with pytest.raises(UserError, match='evaluate again'):
    document.compare(document.read(run))
  assert 'comparison is left out' in (content := write(run))
  assert '1.984' in content and 'xz' not in content


def test_data_that_has_gone_leaves_the_rest(run):
  evaluate(run, range(5))
  (run.parent / 'data').rename(run.parent / 'elsewhere')
  assert 'comparison is left out' in write(run)


def test_what_is_not_there_yet_is_named(run):
  content = write(run)
  for missing in (
    'perceiver-ar evaluate',
    'perceiver-ar sample',
    'No training',
  ):
    assert missing in content
  with pytest.raises(UserError, match='perceiver-ar evaluate'):
    document.compare(document.read(run))
  keep_journal(run)
  assert 'class="missing"' not in write_all(run)


def test_standard_errors_stand_where_there_are_some(run):
  evaluate(run, range(5))
  assert '± 0.125' in write(run)
  none = {'word_perplexity_standard_error': None}
  evaluate(run, [0], bits_per_byte_standard_error=None, **none)
  assert '1.984' in (content := write(run))
  assert not re.search('± [0-9]', content)


def test_tokens_that_are_no_text_have_no_bits_per_byte(run):
  gone = {'num_words': 0, 'word_perplexity': 'absent'}
  evaluate(run, range(5), bits_per_byte='absent', **gone)
  content = write(run)
  assert 'nats per token' in content and '1.375' in content
  assert 'comparison is left out' in content


def test_losses_that_are_not_finite_are_left_out_of_the_curve(run):
  train(run, 60, loss='NaN')
  assert 'nan' not in re.sub('<style>.*?</style>', '', write(run)).lower()


def test_long_runs_have_no_longer_pages(run):
  train(run, 1_000)
  size = len(write(run))
  train(run, 6_000)
  assert len(write(run)) < 1.2 * size


@pytest.mark.parametrize('num_steps', [1, 7, 1_001, 2_500])
def test_thinning_keeps_every_step(num_steps):
  rows = [
    {'step': i, 'loss': float(i % 7), 'num_targets': 1 + i % 3}
    | {'grad_norm': 1.0, 'learning_rate': 1.0, 'seconds': 1.0}
    for i in range(num_steps)
  ]
  steps, thinned = training.thin(rows)
  assert len(thinned) == len(steps) <= 1_000 and steps[-1] == num_steps - 1
  count = lambda some: sum(row['num_targets'] for row in some)
  total = lambda some: sum(row['loss'] * row['num_targets'] for row in some)
  assert count(thinned) == count(rows)
  assert total(thinned) == pytest.approx(total(rows))


def test_parameters_are_those_of_the_model():
  model = make_config({}).model
  leaves = jax.tree.leaves(make_params(model))
  assert document.num_parameters(model) == sum(leaf.size for leaf in leaves)


def test_a_broken_file_is_named(run):
  (run / 'evaluation.json').write_text('{"step": ')
  with pytest.raises(UserError, match=r'evaluation\.json is not JSON'):
    write(run)


def test_a_folder_without_a_run_is_refused(tmp_path):
  with pytest.raises(UserError, match='folder of a run'):
    document.read(tmp_path)


def test_a_missing_sample_is_named(run):
  sample(run, ['a', 'b'])
  (run / 'samples' / 'sample-1.txt').unlink()
  with pytest.raises(UserError, match=r'sample-1\.txt is missing'):
    write(run)


def test_without_matplotlib_the_extra_is_named(run, monkeypatch):
  train(run, 3)
  monkeypatch.setitem(sys.modules, 'matplotlib', None)
  with pytest.raises(UserError, match='demo'):
    write(run)


def test_order_0_is_the_entropy_of_the_histogram():
  assert baselines.bits_per_byte(bytes(range(256)))['order 0'] == 8
  assert baselines.bits_per_byte(b'aaaa')['order 0'] == 0
  assert baselines.bits_per_byte(b'abab')['order 0'] == 1


def test_bigrams_fall_back_on_what_they_have_seen_little_of():
  train = [np.array([2, 3, 4] * 50 + [1])] * 4
  held_out = [np.array([2, 3, 4, 2, 3])]
  nats = baselines.nats_of_ngrams(train, held_out, 6)
  assert nats['uniform'] == pytest.approx(4 * np.log(6))
  assert nats['bigram'] < nats['unigram'] < nats['uniform']
  unseen = baselines.nats_of_ngrams(train, [np.array([5, 0])], 6)
  assert np.isfinite(unseen['bigram'])
  # Without a training split nothing is known.
  nothing = baselines.nats_of_ngrams([], held_out, 6)
  assert nothing['bigram'] == pytest.approx(nothing['uniform'])


def test_flat_pictures_cost_next_to_nothing_as_png():
  flat = np.zeros((64, 64, 3), np.uint8)
  noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
  assert baselines.png_bits([flat]) < 0.1 * 8 * flat.size
  assert 8 * noise.size < baselines.png_bits([noise]) < 8.2 * noise.size


def test_pictures_are_in_the_page_and_sounds_beside_it(run):
  folder = run / 'samples'
  sample(run, [])
  about = json.loads((folder / 'samples.json').read_text())
  for file in ('sample-0.mid', 'sample-0.png', 'sample-0.wav', 'grid.png'):
    (folder / file).write_bytes(file.encode())
  about['samples'] = [
    {
      'file': 'sample-0.mid',
      'prompt': 0,
      'num_tokens': 9,
      'ended': False,
      'repairs': 2,
      'piano_roll': 'sample-0.png',
      'audio': 'sample-0.wav',
    }
  ]
  about['grid'] = 'grid.png'
  (folder / 'samples.json').write_text(json.dumps(about))
  page = Page(content := write(run))
  sources = [value for name, value in page.attributes if name == 'src']
  assert len(sources) == 3 and sources[2] == 'samples/sample-0.wav'
  assert all(s.startswith('data:image/png;base64,') for s in sources[:2])
  assert '2 repairs' in content and 'samples/sample-0.mid' in content


def test_the_journal_of_a_run_that_goes_on_is_on_the_page(run):
  train(run, 60)
  spike = {'event': 'spike', 'time': 1011.0, 'loss': 'NaN', 'name': '<i>x</i>'}
  keep_journal(run, spike)
  with (run / 'journal.jsonl').open('a') as file:
    file.write('{"event": "torn", "ti')
  with (run / 'metrics.jsonl').open('a') as file:
    file.write('{"step": 60, "lo')
  before = contents(run)
  content = document.write(document.read(run), [], None).read_text()
  written = contents(run)
  assert written.pop('report.html').decode() == content
  assert written == before
  # 10 s of starting, and 60 steps of half a second.
  assert '75.0%' in content and 'has no end yet' in content
  assert 'spike: loss NaN, name &lt;i&gt;x&lt;/i&gt;' in content
  assert '8 x &lt;v5p&gt;' in content and 'data.path: &lt;a&gt;' in content
  page = Page(content)
  assert not {'i>x', 'a', 'b>', 'v5p'} & set(page.tags)
  assert START['command'] in page.verbatim[-1]
  assert 'torn' not in content


def test_a_page_may_lie_elsewhere(run, tmp_path):
  before = contents(run)
  path = document.write(document.read(run), [], tmp_path / 'page.html')
  assert path == tmp_path / 'page.html' and path.exists()
  assert contents(run) == before


def test_many_events_do_not_make_a_long_page(run):
  some = [{'event': 'skipped', 'time': 2e3, 'step': i} for i in range(3_000)]
  keep_journal(run, *some)
  content = write(run)
  assert '3,000, the last 100 of them' in content
  assert content.count('skipped: step') == 100


def test_the_host_that_waits_most_is_named(run):
  train(run, 60)
  assert 'waiting for data' not in write(run)
  path = run / 'metrics.jsonl'
  rows = [json.loads(line) for line in path.read_text().splitlines()]
  # One host more since the middle.
  for row in rows[:-1]:
    more = [0.5] if row['step'] >= 30 else []
    row['data_wait'] = [0.0, 0.1, *more]
  path.write_text(''.join(json.dumps(row) + '\n' for row in rows))
  content = write(run)
  assert 'waiting for data, %' in content
  assert 'Of 3 processes, 2 waited most for data: 50.0%' in content


@pytest.mark.parametrize('name', ['../../secret.txt', '/etc/passwd', '..', ''])
@pytest.mark.parametrize(
  'key',
  [
    'file',
    *(
      pytest.param(x, marks=pytest.mark.slow)
      for x in ('piano_roll', 'audio', 'grid')
    ),
  ],
)
def test_the_page_shows_no_file_of_another_folder(run, key, name):
  folder = run / 'samples'
  sample(run, [])
  for file in ('sample-0.mid', 'sample-0.png'):
    (folder / file).write_bytes(b'x')
  one = {'file': 'sample-0.mid', 'prompt': 0, 'num_tokens': 9, 'ended': True}
  one['piano_roll'] = 'sample-0.png'
  about = json.loads((folder / 'samples.json').read_text())
  about['samples'] = [one]
  (about if key == 'grid' else one)[key] = name
  (folder / 'samples.json').write_text(json.dumps(about))
  with pytest.raises(UserError, match=r'samples\.json names') as caught:
    write(run)
  assert repr(name) in str(caught.value)
