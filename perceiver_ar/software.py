"""What a process runs: Python, packages, and our own code."""

import functools
import hashlib
import pathlib
import platform
import re
from importlib import metadata

# What JAX finds devices with, if it is there.
_PLUGINS = re.compile('libtpu|jax[-_]cuda.*|nvidia[-_].*')


def facts() -> dict[str, str]:
  """Versions by package, and a digest of our code, as `code`."""
  folder = pathlib.Path(__file__).parent
  code = hashlib.sha256()
  for path in sorted(folder.rglob('*.py')):
    code.update(path.relative_to(folder).as_posix().encode())
    code.update(path.read_bytes())
  return _versions() | {'code': code.hexdigest()[:16]}


@functools.cache  # the metadata of all that is installed is read for it
def _versions() -> dict[str, str]:
  names = [found.name or '' for found in metadata.distributions()]
  versions: dict[str, str] = {}
  for name in ['perceiver-ar', *filter(_PLUGINS.fullmatch, names)]:
    _add_versions(name, versions)
  return {'python': platform.python_version()} | dict(sorted(versions.items()))


def _add_versions(package: str, versions: dict[str, str]) -> None:
  """Of an installed package, and of all that it needs without its extras."""
  name = re.sub('[-_.]+', '-', package).lower()
  if name in versions:
    return
  try:
    found = metadata.distribution(name)
  except metadata.PackageNotFoundError:
    return  # of another platform
  versions[name] = found.version
  for requirement in found.requires or ():
    needed = re.match(r'[\w.-]+', requirement)
    if needed and 'extra ==' not in requirement:
      _add_versions(needed[0], versions)
