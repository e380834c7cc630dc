"""Reads the text of a compiled module: what runs, on what, how often.

XLA's own counts take the body of a loop once, and know neither which mesh axis
a collective goes over nor which part of the model asked for it. The scheduled
text says all of that: every instruction stands in it with its shapes, the
scope of the model that it comes from, and, on TPU, the cycles that the
compiler expects it to take.
"""

import dataclasses
import functools
import math
import re
from collections.abc import Iterator

_BITS = {
  'pred': 8, 's4': 4, 'u4': 4, 's8': 8, 'u8': 8, 'f16': 16, 'bf16': 16,
  's16': 16, 'u16': 16, 'f32': 32, 's32': 32, 'u32': 32, 'f64': 64, 's64': 64,
  'u64': 64, 'c64': 64, 'c128': 128,
}  # fmt: skip
_ARRAY = re.compile(r'\b([a-z]+\d*\w*)\[([\d,<=]*)\](?:\{([^}]*)\})?')
_TILE = re.compile(r'T\(([\d,]+)\)')
_SPACE = re.compile(r'S\((\d+)\)')
_HEAD = re.compile(r'^\s*(ROOT )?%?([\w.\-]+) = ')
_OPCODE = re.compile(r'\s*([\w\-]+)\(')
_COMPUTATION = re.compile(r'^(ENTRY )?%?([\w.\-]+) \(.*\{$')
_OPERAND = re.compile(r'%([\w.\-]+)')
_OP_NAME = re.compile(r'op_name="((?:[^"\\]|\\.)*)"')
_FOREVER = 2**50  # cycles, of what is computed elsewhere: on a SparseCore
_CYCLES = re.compile(r'"estimated_cycles":"(\d+)"')
_KNOWN_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"\}')

HOST = 5  # the memory space of what is kept on the host


@dataclasses.dataclass(frozen=True)
class Array:
  """An array of a shape's text, on one device.

  Attributes:
    dtype: XLA's name.
    dims: of the device's part.
    minor_to_major: order of the dimensions in memory; empty: unknown.
    tile: that the most minor dimensions are rounded up to.
    space: of memory; 0 is the device's main one.
  """

  dtype: str
  dims: tuple[int, ...]
  minor_to_major: tuple[int, ...]
  tile: tuple[int, ...]
  space: int

  @property
  def num_bytes(self) -> int:
    """Without padding: what a collective has to move."""
    return math.prod(self.dims) * _BITS.get(self.dtype, 8) // 8

  @property
  def padded_bytes(self) -> int:
    """What it takes in memory: TPUs round up to tiles, such as 8 x 128."""
    dims = list(self.dims)
    minor = self.minor_to_major[: len(self.tile)]
    # A tile is written with its most minor dimension last.
    for dim, size in zip(minor, reversed(self.tile), strict=False):
      dims[dim] = -(-dims[dim] // size) * size
    return math.prod(dims) * _BITS.get(self.dtype, 8) // 8


def parse_arrays(shape: str) -> tuple[Array, ...]:
  """All arrays of the text of a shape, tuples flattened."""
  arrays = []
  for dtype, dims, layout in _ARRAY.findall(shape):
    if dtype in ('token', 'opaque'):
      continue
    order, _, rest = (layout or '').partition(':')
    tile, space = _TILE.search(rest), _SPACE.search(rest)
    arrays.append(
      Array(
        dtype,
        _ints(dims.replace('<=', '')),
        _ints(order),
        _ints(tile[1]) if tile else (),
        int(space[1]) if space else 0,
      )
    )
  return tuple(arrays)


def _ints(text: str) -> tuple[int, ...]:
  return tuple(int(word) for word in text.split(',') if word)


@dataclasses.dataclass(frozen=True)
class Instruction:
  """One line of a computation.

  Attributes:
    name: unique in its module.
    opcode: such as 'fusion'.
    shape: text of the result's.
    operands: names, or the literal of a constant or index of a parameter.
    attributes: text of all that follows the operands.
    is_root: whether its result is the computation's.
  """

  name: str
  opcode: str
  shape: str
  operands: str
  attributes: str
  is_root: bool

  @functools.cached_property
  def arrays(self) -> tuple[Array, ...]:
    return parse_arrays(self.shape)

  @functools.cached_property
  def operand_names(self) -> list[str]:
    return _OPERAND.findall(self.operands)

  @property
  def op_name(self) -> str:
    """The scopes of the model that it comes from; '' if it does not say."""
    found = _OP_NAME.search(self.attributes)
    return found[1].replace("\\'", "'") if found else ''

  @property
  def cycles(self) -> int | None:
    """What the compiler expects; None if it does not say, or says forever."""
    found = _CYCLES.search(self.attributes)
    cycles = int(found[1]) if found else _FOREVER
    return cycles if cycles < _FOREVER else None

  def called(self, *names: str) -> list[str]:
    """Computations that it names under one of these attributes."""
    found = []
    for name in names:
      pattern = rf'\b{name}=(\{{[^}}]*\}}|%?[\w.\-]+)'
      for text in re.findall(pattern, self.attributes):
        found += [word.lstrip('%') for word in re.findall(r'%?[\w.\-]+', text)]
    return found


class Module:
  """The computations of a compiled module, each by the names of its lines.

  Attributes:
    computations: by name.
    entry: the name of the first.
    num_partitions: devices that it is split over, in one slice; or None.
  """

  def __init__(self, text: str):
    self.computations: dict[str, dict[str, Instruction]] = {}
    self.entry = ''
    header = re.search(r'^HloModule.*\bnum_partitions=(\d+)', text)
    self.num_partitions = int(header[1]) if header else None
    self._home: dict[str, str] = {}
    name = ''
    body: dict[str, Instruction] = {}
    for line in text.splitlines():
      if found := _COMPUTATION.match(line):
        name = found[2]
        body = self.computations.setdefault(name, {})
        self.entry = name if found[1] else self.entry
      elif instruction := parse_instruction(line):
        body[instruction.name] = instruction
        self._home[instruction.name] = name
    assert self.entry, 'no module in the text'
    self._scopes = {
      name: loop.op_name
      for body in self.computations.values()
      for loop in body.values()
      if loop.opcode == 'while'
      for name in loop.called('body')
    }

  def home(self, instruction: Instruction) -> dict[str, Instruction]:
    """The computation that it stands in."""
    return self.computations[self._home[instruction.name]]

  def scope(self, computation: str, instruction: Instruction) -> str:
    """The scopes of the model that an instruction comes from.

    The compiler's own have none: then those of what they work on count, and
    then those of the loop that they are in.
    """
    body = self.computations[computation]
    near, seen = [instruction], {instruction.name}
    while near:
      if named := next((i.op_name for i in near if i.op_name), ''):
        return named
      names = {name for i in near for name in i.operand_names} - seen
      seen |= names
      near = [body[n] for n in names if n in body and body[n].operand_names]
    return self._scopes.get(computation, '')

  def within(self, instruction: Instruction) -> Iterator[Instruction]:
    """It, and all that it calls as one: the body of a fusion, and theirs."""
    yield instruction
    if instruction.opcode in ('while', 'conditional'):
      return
    for name in instruction.called('calls', 'called_computations'):
      for inner in self.computations.get(name, {}).values():
        yield from self.within(inner)

  def runs(self, default_trips: int) -> Iterator[tuple[str, Instruction, int]]:
    """Every instruction that is run by itself: (computation, it, how often).

    Loops are followed, both branches of a condition taken.

    Args:
      default_trips: of loops that do not say how often they run.
    """
    yield from self._runs(self.entry, 1, default_trips)

  def _runs(
    self, name: str, times: int, default_trips: int
  ) -> Iterator[tuple[str, Instruction, int]]:
    for instruction in self.computations.get(name, {}).values():
      yield name, instruction, times
      if instruction.opcode == 'while':
        trips = self.trip_count(name, instruction) or default_trips
        for part in instruction.called('condition', 'body'):
          yield from self._runs(part, times * trips, default_trips)
      elif instruction.opcode in ('call', 'call-start', 'conditional'):
        for part in instruction.called(
          'to_apply',
          'branch_computations',
          'true_computation',
          'false_computation',
        ):
          yield from self._runs(part, times, default_trips)

  def has_unknown_loops(self) -> bool:
    return any(
      instruction.opcode == 'while'
      and self.trip_count(name, instruction) is None
      for name, instruction, _ in self.runs(1)
    )

  def trip_count(self, computation: str, loop: Instruction) -> int | None:
    """How often a loop runs; None if the text does not say.

    XLA writes it down where it knows it; else the condition compares a counter
    with a constant, and the counter begins at another.
    """
    if known := _KNOWN_TRIPS.search(loop.attributes):
      return int(known[1])
    condition = self.computations[loop.called('condition')[0]]
    root = next((i for i in condition.values() if i.is_root), None)
    if root is None or len(root.operand_names) != 2:
      return None
    sides = [self._counter(condition, name) for name in root.operand_names]
    init = self._loop_values(computation, loop)
    values = [
      init.get(value) if kind == 'index' else value for kind, value in sides
    ]
    if None in values:
      return None
    first, last = (int(value) for value in values if value is not None)
    compared = ' '.join(i.attributes for i in self.within(root))
    includes = re.search('direction=(LE|GE)', compared) is not None
    return abs(last - first) + includes

  def _counter(
    self, body: dict[str, Instruction], name: str
  ) -> tuple[str, int | None]:
    """A side of a loop's condition: a constant, or an index into its tuple."""
    instruction = body.get(name)
    while instruction is not None and instruction.opcode in (
      'copy',
      'bitcast',
      'convert',
    ):
      instruction = body.get(instruction.operand_names[0])
    if instruction is None:
      return 'unknown', None
    if instruction.opcode == 'constant':
      return 'constant', _integer(instruction)
    if instruction.opcode == 'get-tuple-element':
      index = re.search(r'index=(\d+)', instruction.attributes)
      return 'index', int(index[1]) if index else None
    return 'unknown', None

  def _loop_values(
    self, computation: str, loop: Instruction
  ) -> dict[int | None, int | None]:
    """The constants among a loop's first values, by their index."""
    body = self.computations[computation]
    values: dict[int | None, int | None] = {}
    start = body.get(loop.operand_names[0])
    if start is None or start.opcode != 'tuple':
      return values
    for index, name in enumerate(start.operand_names):
      kind, value = self._counter(body, name)
      if kind == 'constant':
        values[index] = value
    return values


def _integer(constant: Instruction) -> int | None:
  text = constant.operands.strip('{} ')
  return int(text) if re.fullmatch(r'-?\d+', text) else None


def parse_instruction(line: str) -> Instruction | None:
  head = _HEAD.match(line)
  if not head:
    return None
  start = head.end()
  end = _closing(line, start) if line[start] == '(' else line.find(' ', start)
  opcode = _OPCODE.match(line, end)
  if end < 0 or not opcode:
    return None
  close = _closing(line, opcode.end() - 1)
  return Instruction(
    name=head[2],
    opcode=opcode[1],
    shape=line[start:end],
    operands=line[opcode.end() : close - 1],
    attributes=line[close:],
    is_root=bool(head[1]),
  )


_PARENTHESIS = re.compile('[()]')


def _closing(line: str, start: int) -> int:
  """The place after the parenthesis that closes the one at `start`."""
  depth = 0
  for found in _PARENTHESIS.finditer(line, start):
    depth += 1 if found[0] == '(' else -1
    if not depth:
      return found.end()
  return len(line)
