"""Which saved steps are kept."""

import dataclasses
from collections.abc import Mapping, Sequence

from orbax.checkpoint import checkpoint_managers

from perceiver_ar.config import CheckpointConfig


@dataclasses.dataclass
class Preservation(checkpoint_managers.PreservationPolicy):
  """Keeps the newest step, the newest and all of some regular ones, the best.

  Orbax's own BestN keeps steps without a metric forever by default, counts
  them as best while there are few, and reads the metrics of damaged steps.
  """

  config: CheckpointConfig
  losses: Mapping[int, float]

  def should_preserve(
    self,
    checkpoints: Sequence[checkpoint_managers.PolicyCheckpointInfo],
    *,
    context: checkpoint_managers.PreservationContext,
  ) -> Sequence[bool]:
    del context
    config = self.config
    steps = sorted(checkpoint.step for checkpoint in checkpoints)
    regular = [step for step in steps if step % config.save_every == 0]
    every = config.keep_every
    scored = [step for step in steps if step in self.losses]
    scored.sort(key=lambda step: (self.losses[step], -step))
    kept = {
      steps[-1],
      *regular[-config.keep_latest :],
      *scored[: config.keep_best],
      *(step for step in regular if every and step % every == 0),
    }
    return [checkpoint.step in kept for checkpoint in checkpoints]
