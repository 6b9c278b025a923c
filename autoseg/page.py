"""Pieces of text and numbers -> one HTML page that fetches nothing: tables, tiles, pictures, and how they look."""

from __future__ import annotations

import base64
import html
from collections.abc import Sequence
from typing import NamedTuple

LIGHT = """--fg: #1a2330; --bg: #fff; --muted: #5b6778; --line: #d8dee7; --soft: #f4f6f9; --accent: #0b5cad;
  --fixed: #6b7686; --rule: #0b5cad; --empirical: #00775a;
  --c0: #0072b2; --c1: #d55e00; --c2: #009e73; --c3: #b4508a; --c4: #c08000; --c5: #2f97d0; --c6: #6b7686;"""
DARK = """--fg: #e3e8ef; --bg: #11161d; --muted: #9aa6b6; --line: #2c3542; --soft: #1a212b; --accent: #6cb4ff;
  --fixed: #9aa6b6; --rule: #6cb4ff; --empirical: #4fd0a8;
  --c0: #5ab0ea; --c1: #ff8f4d; --c2: #3fcf9f; --c3: #e58fc4; --c4: #eebb4d; --c5: #9ad2f5; --c6: #9aa6b6;"""
STYLE = f"""
:root {{ color-scheme: light dark; {LIGHT} }}
@media screen and (prefers-color-scheme: dark) {{ :root {{ {DARK} }} }}
* {{ box-sizing: border-box; }}
html {{ background: var(--bg); scroll-padding-top: 3.5rem; }}
body {{ font: 16px/1.55 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif;
  color: var(--fg); background: var(--bg); max-width: 66rem; margin: 0 auto; padding: 2.5rem 1.25rem 5rem; }}
h1 {{ font-size: 2rem; line-height: 1.2; margin: 0; letter-spacing: -.01em; overflow-wrap: anywhere; }}
h2 {{ font-size: 1.35rem; margin: 3rem 0 .75rem; padding-bottom: .35rem; border-bottom: 2px solid var(--line); }}
h3 {{ font-size: 1.05rem; margin: 1.75rem 0 .5rem; }}
p {{ max-width: 46rem; margin: .6rem 0; }}
a {{ color: var(--accent); text-decoration: none; }}
a:hover {{ text-decoration: underline; }}
.sub, figcaption, .small, caption {{ color: var(--muted); font-size: .875rem; }}
.sub {{ margin: .35rem 0 0; }}
nav {{ position: sticky; top: 0; z-index: 1; background: var(--bg); border-bottom: 1px solid var(--line);
  margin: 1.25rem 0 0; padding: .55rem 0; display: flex; flex-wrap: wrap; gap: .25rem 1.1rem; font-size: .9rem; }}
.tiles {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(9.4rem, 1fr)); gap: .7rem;
  margin: 1.5rem 0 0; }}
.tile {{ background: var(--soft); border-radius: 8px; padding: .8rem 1rem; }}
.tile b {{ display: block; font-size: 1.35rem; line-height: 1.25; font-variant-numeric: tabular-nums;
  overflow-wrap: anywhere; }}
.tile span {{ display: block; color: var(--muted); font-size: .82rem; line-height: 1.35; margin-top: .2rem; }}
.wide {{ overflow-x: auto; }}
table {{ border-collapse: collapse; margin: .75rem 0; font-size: .92rem; }}
th, td {{ padding: .35rem .8rem .35rem 0; text-align: left; vertical-align: top;
  border-bottom: 1px solid var(--line); }}
thead th {{ color: var(--muted); font-weight: 600; font-size: .82rem; border-bottom-width: 2px;
  vertical-align: bottom; }}
tbody th {{ font-weight: 500; }}
.n {{ text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }}
.n small, td small {{ color: var(--muted); }}
.n small {{ display: block; }}
tr.strong {{ background: var(--soft); font-weight: 600; }}
.because {{ max-width: 34rem; }}
.value {{ max-width: 16rem; overflow-wrap: anywhere; }}
code {{ font: .88em ui-monospace, "SF Mono", Menlo, Consolas, monospace; overflow-wrap: break-word; }}
.kind {{ font-size: .75rem; font-weight: 600; white-space: nowrap; }}
.fixed {{ color: var(--fixed); }} .rule {{ color: var(--rule); }} .empirical {{ color: var(--empirical); }}
.lead {{ font-size: 1.1rem; }}
figure {{ margin: 1rem 0; }}
figure img {{ display: block; max-width: min(100%, 54rem); height: auto; background: #fff; border-radius: 6px; }}
.charts {{ display: grid; grid-template-columns: repeat(auto-fit, minmax(min(100%, 22rem), 1fr)); gap: .5rem 1.5rem; }}
svg {{ display: block; width: 100%; height: auto; margin: 1rem 0 .25rem; overflow: visible; }}
svg text {{ font-family: inherit; font-size: 13px; fill: var(--fg); }}
svg .ct {{ font-weight: 600; }} svg .cs {{ font-weight: 600; }} svg .cm {{ fill: var(--muted); font-size: 12px; }}
svg .cg {{ stroke: var(--line); stroke-width: 1; fill: none; }}
svg .cl {{ stroke-width: 1.8; stroke-linejoin: round; }}
svg .cd {{ stroke: var(--c0); stroke-width: 4; stroke-linecap: round; opacity: .42; fill: none; }}
svg .ci {{ stroke: var(--fg); stroke-width: 2.5; stroke-linecap: round; fill: none; }}
svg .cp {{ fill: var(--fg); stroke: var(--bg); stroke-width: 1.5; }}
svg .cw {{ fill: var(--c1); stroke: var(--bg); stroke-width: 1; }}
.legend {{ display: flex; flex-wrap: wrap; gap: .2rem 1rem; font-size: .85rem; color: var(--muted); }}
.legend i {{ display: inline-block; width: 1rem; height: 3px; vertical-align: middle; margin-right: .4rem;
  border-radius: 2px; }}
details {{ border: 1px solid var(--line); border-radius: 8px; margin: .6rem 0; padding: 0 1rem; }}
summary {{ cursor: pointer; padding: .6rem 0; font-weight: 600; }}
summary small {{ color: var(--muted); font-weight: 400; margin-left: .5rem; }}
details[open] {{ padding-bottom: .75rem; }}
@page {{ margin: 14mm; }}
@media print {{
  body {{ max-width: none; padding: 0; font-size: 1rem; }}
  html {{ font-size: 10.5px; -webkit-print-color-adjust: exact; print-color-adjust: exact; }}
  nav, .screen {{ display: none; }}
  details {{ border: 0; padding: 0; }}
  details::details-content {{ content-visibility: visible; display: block; height: auto; }}
  summary {{ list-style: none; font-size: 1.1em; }}
  h2, h3, summary {{ break-after: avoid; }}
  figure, tr, svg, .tile {{ break-inside: avoid; }}
  figure img {{ max-width: 76%; }}
  .wide {{ overflow: visible; }}
  .tiles {{ grid-template-columns: repeat(4, 1fr); }}
  .charts {{ grid-template-columns: 1fr 1fr; }}
  th, td {{ padding: .2rem .5rem .2rem 0; }}
}}
"""
OPEN_FOR_PRINT = (
    "addEventListener('beforeprint', () => document.querySelectorAll('details').forEach(one => one.open = true));"
)


class Html(str):
    """Text that is HTML already and goes into the page as it is."""


class Section(NamedTuple):
    """A part of the page."""

    title: str
    body: str
    """HTML."""


def page(title: str, subtitle: str, tiles: Sequence[tuple[str, str]], sections: Sequence[Section]) -> str:
    """The whole document: a heading, tiles (what, value), links, and the sections that are not empty."""
    shown = [section for section in sections if section.body]
    links = " ".join(f'<a href="#s{i}">{text(section.title)}</a>' for i, section in enumerate(shown))
    body = "\n".join(
        f'<section><h2 id="s{i}">{text(section.title)}</h2>\n{section.body}</section>'
        for i, section in enumerate(shown)
    )
    boxes = "".join(f'<div class="tile"><b>{text(value)}</b><span>{text(what)}</span></div>' for what, value in tiles)
    return (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>autoseg: {text(title)}</title><style>{STYLE}</style></head><body>\n"
        f'<header><h1>{text(title)}</h1><p class="sub">{text(subtitle)}</p><div class="tiles">{boxes}</div></header>'
        f"<nav>{links}</nav>\n{body}\n<script>{OPEN_FOR_PRINT}</script></body></html>\n"
    )


def text(value: object) -> str:
    """A value in its own characters."""
    return value if isinstance(value, Html) else html.escape(str(value), quote=True)


def paragraph(value: object, *, kind: str = "") -> str:
    """A paragraph of the style `kind`."""
    return f'<p class="{kind}">{text(value)}</p>' if kind else f"<p>{text(value)}</p>"


def heading(value: object) -> str:
    """A heading inside a section."""
    return f"<h3>{text(value)}</h3>"


def facts(pairs: Sequence[tuple[str, object]]) -> str:
    """A table of names and values."""
    rows = "".join(f"<tr><th>{text(name)}</th><td>{text(value)}</td></tr>" for name, value in pairs)
    return f'<div class="wide"><table><tbody>{rows}</tbody></table></div>'


def table(
    header: Sequence[object], rows: Sequence[Sequence[object]], *, words: int = 1, strong: int | None = None
) -> str:
    """A table whose first `words` columns are text and whose others are numbers; row `strong` stands out."""
    head = "".join(f"<th{'' if i < words else ' class=n'}>{text(cell)}</th>" for i, cell in enumerate(header))
    body = "".join(
        f"<tr{' class=strong' if number == strong else ''}>"
        + "".join(f"<td{'' if i < words else ' class=n'}>{text(cell)}</td>" for i, cell in enumerate(row))
        + "</tr>"
        for number, row in enumerate(rows)
    )
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def folded(title: object, body: str, *, note: str = "", opened: bool = False, screen_only: bool = False) -> str:
    """A part that opens with a click; on paper it is open, or left out with `screen_only`."""
    extra = f"<small>{text(note)}</small>" if note else ""
    kind = ' class="screen"' if screen_only else ""
    return f"<details{kind}{' open' if opened else ''}><summary>{text(title)}{extra}</summary>{body}</details>"


def picture(content: bytes, caption: str) -> str:
    """A PNG with its caption, held in the page itself."""
    data = base64.b64encode(content).decode()
    shown = text(caption)
    return f'<figure><img alt="{shown}" src="data:image/png;base64,{data}"><figcaption>{shown}</figcaption></figure>'


def legend(names: Sequence[str]) -> str:
    """What the colours 0, 1, ... of the charts mean."""
    entries = "".join(
        f'<span><i style="background:var(--c{i})"></i>{text(name)}</span>' for i, name in enumerate(names)
    )
    return f'<div class="legend">{entries}</div>'
