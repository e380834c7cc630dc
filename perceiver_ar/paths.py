"""Folders here and in buckets (gs://...), through etils.epath alike."""

import importlib.util

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


def absolute(path: epath.PathLike) -> epath.Path:
  """As Orbax and JAX want it, whatever folder a process works in.

  A bucket's paths always are, but `epath` would resolve them as a folder's.
  """
  check(path)
  return epath.Path(path) if is_bucket(path) else epath.Path(path).resolve()
