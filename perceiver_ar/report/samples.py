"""Samples on the page: text to read, rolls and pictures to look at."""

import base64
from collections.abc import Mapping
from typing import Any

from etils import epath

from perceiver_ar.errors import UserError
from perceiver_ar.report import page


def section(folder: epath.Path, about: Mapping[str, Any]) -> str:
  """All samples of a folder, as its samples.json tells.

  Raises:
    UserError: a file that it names is missing, or in another folder.
  """
  parts = [page.note(_how(about))]
  if 'grid' in about:
    parts.append(_grid(_beside(folder, about['grid']), about))
  for index, prompt in enumerate(about['prompts']):
    if 'file' in prompt:
      parts += _artifact(folder, prompt, f'prompt {prompt["name"]}')
    for sample in about['samples']:
      if sample['prompt'] == index:
        end = ', ended by itself' if sample['ended'] else ''
        title = f'{sample["num_tokens"]:,} tokens{end}{_repairs(sample)}'
        parts += _artifact(folder, sample, title)
    if 'original' in prompt:
      original = prompt['original']
      parts += _artifact(folder, original, f'{prompt["name"]} as it is')
  return page.section('Samples', *parts)


def _how(about: Mapping[str, Any]) -> str:
  how = [f'temperature {about["temperature"]:g}']
  if about['top_p'] < 1:
    how.append(f'top p {about["top_p"]:g}')
  if about['top_k']:
    how.append(f'top k {about["top_k"]}')
  return (
    f'Drawn at step {about["step"]:,} with {", ".join(how)}, seed '
    f'{about["seed"]}, {about["tokens_per_second"]:,.0f} tokens a second, '
    'not chosen among others.'
  )


def _repairs(about: Mapping[str, Any]) -> str:
  number = about.get('repairs', 0)
  return f', {number:,} repairs' if number else ''


def _grid(path: epath.Path, about: Mapping[str, Any]) -> str:
  per_prompt = len(about['samples']) // len(about['prompts'])
  columns = [f'{per_prompt} samples']
  if 'file' in about['prompts'][0]:
    columns.insert(0, 'the prompt')
  if 'original' in about['prompts'][0]:
    columns.append('the original')
  return _picture(path) + page.note(
    f'In each row: {", ".join(columns)}. A checkerboard stands where nothing '
    'is drawn yet.'
  )


def _artifact(
  folder: epath.Path, about: Mapping[str, Any], title: str
) -> list[str]:
  path = _beside(folder, about['file'])
  heading = page.heading(path.name, title)
  if path.suffix == '.png':
    return []  # on the grid
  if path.suffix == '.txt':
    content = _read(path).decode(errors='replace')
    return [heading, page.verbatim(content)]
  parts = [heading, _picture(_beside(folder, about['piano_roll']))]
  link = f'{folder.name}/{path.name}'
  parts.append(page.link(link, 'MIDI file'))
  if 'audio' in about:
    name = _beside(folder, about['audio']).name
    parts.append(page.audio(f'{folder.name}/{name}'))
  return parts


def _beside(folder: epath.Path, name: str) -> epath.Path:
  """A file of the folder, and of no other: the page shows what is in it."""
  path = folder / name
  if path.name != name or path.parent != folder or name == '..':
    raise UserError(
      f'{folder / "samples.json"} names {name!r}, which is no file beside it; '
      'run perceiver-ar sample again'
    )
  return path


def _picture(path: epath.Path) -> str:
  data = base64.b64encode(_read(path)).decode()
  return page.figure(
    f'<img src="data:image/png;base64,{data}" alt="{page.escape(path.name)}">'
  )


def _read(path: epath.Path) -> bytes:
  try:
    return path.read_bytes()
  except FileNotFoundError as error:
    raise UserError(
      f'{path} is missing, which samples.json names; run perceiver-ar sample '
      'again'
    ) from error
