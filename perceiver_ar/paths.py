"""Folders here and in buckets (gs://...), through etils.epath alike."""

import importlib.util
import os

from etils import epath

from perceiver_ar.errors import UserError


def is_bucket(path: epath.PathLike) -> bool:
  """Whether files there can be written as a whole only, not appended to."""
  return '://' in str(epath.Path(path))


def check(path: epath.PathLike) -> None:
  """Raises UserError if this installation cannot open such a path."""
  if not is_bucket(path):
    return
  if importlib.util.find_spec('gcsfs') is None:
    raise UserError(
      f'to open {path}, install what opens buckets: pip install '
      '"perceiver-ar[gcs]"'
    )
  import fsspec.config

  # It would remember for good what a folder held, and other hosts write to it.
  fsspec.config.conf.setdefault('gs', {})['use_listings_cache'] = False


def write_whole(path: epath.Path, content: bytes) -> None:
  """All or nothing, even if the process or the machine dies meanwhile."""
  path.parent.mkdir(parents=True, exist_ok=True)
  if is_bucket(path):  # which knows nothing else
    path.write_bytes(content)
    return
  temporary = path.parent / f'{path.name}.tmp'
  try:
    with temporary.open('wb') as file:
      file.write(content)
      file.flush()
      os.fsync(file.fileno())
    temporary.replace(path)
  finally:
    temporary.unlink(missing_ok=True)


def absolute(path: epath.PathLike) -> epath.Path:
  """As Orbax and JAX want it, whatever folder a process works in.

  A bucket's paths always are, but `epath` would resolve them as a folder's.
  """
  check(path)
  return epath.Path(path) if is_bucket(path) else epath.Path(path).resolve()
