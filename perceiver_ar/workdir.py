"""What a workdir says of its run: its config, and the data it was begun on.

`config.json` is the resolved config. `dataset.json` and `vocabulary/` hold
what sampling needs of the data set, so that a workdir can be copied without
it: the fingerprint, the vocabulary and the layout of positions.
"""

import dataclasses
import json
import uuid
from typing import Any, Protocol, TypeAlias

import jax
import numpy as np
from etils import epath

from perceiver_ar import config as config_lib
from perceiver_ar import distributed, paths, software
from perceiver_ar.config import Config
from perceiver_ar.data import codecs, layouts, stated, tokens
from perceiver_ar.errors import UserError

Path: TypeAlias = epath.PathLike


class DataSet(Protocol):
  """Any split of a data set, as `data.pipeline.open_documents` returns it."""

  @property
  def fingerprint(self) -> str: ...
  @property
  def codec(self) -> tokens.Codec: ...
  @property
  def layout(self) -> dict[str, Any]: ...


@dataclasses.dataclass(frozen=True, kw_only=True)
class Trained:
  """What a model was trained on."""

  fingerprint: str
  codec: tokens.Codec
  layout: dict[str, Any]


@dataclasses.dataclass(frozen=True, kw_only=True)
class _Data:
  """What dataset.json says."""

  fingerprint: str
  vocabulary: dict[str, Any]
  positions: dict[str, Any]


def check(workdir: Path, config: Config, data: DataSet) -> None:
  """Raises UserError if the workdir belongs to another run."""
  folder = epath.Path(workdir)
  if (folder / 'config.json').exists():
    check_config(workdir, config_lib.resolve(read_config(workdir)), config)
  if (folder / 'dataset.json').exists():
    # Not what `vocabulary/` holds: a crash may have cut it, and the data set
    # has it whole.
    check_data(folder, _read_data(folder).fingerprint, data)
    check_vocabulary(workdir, data)


def check_config(workdir: Path, old: Config, new: Config) -> None:
  if lines := config_lib.differences(old, new):
    raise UserError(
      f'{epath.Path(workdir)} belongs to another config: {"; ".join(lines)}; '
      'choose another --workdir, or set these keys back'
    )


def begin(workdir: Path, config: Config, data: DataSet) -> None:
  """Writes what identifies the run, if it is the workdir's own or its first.

  Raises:
    UserError: the workdir belongs to another config or another data set; the
      differences are listed.
  """
  check(workdir, config, data)
  folder = epath.Path(workdir)
  _write_dataset(folder, data)
  paths.write_whole(folder / 'config.json', config.to_json().encode())


def agree(config: Config, data: DataSet, **extra: str) -> None:
  """All processes of a job have the same config, data, code and packages.

  Args:
    config: of the command.
    data: that it reads.
    extra: what else must be the same, by name.

  Raises:
    UserError: one of them has not; it is named, with what differs.
  """
  facts = software.facts() | {'data set': data.fingerprint[:16]}
  for section, values in dataclasses.asdict(config).items():
    facts |= {f'{section}.{k}': repr(v) for k, v in values.items()}
  del facts['data.path']  # hosts may have the same data in other places
  distributed.agree(facts | extra)


def check_shared(workdir: Path) -> None:
  """Raises UserError unless all processes see what process 0 writes."""
  token = distributed.exchange('files', str(uuid.uuid4()))[0]
  seen = epath.Path(workdir) / f'.shared-{token}'
  with distributed.first_process_first() as is_first:
    if is_first:
      seen.parent.mkdir(parents=True, exist_ok=True)
      seen.write_text('')
  if not distributed.wait_for(seen.exists):
    raise UserError(
      f'process {distributed.me()} does not see the {workdir} of process 0; '
      'use a --workdir that all hosts share'
    )
  distributed.barrier('files')
  if jax.process_index() == 0:
    seen.unlink()


def keep_compiled(workdir: Path, platform: str) -> None:
  """What is compiled is there for the next start, on any hosts.

  Not on CPU, where a program is of the machine that compiled it; nor where
  JAX_COMPILATION_CACHE_DIR names another place.
  """
  name = 'jax_compilation_cache_dir'
  if platform == 'cpu' or getattr(jax.config, name):
    return
  jax.config.update(name, str(paths.absolute(workdir) / 'compiled'))


def check_data(where: Path, fingerprint: str, data: DataSet) -> None:
  """Raises UserError unless `data` is what `where` was trained on."""
  if fingerprint != data.fingerprint:
    raise UserError(
      f'{epath.Path(where)} was begun on data set '
      f'{fingerprint[:12] or "unknown"}, and data.path holds '
      f'{data.fingerprint[:12]}; give it back its data, or choose another '
      '--workdir'
    )


def check_vocabulary(workdir: Path, data: DataSet) -> None:
  """For evaluation on other data, which must still mean the same by an id."""
  folder = epath.Path(workdir)
  said = _read_data(folder).vocabulary
  old = tokens.read_vocabulary(said, str(folder / 'dataset.json'))
  new = tokens.vocabulary(data.codec)
  if old.sha256 != new.sha256:
    raise UserError(
      f'{folder} was trained with vocabulary {old.kind} {old.size} '
      f'({old.sha256[:12]}), and the data set has {new.kind} {new.size} '
      f"({new.sha256[:12]}); prepare the data with the model's vocabulary"
    )


def read_config(workdir: Path) -> dict[str, Any]:
  """The resolved config as a nested dict; `config.resolve` takes it."""
  return _read(epath.Path(workdir) / 'config.json')


def read_trained(workdir: Path) -> Trained:
  folder = epath.Path(workdir)
  said = _read_data(folder)
  fingerprint, layout = said.fingerprint, layouts.validated(said.positions)
  where = str(folder / 'dataset.json')
  vocabulary = tokens.read_vocabulary(said.vocabulary, where)
  codec = codecs.open_codec(vocabulary, layout, folder / 'vocabulary')
  return Trained(fingerprint=fingerprint, codec=codec, layout=layout)


def _read_data(folder: epath.Path) -> _Data:
  path = folder / 'dataset.json'
  return stated.read(_Data, _read(path), str(path), 'restore it from a copy')


def _write_dataset(folder: epath.Path, data: DataSet) -> None:
  vocabulary = codecs.save_codec(data.codec, folder / 'vocabulary')
  about = {
    'fingerprint': data.fingerprint,
    'vocabulary': dataclasses.asdict(vocabulary),
    'positions': data.layout,
  }
  content = json.dumps(about, default=np.ndarray.tolist)
  paths.write_whole(folder / 'dataset.json', f'{content}\n'.encode())


def _read(path: epath.Path) -> dict[str, Any]:
  try:
    return json.loads(path.read_text())
  except FileNotFoundError as error:
    raise UserError(
      f'{path} does not exist; --workdir must be the folder of a run'
    ) from error
  except (ValueError, RecursionError) as error:
    raise UserError(
      f'{path} is not JSON ({error}); restore it from a copy'
    ) from error
