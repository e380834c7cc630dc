"""The blocks of `flash`: the largest that fit a core's own memory (VMEM).

Letters: B batch, N queries, M keys, H heads, K head size; U groups of G heads,
W = G*K lanes of a group; Q queries of a block, C keys of a block; R pairs of
rotated channels.
"""

import dataclasses
import itertools

import jax
from jax.experimental import pallas as pl

from perceiver_ar.errors import UserError
from perceiver_ar.ops.masks import Mask
from perceiver_ar.ops.rotation import Turns

_LANES = 128
_SIZES = (1024, 512, 256, 128)
# Every TPU grants the first; v4 has no more, v5p 64 MiB, v5e and v6e 128 MiB.
_VMEM_LIMITS = tuple(mib * 2**20 for mib in (16, 32, 60, 120))


@dataclasses.dataclass(frozen=True)
class Plan:
  """The sizes of one call."""

  offset: int
  batch: int  # B
  num_queries: int  # N
  num_keys: int  # M
  num_groups: int  # U
  heads: int  # G
  width: int  # W
  pairs: int  # R, 0 if nothing is rotated
  itemsize: int
  backward: bool
  queries: int = 0  # Q
  keys: int = 0  # C

  @property
  def head_size(self) -> int:
    return self.width // self.heads

  @property
  def scale(self) -> float:
    """Of the scores."""
    return self.head_size**-0.5

  @property
  def query_blocks(self) -> int:
    return pl.cdiv(self.num_queries, self.queries)

  @property
  def key_blocks(self) -> int:
    return pl.cdiv(self.num_keys, self.keys)

  @property
  def vmem(self) -> int:
    """Bytes: inputs and outputs (twice, to overlap copies), sums, scores."""
    split = 12 if self.itemsize == 4 else 0  # float32 is multiplied in parts
    kept = 4 * self.query_blocks if self.backward else 0
    turned = 2 * self.itemsize if self.pairs else 0
    per_key = self.keys * (8 * self.itemsize + 16 + split + turned)
    per_query = self.queries * (6 * self.itemsize + 8 + split + turned + kept)
    # Heads across the borders of lanes take registers that there are not.
    across = _LANES % self.head_size and self.head_size % _LANES
    spilled = 16 if across else 0
    scores = self.queries * self.keys * (16 + split + spilled)
    width = self.width + -self.width % _LANES
    return scores + (per_key + per_query) * width

  @property
  def granted(self) -> int:
    """The least memory to ask for; more may not exist."""
    return min(limit for limit in _VMEM_LIMITS if self.vmem <= limit)

  def lanes(self, head: int) -> slice:
    """Where a head of a group is among the group's W."""
    return slice(head * self.head_size, (head + 1) * self.head_size)


def choose(
  q_BNF: jax.Array,
  k_BMF: jax.Array,
  mask: Mask,
  turns: Turns,
  head_size: int,
  *,
  backward: bool,
) -> Plan:
  """The largest blocks that should fit."""
  (B, N, F), M, K = q_BNF.shape, k_BMF.shape[1], head_size
  H = F // K
  assert q_BNF.dtype == k_BMF.dtype, (q_BNF.dtype, k_BMF.dtype)
  assert (turns.queries is None) == (turns.keys is None)
  assert turns.keys is None or len(turns.keys.sin) == B
  G = heads_of_a_group(H, K)
  sizes = Plan(
    *(mask.offset, B, N, M, H // G, G, G * K),
    pairs=0 if turns.keys is None else turns.keys.sin.shape[-1],
    itemsize=q_BNF.dtype.itemsize,
    backward=backward,
  )
  plans = [
    dataclasses.replace(sizes, queries=_even(N, queries), keys=_even(M, keys))
    for queries, keys in itertools.product(_SIZES, repeat=2)
  ]
  for limit in _VMEM_LIMITS:
    if fitting := [p for p in plans if p.vmem <= limit]:
      return max(fitting, key=lambda p: (p.queries * p.keys, p.queries))
  raise UserError(
    f'flash attention of {N} latents with heads of {K} does not fit a TPU '
    "core's own memory: use fewer latents or smaller heads"
  )


def heads_of_a_group(H: int, K: int) -> int:
  """The fewest that fill whole lanes, or all."""
  filling = [g for g in range(1, H) if H % g == 0 and g * K % _LANES == 0]
  return filling[0] if filling else H


def _even(size: int, block: int) -> int:
  """At most `block`, whole lanes, and no more blocks than that takes."""
  size = pl.cdiv(size, pl.cdiv(size, block))
  return size + -size % _LANES
