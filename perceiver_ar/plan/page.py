"""A plan as a page for people."""

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from perceiver_ar.chips import HOST_BANDWIDTH
from perceiver_ar.errors import UserError
from perceiver_ar.plan import timing
from perceiver_ar.plan.advice import Advice
from perceiver_ar.plan.plans import Plan

_GIB = 2**30
_CALLS = {'train': 'A step', 'evaluate': 'A batch', 'sample': 'A segment'}


def render(plan: Plan) -> str:
  """The whole page."""
  blocks = [_head(plan), _memory(plan)]
  if plan.seconds:
    blocks += [_time(plan), _traffic(plan), _assumptions(plan)]
  return '\n\n'.join('\n'.join(block) for block in blocks) + '\n'


def render_change(plan: Plan, advice: Advice) -> str:
  """What makes a plan fit that does not."""
  parts = {k: v for k, v in plan.bytes_per_chip.items() if v}
  name = max(parts, key=lambda key: parts[key])
  first = (
    f'It does not fit. The most is {_words(name)}: {_gib(parts[name])} of '
    f'{_gib(plan.needed_bytes)} GiB.'
  )
  if advice.change is None:
    return f'{first}\n{_none_fits(advice)}\n'
  changes, other = advice.change
  flags = ' '.join(f'--config.{key}={value}' for key, value in changes.items())
  return (
    f'{first}\nThe smallest change that makes it fit, compiled:\n  {flags}\n'
    f'  needs {_gib(other.needed_bytes)} of {_gib(other.hbm_bytes)} GiB'
    f'{_speed(other)}\n'
  )


def render_sweep(
  rows: Sequence[tuple[Mapping[str, Any], Plan | UserError]],
) -> str:
  """A line per layout."""
  width = 2 + max(
    (len(_layout(p)) for _, p in rows if isinstance(p, Plan)), default=6
  )
  lines = [
    f'{"layout":<{width}}{"fits":<4}{"GiB":>7}{"s/step":>9}'
    f'{"collectives":>13}{"MFU":>6}'
  ]
  for changes, plan in rows:
    if isinstance(plan, UserError):
      words = ' '.join(f'{k}={v}' for k, v in changes.items())
      lines.append(f'{words}: {plan}')
      continue
    fits = 'yes' if plan.fits else 'no'
    line = f'{_layout(plan):<{width}}{fits:<4}{_gib(plan.needed_bytes):>7}'
    if plan.seconds:
      line += (
        f'{plan.seconds["total"]:>9.3g}'
        f'{plan.seconds["collectives"]:>13.3g}'
        f'{plan.predicted_mfu:>6.0%}'
      )
    lines.append(line)
  return '\n'.join(lines) + '\n'


def _layout(plan: Plan) -> str:
  axes = ' '.join(f'{k} {v}' for k, v in plan.mesh.items() if v > 1)
  return f'{axes or "one device"}, {plan.config.mesh.rules}'


def sweep_to_dicts(
  rows: Sequence[tuple[Mapping[str, Any], Plan | UserError]],
) -> list[dict[str, Any]]:
  """The same for JSON."""
  return [
    {'keys': dict(changes)}
    | (
      {'refused': str(plan)}
      if isinstance(plan, UserError)
      else {'plan': plan.to_dict()}
    )
    for changes, plan in rows
  ]


def _head(plan: Plan) -> Iterator[str]:
  axes = ' x '.join(f'{axis} {size}' for axis, size in plan.mesh.items())
  yield f'{plan.command} on {plan.machine.name} ({plan.topology})'
  yield f'  mesh        {axes}, rules {plan.config.mesh.rules}'
  if plan.num_slices > 1:
    yield f'  slices      {plan.num_slices}: train needs mesh.slice set to it'
  yield f'  parameters  {plan.num_parameters:,}'
  kernels = plan.kernel_flops / plan.executed_flops
  yield (
    f'  work        {plan.model_flops:.3g} FLOPs needed, '
    f'{plan.executed_flops:.3g} executed: {plan.recomputed_share:.0%}'
  )
  yield (
    f'              recomputed, {kernels:.0%} in attention kernels (with what '
    'these mask,\n              pad and compute again)'
  )
  if plan.saved_flops:
    yield (
      f'  token table {plan.saved_flops:.3g} FLOPs saved: keys and values are '
      'those of tokens'
    )
  yield f'  compiled in {plan.compile_seconds:.0f} s'


def _memory(plan: Plan) -> Iterator[str]:
  verdict = 'fits' if plan.fits else 'DOES NOT FIT'
  yield (
    f'Memory of a device: {_gib(plan.needed_bytes)} of '
    f'{_gib(plan.hbm_bytes)} GiB, {verdict}'
  )
  for name, size in plan.bytes_per_chip.items():
    if size:
      share = size / plan.hbm_bytes
      bar = '#' * round(30 * min(share, 1))
      line = f'  {_words(name):<16}{_gib(size):>9} GiB {share:>6.1%} {bar}'
      yield line.rstrip()
  if plan.host_bytes:
    yield f'  and of its host  {_gib(plan.host_bytes)} GiB'
  for line in plan.largest:
    yield f'  among them: {line}'


def _time(plan: Plan) -> Iterator[str]:
  total = plan.seconds['total']
  assert plan.predicted_mfu is not None and plan.tokens_per_second is not None
  yield (
    f'{_CALLS[plan.command]} takes {total:.3g} s: '
    f'{plan.predicted_mfu:.1%} of the peak, '
    f'{plan.tokens_per_second:,.0f} tokens/s'
  )
  if plan.num_calls > 1:
    yield f'  {plan.num_calls:,} steps take {plan.days:,.3g} days'
  for name, seconds in plan.seconds.items():
    if name != 'total' and (seconds or name != 'host_transfers'):
      yield f'  {_words(name):<18}{seconds:>10.4g} s {seconds / total:>6.1%}'


def _traffic(plan: Plan) -> Iterator[str]:
  if not plan.collectives:
    yield 'No collectives'
    return
  yield 'What a device sends in a step, in rings'
  yield (
    f'  {"collective":<20}{"axis":<20}{"phase":<10}{"GiB":>9}{"times":>7}'
    f'{"s":>10}'
  )
  for row in plan.collectives:
    axis = f'{row.axis} ({row.network})'
    yield (
      f'  {row.kind:<20}{axis:<20}{row.phase:<10}{_gib(row.bytes):>9}'
      f'{row.count:>7}{row.seconds:>10.3g}'
    )


def _assumptions(plan: Plan) -> Iterator[str]:
  chip = plan.machine.chip
  yield 'Assumed'
  if chip.platform == 'cpu':
    yield (
      '  simulated devices with round figures of a CPU core: compare plans, do '
      'not\n  believe their seconds'
    )
  else:
    yield (
      f'  matmul and data movement: cycles expected by the compiler at '
      f'{chip.clock_hz / 1e9:.4g} GHz;\n  of what it says none (gathers, '
      f'scatters, sorts): bytes at {chip.hbm_bandwidth / 1e9:,.0f} GB/s\n'
      '  the gradient of a bias is a sum made by a matmul, and is one here'
    )
  peak = chip.peak_flops[plan.config.model.dtype]
  yield (
    f'  peak {peak / 1e12:.4g} TFLOP/s in {plan.config.model.dtype}; attention '
    f'kernels at {timing.KERNEL_EFFICIENCY:.0%} of it'
  )
  yield (
    f'  collectives, a device: rings at {chip.link_bandwidth / 1e9:.3g} GB/s a '
    f'link and way, DCN {chip.dcn_bandwidth / 1e9:.3g} GB/s'
  )
  if plan.seconds['host_transfers']:
    yield f'  host transfers: {HOST_BANDWIDTH / 1e9:.0f} GB/s a chip and way'
  yield (
    '  none of these overlap; what a core fetches into its own memory '
    'meanwhile,\n  input of data and latencies take no time'
  )
  if plan.assumed_trips is not None:
    yield f'  loops that do not say how often: {plan.assumed_trips} times'


def _none_fits(advice: Advice) -> str:
  if advice.was_cut:
    return f'None of the {advice.num_compiled} changes that were compiled fits.'
  return 'No change of rematerialisation, rows at a time or axes fits.'


def _gib(size: float) -> str:
  return f'{size / _GIB:,.2f}' if size >= 0.005 * _GIB else f'{size / _GIB:.1e}'


def _words(name: str) -> str:
  return name.replace('_', ' ')


def _speed(plan: Plan) -> str:
  if not plan.seconds:
    return ''
  return f', {plan.seconds["total"]:.3g} s a step, {plan.predicted_mfu:.0%} MFU'
