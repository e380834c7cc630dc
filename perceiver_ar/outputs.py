"""What commands say to programs."""

import json
from typing import Any

from etils import epath

from perceiver_ar.errors import UserError


def as_json(content: Any) -> str:
  try:
    return json.dumps(content, indent=2, allow_nan=False) + '\n'
  except ValueError as error:
    raise UserError(
      f'the result is not finite ({content}); use an earlier --step, or '
      'inputs within what the model was trained on'
    ) from error


def write_json(content: Any, *paths: epath.PathLike | None) -> None:
  for path in paths:
    if path:
      epath.Path(path).write_text(as_json(content))
