"""What the command line turns into one sentence and an exit status."""

import errno
import os

MISTAKE = 2  # of the user's: the same again would fail again
# Saved, or nothing lost: start it again. Launchers do; `man sysexits` has it
# as EX_TEMPFAIL.
RESTART = 75
# Of storage and machines that are busy or away: the same may do again.
_PASSING_NAMES = (
  *('EIO', 'EAGAIN', 'EBUSY', 'EMFILE', 'ENFILE', 'ENOTCONN', 'ESTALE'),
  *('ETIMEDOUT', 'EREMOTEIO', 'ECONNREFUSED', 'ECONNRESET', 'EHOSTDOWN'),
  *('EHOSTUNREACH', 'ENETDOWN', 'ENETUNREACH'),
)
PASSING = frozenset(
  getattr(errno, name) for name in _PASSING_NAMES if hasattr(errno, name)
)
_FULL = frozenset({errno.ENOSPC, errno.EDQUOT})


class UserError(ValueError):
  """A mistake of the user's: the values at fault, and what to do instead."""


class PassingError(UserError):
  """Storage is busy or away: what is asked of it may be right."""


class SaveError(RuntimeError):
  """A checkpoint could not be written: what is computed after it is lost."""


class CorruptionError(RuntimeError):
  """A device holds other bits than it should: what is saved has them right."""


class HostsError(RuntimeError):
  """A host is missing, or taken away: started again, the job may be whole."""


def check_passing(error: BaseException, what: object) -> None:
  """Raises PassingError if `error` is one of storage that may be over soon."""
  if any(os.strerror(number) in str(error) for number in PASSING):
    raise PassingError(
      f'{what} cannot be read now ({error}); run again when that is over'
    ) from error


def explain(error: BaseException) -> tuple[str, int]:
  """What to say, or '' where that takes a traceback, and the exit status."""
  if isinstance(error, HostsError | CorruptionError | PassingError):
    return str(error), RESTART
  if isinstance(error, UserError):
    return str(error), MISTAKE
  if isinstance(error, SaveError):
    return str(error), 1
  said = str(error).partition('\n')[0]
  # A program that is run where it is called raises ValueError.
  if type(error).__name__ in ('JaxRuntimeError', 'ValueError'):
    if 'Gloo' in said:
      return f'another process of the job has gone ({said}); run again', RESTART
    if 'RESOURCE_EXHAUSTED' in said:
      return (
        f'the memory of a device is too small ({said}); `perceiver-ar plan` '
        'finds a change that fits'
      ), 1  # another process may have held it
  if isinstance(error, OSError) and error.errno in PASSING | _FULL:
    where = f'{error.filename}: ' if error.filename is not None else ''
    if error.errno in _FULL:  # as a save that fails of it
      return f'{where}{error.strerror}; make room there and run again', 1
    return f'{where}{error.strerror}; run again when that is over', RESTART
  # Others than those of a path are not the user's mistakes.
  if isinstance(error, OSError) and error.filename is not None:
    return f'{error.filename}: {error.strerror}; use another path', MISTAKE
  return '', 1
