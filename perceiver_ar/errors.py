"""What the command line turns into one sentence and exit status 2."""


class UserError(ValueError):
  """A mistake of the user's: the values at fault, and what to do instead."""
