"""HTML of a page that is one file, without scripts, for screens and paper."""

import html
import re
from collections.abc import Sequence

_CSS = """
:root {
  color-scheme: light dark;
  --paper: #fff; --raised: #f4f6f8; --ink: #1b222c; --muted: #5a6573;
  --line: #d6dbe1; --accent: #1a66d6; --second: #d1480b;
}
@media screen and (prefers-color-scheme: dark) {
  :root {
    --paper: #12161c; --raised: #1b212a; --ink: #e7eaef; --muted: #9da8b6;
    --line: #35404d; --accent: #6aa6ff; --second: #ff9a56;
  }
}
* { box-sizing: border-box; }
body {
  max-width: 50rem; margin: 0 auto; padding: 1.5rem 1rem 4rem;
  background: var(--paper); color: var(--ink);
  font: 16px/1.5 system-ui, sans-serif; font-variant-numeric: tabular-nums;
}
h1 { font-size: 1.6rem; line-height: 1.2; margin: .5rem 0 1.2rem; }
h2 {
  font-size: 1.2rem; margin: 2.5rem 0 .8rem; padding-top: .8rem;
  border-top: 1px solid var(--line);
}
h3 { font-size: .95rem; margin: 1.4rem 0 .4rem; }
i { font-style: normal; font-weight: normal; color: var(--muted); }
p { margin: .6rem 0; overflow-wrap: anywhere; }
.note, .missing, summary { font-size: .875rem; color: var(--muted); }
.missing { border-left: 3px solid var(--second); padding-left: .7rem; }
.tiles { display: grid; gap: .6rem; grid-template-columns: repeat(2, 1fr); }
@media (min-width: 40rem) { .tiles { grid-template-columns: repeat(3, 1fr); } }
.tiles div { background: var(--raised); border-radius: 8px; padding: .7rem; }
.tiles b, .tiles span { display: block; }
.tiles b { font-size: 1.35rem; line-height: 1.25; font-weight: 600; }
.tiles i { font-size: .85rem; white-space: nowrap; }
.tiles span { font-size: .8rem; color: var(--muted); }
figure { margin: .8rem 0; }
img { display: block; max-width: 100%; background: #fff; }
audio { width: 100%; }
svg { display: block; width: 100%; height: auto; stroke-linejoin: round; }
.small {
  display: grid; gap: 0 1.5rem;
  grid-template-columns: repeat(auto-fit, minmax(min(17rem, 100%), 1fr));
}
table { border-collapse: collapse; width: 100%; font-size: .9rem; }
th, td {
  padding: .35rem .6rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); overflow-wrap: anywhere;
}
th { font-weight: normal; color: var(--muted); }
.facts th { white-space: nowrap; }
.numbers td, .numbers tr:first-child th { text-align: right; }
.numbers tr:nth-child(2) > * { color: var(--ink); font-weight: 600; }
pre {
  margin: .4rem 0 1rem; padding: .8rem 1rem; border-radius: 8px;
  background: var(--raised); font: .8rem/1.5 ui-monospace, monospace;
  white-space: pre-wrap; overflow-wrap: anywhere;
  max-height: 28rem; overflow-y: auto;
}
@media print {
  body { max-width: none; padding: 0; font-size: 11pt; }
  pre { max-height: none; border: 1px solid var(--line); }
  figure, .tiles, table { break-inside: avoid; }
  h2, h3 { break-after: avoid; }
  details { display: none; }
}
"""


def document(title: str, *parts: str) -> str:
  body = '\n'.join(part for part in parts if part)
  return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{escape(title)}</title>
<style>{_CSS}</style>
</head>
<body>
<h1>{escape(title)}</h1>
{body}
</body>
</html>
"""


def section(title: str, *parts: str) -> str:
  body = '\n'.join(parts)
  return f'<section>\n<h2>{escape(title)}</h2>\n{body}\n</section>'


def heading(text: str, more: str) -> str:
  return f'<h3>{escape(text)} <i>{escape(more)}</i></h3>'


def tiles(values: Sequence[tuple[str, str]]) -> str:
  """Numbers in large type, with what they are; the numbers are HTML."""
  cells = [
    f'<div><b>{v}</b><span>{escape(name)}</span></div>' for v, name in values
  ]
  return f'<div class="tiles">{"".join(cells)}</div>'


def note(text: str) -> str:
  return f'<p class="note">{escape(text)}</p>'


def missing(text: str) -> str:
  """Says what is not there, and what would change that."""
  return f'<p class="missing">{escape(text)}</p>'


def figure(svg: str) -> str:
  return f'<figure>{svg}</figure>'


def link(target: str, name: str) -> str:
  return f'<p><a href="{escape(target)}">{escape(name)}</a></p>'


def audio(source: str) -> str:
  return f'<audio controls preload="none" src="{escape(source)}"></audio>'


def verbatim(text: str) -> str:
  # A byte model may draw control characters, which HTML does not allow.
  text = re.sub(r'[\x00-\x08\x0b-\x1f\x7f-\x9f]', '\ufffd', text)
  # A first line break after the tag would be taken for the tag's own.
  return f'<pre>\n{escape(text)}</pre>'


def facts(rows: Sequence[tuple[str, str]]) -> str:
  """A table of names and what they are."""
  lines = [
    f'<tr><th scope="row">{escape(name)}</th><td>{escape(value)}</td></tr>'
    for name, value in rows
  ]
  return _table('facts', lines)


def numbers(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
  """A table of numbers, whose first row is the one that counts."""
  names = ''.join(f'<th scope="col">{escape(name)}</th>' for name in head)
  lines = [f'<tr><td></td>{names}</tr>']
  for name, *values in rows:
    cells = ''.join(f'<td>{escape(value)}</td>' for value in values)
    lines.append(f'<tr><th scope="row">{escape(name)}</th>{cells}</tr>')
  return _table('numbers', lines)


def _table(kind: str, lines: Sequence[str]) -> str:
  body = '\n'.join(lines)
  return f'<table class="{kind}">\n{body}\n</table>'


def escape(text: str) -> str:
  return html.escape(text)


def duration(seconds: float) -> str:
  if seconds < 100:
    return f'{seconds:.0f} s'
  minutes = round(seconds / 60)
  if minutes < 100:
    return f'{minutes} min'
  return f'{minutes // 60} h {minutes % 60} min'
