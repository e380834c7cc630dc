"""Folders here and in buckets (gs://...), through etils.epath alike."""

from etils import epath


def is_bucket(path: epath.PathLike) -> bool:
  """Whether files there can be written as a whole only, not appended to."""
  return '://' in str(epath.Path(path))


def absolute(path: epath.PathLike) -> epath.Path:
  """As Orbax and JAX want it, whatever folder a process works in.

  A bucket's paths always are, but `epath` would resolve them as a folder's.
  """
  return epath.Path(path) if is_bucket(path) else epath.Path(path).resolve()
