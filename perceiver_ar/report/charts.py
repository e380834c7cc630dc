"""Charts as SVG that lives inside a page and takes on its colours.

Text and lines are drawn in a page's CSS variables (--ink, --muted, --line,
--accent, --second), so that one drawing suits light, dark and paper. The same
numbers give the same SVG, byte for byte.
"""

import html
import io
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeAlias

import numpy as np

from perceiver_ar.errors import UserError

Points: TypeAlias = tuple[np.ndarray, np.ndarray]

# Matplotlib only knows colours of its own: these stand for the variables.
_VARIABLES = {
  '#010203': 'ink',
  '#010204': 'muted',
  '#010205': 'line',
  '#010206': 'accent',
  '#010207': 'second',
}
_INK, _MUTED, _LINE, _ACCENT, _SECOND = _VARIABLES
_STYLE = {
  'axes.edgecolor': _LINE,
  'axes.grid': True,
  'axes.grid.axis': 'y',
  'axes.labelcolor': _MUTED,
  'axes.spines.right': False,
  'axes.spines.top': False,
  'axes.titlecolor': _INK,
  'axes.titlelocation': 'left',
  'axes.titlesize': 'medium',
  'font.size': 10,
  'grid.color': _LINE,
  'legend.frameon': False,
  'legend.labelcolor': _INK,
  'lines.linewidth': 1.6,
  'svg.fonttype': 'none',
  'text.color': _INK,
  'xtick.color': _LINE,
  'xtick.labelcolor': _MUTED,
  'ytick.color': _LINE,
  'ytick.labelcolor': _MUTED,
}


def loss_curve(
  raw: Points, smooth: Points, evaluations: Points, unit: str
) -> str:
  """Training loss over steps, and the evaluations during training."""

  def draw(axes: Any) -> None:
    axes.plot(*raw, color=_ACCENT, alpha=0.25, linewidth=0.8)
    axes.plot(*smooth, color=_ACCENT, label='training, smoothed')
    if len(evaluations[0]):
      axes.plot(
        *evaluations, 'o', color=_SECOND, markersize=4.5, label='held out'
      )
    axes.set_xlabel('step')
    axes.set_ylabel(unit)
    axes.legend(loc='upper right')
    _cut_beginning(axes, smooth[1], raw[1], evaluations[1])

  return _svg('loss', (6.4, 3.2), draw, f'{unit} over training steps')


def small_curve(title: str, points: Points, is_log: bool) -> str:
  """One more quantity over steps."""

  def draw(axes: Any) -> None:
    axes.plot(*points, color=_ACCENT, linewidth=1.2)
    if is_log:
      axes.set_yscale('log')
    else:
      axes.set_ylim(bottom=0)
    axes.set_title(title)
    axes.set_xlabel('step')

  return _svg(title.replace(' ', '-'), (3.6, 2.2), draw, f'{title} over steps')


def bucket_curve(
  title: str, buckets: Sequence[Mapping[str, Any]], is_log: bool
) -> str:
  """Means over ranges [first, end), each drawn over its range."""
  edges = [b['first'] for b in buckets] + [buckets[-1]['end']]
  losses = [b['nats_per_token'] for b in buckets]

  def draw(axes: Any) -> None:
    axes.stairs(losses, edges, baseline=None, color=_ACCENT, linewidth=1.4)
    if is_log:
      axes.set_xscale('log', base=2)
    axes.set_title(title)

  return _svg(title.replace(' ', '-'), (3.6, 2.2), draw, title)


def bars(
  values: Mapping[str, float], unit: str, label: Callable[[float], str]
) -> str:
  """Horizontal bars with their values; the first one is ours."""

  def draw(axes: Any) -> None:
    drawn = axes.barh(list(values), list(values.values()), 0.6, color=_MUTED)
    for bar in drawn[1:]:
      bar.set_alpha(0.5)
    drawn[0].set_color(_ACCENT)
    axes.bar_label(drawn, fmt=label, padding=4)
    axes.invert_yaxis()
    axes.margins(x=0.12)
    axes.grid(False)
    axes.set_xticks([])
    axes.spines['bottom'].set_visible(False)
    axes.tick_params(axis='y', length=0, labelcolor=_INK)

  height = 0.5 + 0.36 * len(values)
  return _svg('bars', (6.4, height), draw, f'{unit}, compared')


def _cut_beginning(axes: Any, smooth: np.ndarray, *others: np.ndarray) -> None:
  """Leaves out the first steep fall, which would flatten all the rest."""
  smooth = smooth[np.isfinite(smooth)]
  if len(smooth) < 50:
    return
  low = min(float(np.nanmin(v)) for v in (smooth, *others) if v.size)
  top = smooth[len(smooth) // 50 :].max()
  margin = 0.06 * (top - low)
  if margin > 0:
    axes.set_ylim(low - margin, top + margin)


def _svg(
  name: str,
  size: tuple[float, float],
  draw: Callable[[Any], None],
  description: str,
) -> str:
  try:
    import matplotlib
    from matplotlib.figure import Figure
  except ImportError as error:
    raise UserError(
      'charts need the package matplotlib; install it with pip install '
      "'perceiver-ar[demo]'"
    ) from error
  out = io.StringIO()
  style: Any = _STYLE | {'svg.hashsalt': name}
  with matplotlib.rc_context(style):
    figure = Figure(size, layout='constrained')
    draw(figure.add_subplot())
    figure.savefig(out, format='svg', transparent=True)
  return _inline(out.getvalue(), description)


def _inline(svg: str, description: str) -> str:
  """An SVG file as a part of a page, under the page's own rules."""
  svg = svg[svg.index('<svg') :]
  for tag in ('metadata', 'style'):
    svg = re.sub(f'<{tag}.*?</{tag}>', '', svg, flags=re.DOTALL)
  # Several charts share a page: only ids that are used, and salted, remain.
  used = set(re.findall(r'(?:url\(|href=")#([^")]+)', svg))
  keep = lambda match: match[0] if match[1] in used else ''
  svg = re.sub(r' id="([^"]+)"', keep, svg)
  svg = svg.replace('xlink:href', 'href')
  for color, variable in _VARIABLES.items():
    svg = svg.replace(color, f'var(--{variable})')
  svg = re.sub(r'font-family:[^;"]+;?', '', svg)
  box = re.search(r'viewBox="[^"]+"', svg)
  assert box is not None
  head = f'<svg {box[0]} role="img" aria-label="{html.escape(description)}">'
  return re.sub(r'<svg[^>]*>', lambda _: head, svg, count=1)
