"""What the command line turns into one sentence and an exit status."""

MISTAKE = 2  # of the user's: the same again would fail again
# Saved, or nothing lost: start it again. Launchers do; `man sysexits` has it
# as EX_TEMPFAIL.
RESTART = 75


class UserError(ValueError):
  """A mistake of the user's: the values at fault, and what to do instead."""


class SaveError(RuntimeError):
  """A checkpoint could not be written: what is computed after it is lost."""


class CorruptionError(RuntimeError):
  """A device holds other bits than it should: what is saved has them right."""


class HostsError(RuntimeError):
  """A host is missing, or taken away: started again, the job may be whole."""


def explain(error: BaseException) -> tuple[str, int]:
  """What to say, or '' where that takes a traceback, and the exit status."""
  if isinstance(error, UserError):
    return str(error), MISTAKE
  if isinstance(error, HostsError | CorruptionError):
    return str(error), RESTART
  if isinstance(error, SaveError):
    return str(error), 1
  said = str(error).partition('\n')[0]
  if type(error).__name__ == 'JaxRuntimeError' and 'Gloo' in said:
    return f'another process of the job has gone ({said}); run again', RESTART
  # Others than those of a path are not the user's mistakes.
  if isinstance(error, OSError) and error.filename is not None:
    return f'{error.filename}: {error.strerror}; use another path', MISTAKE
  return '', 1
