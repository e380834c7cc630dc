"""Asks whether anything is known against the packages of constraints.txt.

  make audit

The exit status is 1 if there is, and 2 if nobody could be asked.
"""

import json
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_PINNED = Path(__file__).parents[1] / 'constraints.txt'
_ADVICE = 'connect to the network, or run it where the service can be reached'


def main() -> int:
  command = [
    *(sys.executable, '-m', 'pip_audit', f'--requirement={_PINNED}'),
    *('--no-deps', '--disable-pip', '--format=json', '--progress-spinner=off'),
  ]
  done = subprocess.run(command, capture_output=True, text=True, check=False)
  try:
    packages = json.loads(done.stdout)['dependencies']
  except (ValueError, KeyError):
    said = done.stderr.strip().splitlines() or ['it says nothing']
    return _unknown(said[-1])
  return _tell(packages)


def _tell(packages: Sequence[Mapping[str, Any]]) -> int:
  """Says what is known of each; pip-audit calls it none if it found none."""
  skipped = [package for package in packages if 'skip_reason' in package]
  if len(skipped) == len(packages):
    why = skipped[0]['skip_reason'] if skipped else 'there are no packages'
    return _unknown(why)
  for package in skipped:
    print(f'audit: not asked: {package["skip_reason"]}')
  found = [
    (f'{package["name"]} {package["version"]}', about)
    for package in packages
    for about in package.get('vulns', ())
  ]
  for name, about in found:
    fixed = ', '.join(about['fix_versions']) or 'no version yet'
    print(f'audit: {name}: {about["id"]}, mended in {fixed}')
  num = len(packages) - len(skipped)
  print(f'audit: {len(found)} vulnerabilities are known of {num} packages')
  return 1 if found else 0


def _unknown(why: str) -> int:
  print(
    'audit: the vulnerability service cannot be asked, so nothing is known '
    f'({" ".join(why.split())[:300]}); {_ADVICE}',
    file=sys.stderr,
  )
  return 2


if __name__ == '__main__':
  sys.exit(main())
