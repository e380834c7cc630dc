"""Prompts and samples as files that people read, hear or look at.

A text is written while it is drawn. Music and pictures are written when they
are finished, with their prompt: a MIDI file with a piano roll and, where there
is a synthesizer, its sound; a PNG, and one picture of all.
"""

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
from etils import epath

from perceiver_ar import distributed
from perceiver_ar import drawn as drawn_lib
from perceiver_ar.config import SampleConfig
from perceiver_ar.data import (
  audio_render,
  image,
  music,
  piano_roll,
  text,
  tokens,
)
from perceiver_ar.data import pipeline as pipeline_lib
from perceiver_ar.errors import UserError
from perceiver_ar.progress import Progress
from perceiver_ar.sample import Sampler

# Music is played by one process, which may take minutes a sample: the others
# wait for each, and for what is beside a prompt, and not for all in one.
_WRITTEN = 'written'


@dataclasses.dataclass(frozen=True)
class Prompt:
  """What samples go on from, and what it was cut from, without SOS and EOS."""

  name: str
  tokens_T: np.ndarray
  original_T: np.ndarray | None


NOTHING = Prompt('', np.zeros((0,), np.int32), None)


def read_prompt(codec: tokens.Codec, path: str, length: int) -> Prompt:
  """A file as a prompt; of its tokens only the first `length`, unless 0."""
  try:
    data = epath.Path(path).read_bytes()
  except OSError as error:
    raise UserError(
      f'--prompt={path} cannot be read ({error.strerror}); check the name'
    ) from error
  try:
    tokens_T = codec.read(data)
  except UserError as error:
    raise UserError(f'--prompt={path}: {error}') from error
  return _cut(epath.Path(path).name, tokens_T, length)


def document_prompts(
  documents: pipeline_lib.DocumentSource, number: int, length: int
) -> list[Prompt]:
  """The beginnings of documents, evenly spread over their split."""
  if number > len(documents):
    raise UserError(
      f'--num_prompts={number} is more than the {len(documents)} documents of '
      'the split; lower it'
    )
  chosen = pipeline_lib.chosen_documents(len(documents), number)
  prompts = []
  for index in chosen:
    tokens_T = documents[index]
    is_symbol_T = (tokens_T != tokens.SOS) & (tokens_T != tokens.EOS)
    prompts.append(
      _cut(documents.info(index).name, tokens_T[is_symbol_T], length)
    )
  return prompts


def _cut(name: str, tokens_T: np.ndarray, length: int) -> Prompt:
  if not length or length >= len(tokens_T):
    return Prompt(name, tokens_T, None)
  return Prompt(name, tokens_T[:length], tokens_T)


class _Sample:
  """One artifact that is being drawn, and what has been drawn of it."""

  def __init__(
    self, codec: tokens.Codec, path: epath.Path, prompt_T: np.ndarray
  ):
    self._codec, self._path, self._prompt_T = codec, path, prompt_T
    self._parts = [NOTHING.tokens_T]
    self.ended = False  # by its own EOS

  @property
  def ids(self) -> np.ndarray:
    return np.concatenate(self._parts)

  def draw(self, ids_T: np.ndarray) -> None:
    """Goes on with these tokens; what comes after EOS is dropped."""
    if self.ended:
      return
    ends = np.flatnonzero(ids_T == tokens.EOS)
    self.ended = bool(ends.size)
    ids_T = ids_T[: ends[0]] if ends.size else ids_T
    self._parts.append(ids_T)
    self._write(ids_T)

  def _write(self, ids_T: np.ndarray) -> None:
    """Nothing yet: the artifact is written as a whole."""

  def close(self) -> dict[str, Any]:
    """Completes the files; what samples.json says about them."""
    ids_T = np.concatenate([self._prompt_T, *self._parts])
    return write(self._codec, self._path, ids_T, len(self._prompt_T))


class _TextSample(_Sample):
  """A text, on disk while it is drawn; the prompt stays in its own file."""

  def __init__(
    self, codec: text.TextCodec, path: epath.Path, prompt_T: np.ndarray
  ):
    super().__init__(codec, path, prompt_T)
    self._stream = text.TextStream(path, codec)

  def _write(self, ids_T: np.ndarray) -> None:
    self._stream.write(ids_T)

  def close(self) -> dict[str, Any]:
    self._stream.close()
    return {'repairs': self._codec.write(self.ids)[1]}


def _open_sample(
  codec: tokens.Codec, path: epath.Path, prompt_T: np.ndarray
) -> _Sample:
  if isinstance(codec, text.TextCodec):
    return _TextSample(codec, path, prompt_T)
  return _Sample(codec, path, prompt_T)


def write(
  codec: tokens.Codec, path: epath.Path, ids_T: np.ndarray, num_prompt: int
) -> dict[str, Any]:
  """Writes an artifact and its companions; what samples.json says of them."""
  data, num_repairs = codec.write(ids_T)
  path.write_bytes(data)
  if isinstance(codec, image.ImageCodec):
    num_missing = codec.decode(ids_T)[1]
    complete = num_missing == 0
    return {'repairs': num_repairs - num_missing, 'complete': complete}
  if isinstance(codec, music.MusicCodec):
    companions = _music_companions(codec, path, ids_T, num_prompt)
    return {'repairs': num_repairs} | companions
  return {'repairs': num_repairs}


def _music_companions(
  codec: music.MusicCodec, path: epath.Path, ids_T: np.ndarray, num_prompt: int
) -> dict[str, Any]:
  mark = codec.seconds(ids_T[:num_prompt]) if num_prompt else None
  roll = path.with_suffix('.png')
  notes = codec.decode(ids_T).notes
  roll.write_bytes(piano_roll.piano_roll_png(notes, mark=mark))
  wav = path.with_suffix('.wav')
  reason = audio_render.render_wav(path, wav)
  sound = {'no_audio': reason} if reason else {'audio': wav.name}
  return {'piano_roll': roll.name} | sound


def _write_grid(
  codec: image.ImageCodec, path: epath.Path, rows: Sequence[Sequence[Any]]
) -> None:
  """One picture: a row for each prompt, with all that came of it."""
  pictures = [codec.decode(ids_T)[0] for row in rows for ids_T in row]
  path.write_bytes(image.grid_png(pictures, columns=len(rows[0])))


def write_samples(
  sampler: Sampler,
  prompts: Sequence[Prompt],
  how: SampleConfig,
  codec: tokens.Codec,
  folder: epath.PathLike,
  known: drawn_lib.Drawn,
  watch: Callable[[str, str], None],
) -> dict[str, Any]:
  """Draws samples of every prompt and writes them to FOLDER/sample-I.*.

  A sample ends early where it draws EOS, and where its document is full. What
  is `known` is not drawn again; it is kept up to date, and removed at the end.
  `watch` is told what begins, as `watchdog.Watchdog` wants it.

  Returns:
    What `samples.json` says of them; file names are relative to the folder.
  """
  lengths = [
    sampler.room(len(prompt.tokens_T), how.length) for prompt in prompts
  ]
  target = epath.Path(folder)
  target.mkdir(parents=True, exist_ok=True)
  _remove_last(target)
  num_known = sum(part_BT.size for part_BT in known.parts_BT)
  start = time.monotonic()
  files, drawn = [], []
  with (
    Progress('sample', sum(lengths), 'tokens') as progress,
    _kept_if_interrupted(drawn, known),
  ):
    for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
      for _ in range(how.num_samples):
        files.append(f'sample-{len(files)}{codec.suffix}')
        path = target / files[-1]
        drawn.append(_open_sample(codec, path, prompt.tokens_T))
      own = drawn[-how.num_samples :]
      before_BT = known.of(i, how.num_samples)
      _take(own, before_BT, progress)
      for new_BT in _new_tokens(sampler, prompt, length, before_BT, watch):
        known.add(i, new_BT)
        _take(own, new_BT, progress)
  known.write()  # whatever becomes of the others while files are written
  seconds = time.monotonic() - start
  num_tokens = sum(len(sample.ids) for sample in drawn) - num_known
  about = []
  for at, (file, sample) in enumerate(zip(files, drawn, strict=True)):
    facts = {'num_tokens': len(sample.ids), 'ended': sample.ended}
    prompt = at // how.num_samples
    watch('file', f'writing {file}')
    about.append({'file': file, 'prompt': prompt} | facts | sample.close())
    distributed.barrier(_WRITTEN)
  report = {
    **dataclasses.asdict(how),
    'seconds': round(seconds, 3),
    'tokens_per_second': round(max(num_tokens, 0) / seconds, 1),
    **_companions(codec, prompts, lengths, drawn, target, watch),
    'samples': about,
  }
  known.remove()
  return report


def draw_along(
  sampler: Sampler,
  prompts: Sequence[Prompt],
  how: SampleConfig,
  known: drawn_lib.Drawn,
  watch: Callable[[str, str], None],
) -> None:
  """What `write_samples` draws on process 0, on the others: nothing is kept."""
  lengths = [
    sampler.room(len(prompt.tokens_T), how.length) for prompt in prompts
  ]
  for i, (prompt, length) in enumerate(zip(prompts, lengths, strict=True)):
    before_BT = known.of(i, how.num_samples)
    for _ in _new_tokens(sampler, prompt, length, before_BT, watch):
      pass  # all are drawn by all
  watch('end', 'waiting for the samples')
  for _ in range(len(prompts) * (how.num_samples + 1)):
    distributed.barrier(_WRITTEN)


def _new_tokens(
  sampler: Sampler,
  prompt: Prompt,
  length: int,
  before_BT: np.ndarray,
  watch: Callable[[str, str], None],
) -> Iterator[np.ndarray]:
  """Yields [B, some] tokens until all samples of a prompt have ended."""
  has_ended_B = (before_BT == tokens.EOS).any(axis=1)
  left = length - before_BT.shape[1]
  if has_ended_B.all() or left <= 0:
    return
  distributed.check_present('sample')
  watch('prompt', 'the first tokens after a prompt')
  for new_BT in sampler.run(_start(prompt.tokens_T), length, before_BT):
    yield new_BT
    has_ended_B |= (new_BT == tokens.EOS).any(axis=1)
    left -= new_BT.shape[1]
    if has_ended_B.all():
      return
    if left > 0:
      distributed.check_present('sample')  # else the next would fail
      watch('sample', f'the next tokens of {left} that are left')


def _start(prompt_T: np.ndarray) -> np.ndarray:
  return np.concatenate([[tokens.SOS], prompt_T]).astype(np.int32)


def _remove_last(folder: epath.Path) -> None:
  # From here on the last samples are gone, and so is what is said of them.
  for pattern in (
    'samples.json',
    'sample-*',
    'prompt-*',
    'original-*',
    'grid*',
  ):
    for old in folder.glob(pattern):
      old.unlink()


def _take(
  samples: Sequence[_Sample], new_BT: np.ndarray, progress: Progress
) -> None:
  for sample, ids_T in zip(samples, new_BT, strict=True):
    sample.draw(ids_T)
  progress.advance(new_BT.shape[1])


@contextlib.contextmanager
def _kept_if_interrupted(
  samples: Sequence[_Sample], known: drawn_lib.Drawn
) -> Iterator[None]:
  try:
    yield
  except BaseException:
    known.write()
    # What is interrupted is worth a look, too.
    for sample in samples:
      sample.close()
    raise


def _beside(
  codec: tokens.Codec, path: epath.Path, ids_T: np.ndarray, num_prompt: int
) -> dict[str, Any]:
  about = write(codec, path, ids_T, num_prompt)
  del about['repairs']  # of what was no sample
  return {'file': path.name} | about


def _companions(
  codec: tokens.Codec,
  prompts: Sequence[Prompt],
  lengths: list[int],
  drawn: Sequence[_Sample],
  folder: epath.Path,
  watch: Callable[[str, str], None],
) -> dict[str, Any]:
  """Prompts and originals beside the samples, and a picture of pictures."""
  per_prompt = len(drawn) // len(prompts)
  entries, rows = [], []
  for i, prompt in enumerate(prompts):
    watch('file', f'writing what is beside prompt {i}')
    num = len(prompt.tokens_T)
    entry: dict[str, Any] = {'name': prompt.name, 'num_tokens': num}
    own = drawn[i * per_prompt : (i + 1) * per_prompt]
    row = [np.concatenate([prompt.tokens_T, one.ids]) for one in own]
    if num:
      file = f'prompt-{i}{codec.suffix}'
      entry |= _beside(codec, folder / file, prompt.tokens_T, 0)
      row.insert(0, prompt.tokens_T)
    if prompt.original_T is not None:
      # As much of it as was drawn, to compare like with like.
      original_T = prompt.original_T[: num + lengths[i]]
      file = f'original-{i}{codec.suffix}'
      entry['original'] = _beside(codec, folder / file, original_T, num)
      row.append(original_T)
    entries.append(entry)
    rows.append(row)
    distributed.barrier(_WRITTEN)
  described: dict[str, Any] = {'prompts': entries}
  if isinstance(codec, image.ImageCodec):
    _write_grid(codec, folder / 'grid.png', rows)
    described['grid'] = 'grid.png'
  return described
