"""Rotary positions: channel pairs turned by angles (Su et al. 2021).

The published model pairs neighbours (2r, 2r + 1). Here channel r of a head is
paired with r + R: the same model with the columns of the query and key
projections permuted, and whole vectors move instead of single channels;
`tools/import_official.py` permutes.

Letters: B batch, T positions, H heads, K head size, R pairs.
"""

import dataclasses

import jax
import jax.numpy as jnp


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turn:
  """The angles of some positions, which are constants: they get no gradient.

  Attributes:
    sin: [B, T, R] float32, R <= K / 2.
    cos: of the same.
  """

  sin: jax.Array
  cos: jax.Array

  def back(self) -> 'Turn':
    """The rotation that undoes this one, its transpose."""
    return Turn(-self.sin, self.cos)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Turns:
  """What attention rotates; None what it does not, or what is rotated already.

  Attributes:
    queries: of T = N positions.
    keys: of T = M positions.
  """

  queries: Turn | None = None
  keys: Turn | None = None

  def back(self) -> 'Turns':
    return Turns(*(turn and turn.back() for turn in (self.queries, self.keys)))


def rotate(x_BTHK: jax.Array, turn: Turn | None, num_heads: int) -> jax.Array:
  """Rotates the first 2R channels of the first `num_heads` heads."""
  if turn is None or not turn.sin.shape[-1] or not num_heads:
    return x_BTHK
  sin, cos = (
    x[:, :, None, :].astype(x_BTHK.dtype) for x in (turn.sin, turn.cos)
  )
  R = sin.shape[-1]
  heads, rest = x_BTHK[:, :, :num_heads], x_BTHK[:, :, num_heads:]
  a, b, tail = heads[..., :R], heads[..., R : 2 * R], heads[..., 2 * R :]
  turned = [a * cos - b * sin, b * cos + a * sin, tail]
  return jnp.concatenate([jnp.concatenate(turned, -1), rest], 2)
