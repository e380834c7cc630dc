"""Config files and the flags that set their keys, as a checked `Config`."""

import contextlib
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from absl import flags
from ml_collections import ConfigDict, config_flags

from perceiver_ar import config as config_lib
from perceiver_ar.config import Config
from perceiver_ar.errors import UserError


def resolve(rest: list[str], base: dict[str, Any] | None) -> Config:
  """Applies --config=FILE and --config.KEY=VALUE to a file or to `base`."""
  for word in rest:
    if not word.startswith(('--config=', '--config.')):
      raise UserError(
        f'{word} is no flag of this command; see --help (config keys are set '
        'by --config.SECTION.KEY=VALUE)'
      )
  values = flags.FlagValues()
  with _reading(rest):
    if any(word.startswith('--config=') for word in rest) or base is None:
      config_flags.DEFINE_config_file('config', flag_values=values)
    else:
      config_flags.DEFINE_config_dict(
        'config', ConfigDict(base), flag_values=values
      )
    values(['perceiver-ar', *rest])
    raw = values['config'].value
  if not isinstance(raw, ConfigDict):
    # A file that is missing comes as an object that raises when it is used.
    raise UserError(
      f'cannot read {" ".join(rest)}: there is no such file, or its get_config '
      'returns no ConfigDict; see configs/'
    )
  return config_lib.resolve(raw.to_dict())


@contextlib.contextmanager
def _reading(rest: list[str]) -> Iterator[None]:
  """Config files may import their neighbours; what they raise is a mistake."""
  files = [word[9:] for word in rest if word.startswith('--config=')]
  roots = [str(Path(f.split(':')[0]).resolve().parent.parent) for f in files]
  before, argv = list(sys.path), sys.argv
  sys.path[:0] = [*roots, str(Path.cwd())]
  # config_flags looks for overrides here, whatever it is given to parse.
  sys.argv = ['perceiver-ar', *rest]
  try:
    yield
  except Exception as error:
    reason = str(error.args[0] if error.args else error).strip()
    if 'Traceback' in reason:  # of what get_config raised
      reason = reason.splitlines()[-1]
    if reason[:1] in ('"', "'") and reason[:1] == reason[-1:]:  # KeyError's
      reason = reason[1:-1]
    reason = reason.replace('\\n', ' ').replace("\\'", "'")
    raise UserError(
      f'cannot read {" ".join(rest)}: {reason.rstrip(".")}; check the file '
      'and the keys, configs/default.py lists them all'
    ) from error
  finally:
    sys.path[:], sys.argv = before, argv
