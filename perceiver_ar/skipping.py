"""Which steps are skipped, and what is said of them.

A step whose loss or gradient is not finite changes nothing, nor does, where
`train.spike_deviations` asks for it, one whose loss is far above the usual.
"""

import dataclasses
import logging
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp

# So many losses, the last ones, say what is usual: fewer would follow a loss
# that climbs, more would lag behind one that falls. Until there are as many,
# while the optimizer warms up, no loss is judged.
USUAL_STEPS = 100

NONFINITE, SPIKE = 'nonfinite', 'spike'
_WORDS = {
  NONFINITE: 'whose loss or gradient was not finite',
  SPIKE: 'whose loss was a spike',
}
_LOWER = 'train with a lower optimizer.learning_rate in another --workdir'
_REMEDIES = {
  NONFINITE: _LOWER,
  SPIKE: 'raise train.spike_deviations if the loss has moved for good, '
  + _LOWER,
}
_log = logging.getLogger(__name__)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class UsualLoss:
  """What the loss per target has been, in the steps that were not skipped.

  Attributes:
    num_steps: int32 [].
    mean: float32 [], running.
    variance: float32 [], of the same.
  """

  num_steps: Any
  mean: Any
  variance: Any

  @classmethod
  def empty(cls) -> 'UsualLoss':
    return cls(jnp.int32(0), jnp.float32(0), jnp.float32(0))

  def including(self, loss: jax.Array) -> 'UsualLoss':
    """Plain mean and variance at first, exponential ones then."""
    num_steps = self.num_steps + 1
    rate = 1 / jnp.minimum(num_steps, USUAL_STEPS).astype(jnp.float32)
    above = loss - self.mean
    return UsualLoss(
      num_steps=num_steps,
      mean=self.mean + rate * above,
      variance=(1 - rate) * (self.variance + rate * above**2),
    )

  def is_exceeded(self, loss: jax.Array, deviations: float) -> jax.Array:
    """Whether `loss` is so many standard deviations above the mean; 0: never.

    What is skipped does not become usual: if the loss has moved for good, all
    steps are skipped from there on, and their limit ends the run.
    """
    if not deviations:
      return jnp.bool(False)
    limit = self.mean + deviations * jnp.sqrt(self.variance)
    return (self.num_steps >= USUAL_STEPS) & (loss > limit)


def reason(values: Mapping[str, float]) -> str:
  """Why a step with these metrics was skipped; '' if it was not."""
  if not values['skipped']:
    return ''
  return SPIKE if values['is_spike'] else NONFINITE


class Skips:
  """Skipped steps as a process has seen them."""

  def __init__(self) -> None:
    self._num = 0
    self._in_a_row: list[str] = []  # why

  def add(self, step: int, row: Mapping[str, Any], reason: str) -> None:
    """Warns of a skipped step; of ever fewer if there are many."""
    if not reason:
      self._in_a_row.clear()
      return
    self._in_a_row.append(reason)
    self._num += 1
    rare = self._num <= 4 or self._num.bit_count() == 1
    if rare and jax.process_index() == 0:
      _log.warning(
        'step %d is skipped (%s): loss %.4g, gradient norm %.4g, batch %s; '
        'skipped since the start: %d',
        *(step, reason, row['loss'], row['grad_norm'], row['data_digest']),
        self._num,
      )

  def story(self, num: int) -> str:
    """Of `num` steps in a row, some perhaps before this process began."""
    counts = {why: self._in_a_row.count(why) for why in _WORDS}
    parts = [f'{n} {_WORDS[why]}' for why, n in counts.items() if n]
    return f'{num} steps in a row were skipped, {" and ".join(parts)}'

  def remedy(self) -> str:
    return _REMEDIES[self._in_a_row[-1]]
