"""Counts the multiplications of a traced function, loops and kernels included.

XLA's count takes loops once and kernels not at all; the trace has both, before
any platform is chosen.
"""

import dataclasses
import math
from collections.abc import Iterator
from typing import Any

from jax.extend import core

# How JAX names what it computes again for a backward pass.
_AGAIN = 'rematted_computation'


@dataclasses.dataclass(frozen=True)
class Work:
  """Operations over all devices, two per multiply-add, and bytes.

  Attributes:
    matmul: outside of kernels.
    kernel: in Pallas kernels, blocks that masks skip included.
    moved: bytes, not operations: in and out of kernels that multiply nothing.
    again: of both, what is computed a second time for the backward pass; what
      attention computes again by itself is not known.
  """

  matmul: float
  kernel: float
  again: float
  moved: float = 0.0

  def __add__(self, other: 'Work') -> 'Work':
    return Work(
      self.matmul + other.matmul,
      self.kernel + other.kernel,
      self.again + other.again,
      self.moved + other.moved,
    )

  def times(self, n: float) -> 'Work':
    return Work(
      n * self.matmul, n * self.kernel, n * self.again, n * self.moved
    )

  @property
  def total(self) -> float:
    return self.matmul + self.kernel


_NOTHING = Work(0.0, 0.0, 0.0)


def count(jaxpr: Any, while_trips: int) -> Work:
  """The work of a jaxpr.

  Args:
    jaxpr: of `jitted.trace(...)`.
    while_trips: of loops whose end is only known when they run.
  """
  return _count(_needed(jaxpr), while_trips, False)


def _needed(jaxpr: Any) -> Any:
  """Without what no result depends on, which the compiler leaves out.

  JAX's own elimination (0.10.2) keeps kernels whose outputs nobody reads.
  """
  wanted = {v for v in jaxpr.outvars if isinstance(v, core.Var)}
  equations = []
  for equation in reversed(jaxpr.eqns):
    if equation.effects or wanted.intersection(equation.outvars):
      equations.append(equation)
      wanted.update(v for v in equation.invars if isinstance(v, core.Var))
  return jaxpr.replace(eqns=equations[::-1])


def _count(jaxpr: Any, while_trips: int, is_again: bool) -> Work:
  total = _NOTHING
  for equation in jaxpr.eqns:
    again = is_again or _AGAIN in str(equation.source_info.name_stack)
    total += _equation(equation, while_trips, again)
  return total


def _equation(equation: Any, while_trips: int, is_again: bool) -> Work:
  name, params = equation.primitive.name, equation.params
  if name == 'dot_general':
    (contracted, _), _ = params['dimension_numbers']
    shape = equation.invars[0].aval.shape
    depth = math.prod(shape[i] for i in contracted)
    work = 2.0 * math.prod(equation.outvars[0].aval.shape) * depth
    return Work(work, 0.0, is_again * work)
  subjaxprs = list(_subjaxprs(params))
  if name in ('checkpoint', 'remat2'):  # with all that was computed forward
    subjaxprs = [_needed(sub) for sub in subjaxprs]
  inner = [_count(sub, while_trips, is_again) for sub in subjaxprs]
  if not inner:
    return _NOTHING
  if name == 'cond':
    return max(inner, key=lambda work: work.total)
  total = sum(inner, _NOTHING)
  if name == 'scan':
    return total.times(params['length'])
  if name == 'while':
    return total.times(while_trips)
  if name == 'shard_map':
    sizes = [params['mesh'].shape[axis] for axis in params['newly_manual_axes']]
    return total.times(math.prod(sizes))
  if name == 'pallas_call':
    if not total.total:
      arrays = [v.aval for v in (*equation.invars, *equation.outvars)]
      return Work(0.0, 0.0, 0.0, sum(a.size * a.dtype.itemsize for a in arrays))
    steps = math.prod(params['grid_mapping'].grid)
    return Work(0.0, steps * total.total, steps * total.again)
  return total


def _subjaxprs(params: dict[str, Any]) -> Iterator[Any]:
  for value in params.values():
    for item in value if isinstance(value, tuple | list) else (value,):
      if isinstance(item, core.ClosedJaxpr):
        yield item.jaxpr
      elif isinstance(item, core.Jaxpr):
        yield item
