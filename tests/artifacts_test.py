"""Samples arrive as files that people read, hear or look at."""

from typing import Any

import mido
import numpy as np
import PIL.Image
import pytest
from etils import epath
from runs import ROOT, start, wait_until, write_texts
from tiny import make_config

from perceiver_ar import artifacts, distributed, drawn
from perceiver_ar.data import image, music, text, tokens
from perceiver_ar.errors import UserError

RASTER = {
  'kind': 'raster',
  'height': 4,
  'width': 4,
  'channels': 3,
  'order': 'rgb',
  'seed': 0,
}
NUM_PIXELS = 48


class Script:
  """A sampler that draws what it was told to."""

  def __init__(self, *parts):
    self.parts = [np.array(part, np.int32) for part in parts]
    self.prompts = []
    self.asked = 0

  def room(self, num_prompt, length):
    return length

  def run(self, prompt_T, length, drawn_BT):
    self.prompts.append(prompt_T.tolist())
    at = 0
    for part in self.parts:
      if at >= drawn_BT.shape[1]:
        self.asked += 1
        yield part
      at += part.shape[1]


def prompt_of(codec, data, length=0):
  return artifacts._cut('it', codec.read(data), length)


def write(
  script,
  codec,
  prompts,
  folder,
  num_samples=2,
  request='this',
  watch=lambda kind, what: None,
):
  how = make_config({'sample.num_samples': num_samples, 'sample.length': 6})
  sampler: Any = script
  known = drawn.open_drawn(epath.Path(folder), request)
  return artifacts.write_samples(
    sampler, prompts, how.sample, codec, folder, known, watch
  )


def names(folder):
  return sorted(path.name for path in folder.iterdir())


def test_a_sample_ends_where_it_draws_eos(tmp_path):
  codec = text.ByteCodec()
  a = codec.encode('abc').tolist()
  script = Script(
    [[a[0], a[1], 1], [a[2], a[1], a[0]]],
    [[a[2], a[2], a[2]], [a[1], 1, a[2]]],
    [[a[0]] * 3] * 2,
  )
  prompt = prompt_of(codec, 'é'.encode())
  report = write(script, codec, [prompt], tmp_path)
  assert script.prompts == [[tokens.SOS, 0xC3 + 3, 0xA9 + 3]]
  assert script.asked == 2  # all have ended
  assert (tmp_path / 'sample-0.txt').read_text() == 'ab'
  assert (tmp_path / 'sample-1.txt').read_text() == 'cbab'
  assert (tmp_path / 'prompt-0.txt').read_text() == 'é'
  same = {'prompt': 0, 'ended': True, 'repairs': 0}
  assert report['samples'] == [
    {'file': 'sample-0.txt', 'num_tokens': 2} | same,
    {'file': 'sample-1.txt', 'num_tokens': 4} | same,
  ]


def test_what_begins_is_told_and_nothing_of_what_does_not(tmp_path):
  codec = text.ByteCodec()
  x, end = codec.encode('x').tolist() * 2, [tokens.EOS] * 2
  for parts, begun in (
    ([[x, x]] * 3, ['prompt', 'sample', 'sample', 'file', 'file', 'file']),
    ([[x, x], [end, end], [x, x]], ['prompt', 'sample', *['file'] * 3]),
  ):
    seen = []
    watch = lambda kind, what, seen=seen: seen.append(kind)
    nothing = [artifacts.NOTHING]
    write(Script(*parts), codec, nothing, tmp_path, watch=watch)
    assert seen == begun


def test_repairs_are_counted_and_what_is_unfinished_is_marked(tmp_path):
  no_text = [[0xFF + 3, 0xFE + 3, ord('a') + 3]]
  report = write(
    Script(no_text), text.ByteCodec(), [artifacts.NOTHING], tmp_path, 1
  )
  assert report['samples'][0]['repairs'] == 2
  report = write(
    Script([[5] * 7]),
    image.ImageCodec(RASTER),
    [artifacts.NOTHING],
    tmp_path,
    1,
  )
  about = report['samples'][0]
  assert (about['complete'], about['repairs']) == (False, 0)


def test_the_others_wait_for_each_sample_and_see_who_has_left(
  tmp_path, monkeypatch
):
  """Music takes its time, and all in one would be too long for a barrier."""
  done = []
  for name in ('barrier', 'check_present'):
    monkeypatch.setattr(
      distributed, name, lambda at, name=name: done.append((name, at))
    )
  close = artifacts._Sample.close
  monkeypatch.setattr(
    artifacts._Sample,
    'close',
    lambda self: (done.append('close'), close(self))[1],
  )
  parts, prompts = [[[5] * 3] * 2] * 2, [artifacts.NOTHING] * 3
  raster = image.ImageCodec(RASTER)
  write(Script(*parts), raster, prompts, tmp_path)
  first = [x for x in done if x != 'close']
  written = ('barrier', 'written')
  assert done[-15:] == ['close', written] * 6 + [written] * 3
  done.clear()
  how = make_config({'sample.num_samples': 2, 'sample.length': 6}).sample
  known = drawn.Drawn(epath.Path(tmp_path / 'other'), 'this')
  other: Any = Script(*parts)
  before = names(tmp_path)
  artifacts.draw_along(other, prompts, how, known, lambda kind, what: None)
  assert done == first
  assert names(tmp_path) == before  # files are one process's
  assert done.count(('check_present', 'sample')) == 3 * 2


@pytest.mark.parametrize('after', [0, 1, 2])
@pytest.mark.parametrize('request_after', ['this', 'other'])
def test_what_was_interrupted_goes_on(tmp_path, after, request_after, capsys):
  codec = text.ByteCodec()
  parts = [
    [[ord(x) + 3 for x in word] for word in words]
    for words in (('ab', 'no'), ('cde', 'pqr'), ('f', 's'))
  ]
  prompts = [artifacts.NOTHING, prompt_of(codec, b'x')]

  class Interrupted(Script):
    def run(self, prompt_T, length, drawn_BT):
      for part in super().run(prompt_T, length, drawn_BT):
        if len(self.prompts) == 2 and self.asked > 3 + after:
          raise KeyboardInterrupt
        yield part

  with pytest.raises(KeyboardInterrupt):
    write(Interrupted(*parts), codec, prompts, tmp_path / 'a')
  capsys.readouterr()
  script = Script(*parts)
  report = write(script, codec, prompts, tmp_path / 'a', request=request_after)
  is_same = request_after == 'this'
  assert script.asked == (3 - after if is_same else 6)
  num = 2 * (6 + [0, 2, 5][after])
  said = f'goes on after {num} tokens' if is_same else 'begins anew'
  assert said in capsys.readouterr().out
  whole = write(Script(*parts), codec, prompts, tmp_path / 'b')
  assert report['samples'] == whole['samples']
  assert names(tmp_path / 'a') == names(tmp_path / 'b')
  for file in (tmp_path / 'b').iterdir():
    assert (tmp_path / 'a' / file.name).read_bytes() == file.read_bytes()


@pytest.mark.parametrize('content', [b'', b'PK', b'x' * 99])
def test_a_broken_file_of_what_was_drawn_is_not_believed(tmp_path, content):
  known = drawn.Drawn(epath.Path(tmp_path), 'this')
  known.add(0, np.ones((2, 3), np.int32))
  known.write()
  assert (
    drawn.Drawn(epath.Path(tmp_path), 'this').of(0, 2).tolist() == [[1] * 3] * 2
  )
  (tmp_path / 'unfinished.npz').write_bytes(content)
  assert drawn.Drawn(epath.Path(tmp_path), 'this').parts_BT == []


def test_a_flipped_bit_of_what_was_drawn_is_no_crash(tmp_path):
  file = tmp_path / 'unfinished.npz'
  known = drawn.Drawn(epath.Path(tmp_path), 'this')
  known.add(0, np.ones((2, 3), np.int32))
  known.write()
  sound = file.read_bytes()
  for at in range(len(sound)):
    file.write_bytes(
      sound[:at] + bytes([sound[at] ^ 1 << at % 8]) + sound[at + 1 :]
    )
    for part_BT in drawn.Drawn(epath.Path(tmp_path), 'this').parts_BT:
      assert part_BT.tolist() == [[1] * 3] * 2


def test_what_is_interrupted_is_on_disk(tmp_path):
  class Interrupted(Script):
    def run(self, prompt_T, length, drawn_BT):
      yield from super().run(prompt_T, length, drawn_BT)
      raise KeyboardInterrupt

  with pytest.raises(KeyboardInterrupt):
    write(
      Interrupted([[5] * 7]),
      image.ImageCodec(RASTER),
      [artifacts.NOTHING],
      tmp_path,
      num_samples=1,
    )
  assert names(tmp_path) == ['sample-0.png', 'unfinished.npz']


def test_new_samples_replace_all_old_ones(tmp_path):
  codec = text.ByteCodec()
  a = codec.encode('a').tolist()
  prompts = [prompt_of(codec, b'abcdef', 2)] * 2
  write(Script([a * 2] * 3), codec, prompts, tmp_path, num_samples=3)
  assert len(names(tmp_path)) == 2 * (3 + 2)
  nothing = [artifacts.NOTHING]
  write(Script([a * 3]), codec, nothing, tmp_path, num_samples=1)
  assert names(tmp_path) == ['sample-0.txt']
  assert (tmp_path / 'sample-0.txt').read_text() == 'aaa'


def test_completions_stand_beside_their_prompts_and_originals(tmp_path):
  codec = text.ByteCodec()
  prompts = [prompt_of(codec, b'one two three', 3), prompt_of(codec, b'four')]
  script = Script([codec.encode(' abcde').tolist()] * 2)
  report = write(script, codec, prompts, tmp_path)
  assert len(script.prompts) == 2
  assert [about['prompt'] for about in report['samples']] == [0, 0, 1, 1]
  first, second = report['prompts']
  assert (tmp_path / first['file']).read_text() == 'one'
  # As long as the completion, to compare like with like.
  assert (tmp_path / first['original']['file']).read_text() == 'one two t'
  assert (tmp_path / second['file']).read_text() == 'four'
  assert 'original' not in second


def test_a_sampled_performance_is_midi_with_its_piano_roll(tmp_path):
  codec = music.MusicCodec(388)
  # velocity, note on, 50 steps, note off; the same a tone higher.
  events = [128 + 128 + 100 + 20, 60, 256 + 49, 128 + 60, 62, 256 + 49, 190]
  ids = [e + tokens.NUM_RESERVED for e in events]
  prompt = artifacts.Prompt('it', np.array(ids[:4]), None)
  script = Script([ids[4:]])
  report = write(script, codec, [prompt], tmp_path, num_samples=1)
  (about,) = report['samples']
  assert about['file'] == 'sample-0.mid' and about['repairs'] == 0
  played = [
    m.note
    for m in mido.MidiFile(tmp_path / 'sample-0.mid')
    if m.type == 'note_on' and m.velocity
  ]
  assert played == [60, 62]  # the prompt is heard, too
  with PIL.Image.open(tmp_path / about['piano_roll']) as roll:
    assert roll.format == 'PNG' and roll.width > 100
  assert 'audio' in about or about['no_audio']


def test_pictures_are_complete_or_marked_and_on_one_sheet(tmp_path):
  codec = image.ImageCodec(RASTER)
  rng = np.random.default_rng(0)
  original = rng.integers(0, 256, (4, 4, 3)).astype(np.uint8)
  ids_T = codec.encode(original)
  prompt = artifacts.Prompt('it', ids_T[:24], ids_T)
  complete, short = ids_T[24:], [5] * 24
  script = Script([complete, short])
  report = write(script, codec, [prompt], tmp_path)
  with PIL.Image.open(tmp_path / 'sample-0.png') as picture:
    assert (np.asarray(picture) == original).all()
  assert [about['repairs'] for about in report['samples']] == [0, 0]
  assert [about['complete'] for about in report['samples']] == [True, True]
  assert not report['prompts'][0]['complete']
  with PIL.Image.open(tmp_path / report['grid']) as sheet:
    assert sheet.width > 4 * 4  # prompt, two samples, original


def test_a_prompt_that_is_none_is_refused_by_name(tmp_path):
  path = tmp_path / 'broken.png'
  path.write_bytes(b'no picture')
  with pytest.raises(UserError, match=r'broken\.png'):
    artifacts.read_prompt(image.ImageCodec(RASTER), str(path), 0)
  with pytest.raises(UserError, match=r'absent\.txt cannot be read'):
    absent = str(tmp_path / 'absent.txt')
    artifacts.read_prompt(text.ByteCodec(), absent, 0)


def test_a_prompt_is_cut_to_so_many_tokens(tmp_path):
  path = tmp_path / 'a.txt'
  path.write_text('abcdef')
  cut = artifacts.read_prompt(text.ByteCodec(), str(path), 2)
  assert len(cut.tokens_T) == 2
  assert cut.original_T is not None and len(cut.original_T) == 6
  whole = artifacts.read_prompt(text.ByteCodec(), str(path), 6)
  assert whole.original_T is None


@pytest.mark.parametrize('junk', [b'', b'\xff\xff\xff\xff', b'\xe2\x82'])
def test_characters_that_are_cut_arrive_whole(tmp_path, junk):
  data = junk + '😀aé漢\ufffdz😀'.encode()
  ids = np.frombuffer(data, np.uint8).astype(np.int32) + 3
  for size in range(1, len(ids) + 1):
    stream = text.TextStream(tmp_path / 'x', text.ByteCodec())
    for begin in range(0, len(ids), size):
      stream.write(ids[begin : begin + size])
    stream.close()
    written = (tmp_path / 'x').read_text(encoding='utf-8')
    assert written.endswith('😀aé漢\ufffdz😀'), size
    assert set(written[: -len('😀aé漢\ufffdz😀')]) <= {'\ufffd'}


def test_nearly_all_of_a_stream_is_on_disk_while_it_runs(tmp_path):
  stream = text.TextStream(tmp_path / 'x', text.ByteCodec())
  ids = text.ByteCodec().encode('漢字' * 20)
  for num, token in enumerate(ids, 1):
    stream.write([token])
    assert num - (tmp_path / 'x').stat().st_size <= 3
  stream.close()


def test_ids_have_one_blank_between_them(tmp_path):
  stream = text.TextStream(tmp_path / 'x', text.IdsCodec(300))
  for part in ([5], [], [17, 299], [1], [4]):
    stream.write(part)
  stream.close()
  assert (tmp_path / 'x').read_text() == '5 17 299 4'


@pytest.mark.slow
def test_a_command_that_is_killed_goes_on_with_the_same_text(tmp_path):
  data = write_texts(tmp_path / 'data', 'x')
  run = tmp_path / 'run'

  def begin(*words):
    return start(*words, f'--workdir={run}')

  def finish(process):
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err
    return out

  finish(
    begin(
      'train',
      f'--config={ROOT}/configs/drill.py',
      f'--config.data.path={data}',
      '--config.train.num_steps=4',
    )
  )
  words = 'sample', '--num_samples=2', '--length=30000', '--top_k=5'
  unfinished = run / 'samples' / 'unfinished.npz'
  process = begin(*words)
  wait_until(unfinished.exists, process)
  process.kill()
  process.communicate()
  assert 'goes on after ' in finish(begin(*words))
  assert not unfinished.exists()
  files = sorted((run / 'samples').glob('sample-*'))
  killed = {file.name: file.read_bytes() for file in files}
  assert 'goes on after ' not in finish(begin(*words))
  whole = {file.name: file.read_bytes() for file in files}
  assert len(killed) == 2 and killed == whole
