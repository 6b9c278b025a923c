"""Numbers -> small pictures as inline SVG, which take the colours of the page: light, dark and printed."""

from __future__ import annotations

import html
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import TypeVar

COLOURS = 7  # --c0 to --c6 of the page's style
MOST_DOTS = 240  # of a row; of more values evenly spread ones are drawn
MOST_ROWS = 30
MOST_POINTS = 200  # of a line
MARGINS = (52, 14, 34, 42)  # left, right, top, bottom of a line chart, in SVG units
LINE_SIZE = (520, 280)
ROW_WIDTH, ROW_HEIGHT = 760, 26
NAME_WIDTH, NOTE_WIDTH = 170, 170  # of a row chart's columns of text
NAME_LETTERS = 26

Value = TypeVar("Value")


@dataclass(frozen=True)
class Line:
    """A curve."""

    name: str
    x: Sequence[float]
    y: Sequence[float | None]
    """None: nothing is known there."""
    colour: int = 0


@dataclass(frozen=True)
class Row:
    """A named line of dots, an interval, or both."""

    name: str
    values: Sequence[float] = ()
    """Drawn as dots."""
    middle: float | None = None
    low: float | None = None
    high: float | None = None
    note: str = ""
    """Text at the right end."""
    marked: Mapping[str, float] = field(default_factory=dict)
    """Dots that tell their name."""
    strong: bool = False
    """Whether the row stands out."""


@dataclass(frozen=True)
class Scale:
    """Values to positions."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        """The position of a value; outside of the range at its end."""
        low, high, at = (self._measure(v) for v in (self.low, self.high, value))
        share = (at - low) / (high - low)
        return self.start + min(max(share, 0.0), 1.0) * (self.end - self.start)

    def _measure(self, value: float) -> float:
        return math.log10(max(value, 1e-12)) if self.log else value

    def ticks(self) -> list[float]:
        """About five round values."""
        if self.log:
            decades = range(math.floor(math.log10(self.low)), math.ceil(math.log10(self.high)) + 1)
            steps = (1, 2, 5) if len(decades) < 5 else (1,)
            found = [m * 10.0**p for p in decades for m in steps if self.low <= m * 10.0**p <= self.high]
            if len(found) > 1:
                return found[:: -(-len(found) // 8)]
        step = _round_step((self.high - self.low) / 5)
        first = math.ceil(self.low / step - 1e-9)
        return [i * step for i in range(first, math.floor(self.high / step + 1e-9) + 1)]


def scale_of(values: Sequence[float], start: float, end: float, *, log: bool = False) -> Scale:
    """A scale that shows all values, with a little room; never of no width."""
    low, high = min(values, default=0.0), max(values, default=1.0)
    if log:
        low = max(low, 1e-6)
        return Scale(low / 1.3, max(high, low) * 1.3, start, end, log=True)
    room = 0.05 * (high - low) or max(abs(high) * 0.1, 0.5)
    floor = 0.0 if low >= 0 and low - room < 0.25 * high else low - room
    return Scale(floor, high + room, start, end)


def line_chart(lines: Sequence[Line], *, title: str, x: str, y: str) -> str:
    """Curves over a common axis."""
    width, height = LINE_SIZE
    left, right, top, bottom = MARGINS
    known = [value for line in lines for value in line.y if value is not None]
    across = scale_of([value for line in lines for value in line.x], left, width - right)
    across = Scale(
        min(0.0, across.low), max((v for line in lines for v in line.x), default=1.0) or 1.0, left, width - right
    )
    up = scale_of(known, height - bottom, top)
    parts = [_text(left, 16, title, "ct"), _text(width - right, height - 8, x, "cm", anchor="end")]
    parts.append(_text(left, top - 6, y, "cm"))
    for tick in up.ticks():
        parts += [
            _rule(left, up(tick), width - right, up(tick)),
            _text(left - 6, up(tick) + 4, _number(tick), "cm", anchor="end"),
        ]
    for tick in across.ticks():
        parts.append(_text(across(tick), height - bottom + 18, _number(tick), "cm", anchor="middle"))
    for line in lines:
        points = [(across(a), up(b)) for a, b in zip(line.x, line.y, strict=True) if b is not None]
        drawn = " ".join(f"{a:.1f},{b:.1f}" for a, b in _thinned(points, MOST_POINTS))
        colour = f"var(--c{line.colour % COLOURS})"
        parts.append(
            f'<polyline points="{drawn}" fill="none" stroke="{colour}" class="cl">{_hint(line.name)}</polyline>'
        )
        if len(points) == 1:
            parts.append(f'<circle cx="{points[0][0]:.1f}" cy="{points[0][1]:.1f}" r="3" fill="{colour}"/>')
    return _svg(width, height, title, parts)


def row_chart(
    rows: Sequence[Row], *, title: str, unit: str = "", log: bool = False, ends: tuple[float, float] | None = None
) -> str:
    """Named rows of dots and intervals over a common axis; `ends` are those of the axis, where they do not follow."""
    shown = list(rows[:MOST_ROWS])
    height = 34 + ROW_HEIGHT * len(shown) + 34
    start, end = NAME_WIDTH, ROW_WIDTH - NOTE_WIDTH
    every = [v for row in shown for v in (*row.values, row.middle, row.low, row.high) if v is not None]
    scale = Scale(*ends, start, end) if ends else scale_of([v for v in every if v > 0 or not log], start, end, log=log)
    bottom = 34 + ROW_HEIGHT * len(shown)
    parts = [_text(0, 16, title, "ct")]
    for tick in scale.ticks():
        parts += [
            _rule(scale(tick), 28, scale(tick), bottom),
            _text(scale(tick), bottom + 16, _number(tick), "cm", anchor="middle"),
        ]
    if unit:
        parts.append(_text(end + 14, bottom + 16, unit, "cm"))
    for i, row in enumerate(shown):
        parts += _row(row, 34 + ROW_HEIGHT * (i + 0.5), scale, log=log)
    if len(rows) > MOST_ROWS:
        parts.append(_text(0, bottom + 16, f"and {len(rows) - MOST_ROWS} more", "cm"))
    return _svg(ROW_WIDTH, height, title, parts)


def _row(row: Row, y: float, scale: Scale, *, log: bool) -> list[str]:
    name = row.name if len(row.name) <= NAME_LETTERS else f"{row.name[: NAME_LETTERS - 1]}…"
    parts = [
        _text(0, y + 4, name, "cs" if row.strong else "cn", title=row.name),
        _text(ROW_WIDTH, y + 4, row.note, "cm", anchor="end"),
    ]
    parts.append(_rule(scale.start, y, scale.end, y))
    values = sorted(v for v in row.values if v > 0 or not log)
    if values:  # one path for all dots: round caps of lines without a length
        dots = "".join(f"M{scale(v):.1f} {y + _jitter(i):.1f}h0" for i, v in enumerate(_thinned(values, MOST_DOTS)))
        parts.append(f'<path d="{dots}" class="cd"/>')
    if row.low is not None and row.high is not None:
        parts.append(f'<path d="M{scale(row.low):.1f} {y:.1f}H{scale(row.high):.1f}" class="ci"/>')
    if row.middle is not None:
        hint = _hint(row.note or _number(row.middle))
        parts.append(f'<circle cx="{scale(row.middle):.1f}" cy="{y:.1f}" r="4.5" class="cp">{hint}</circle>')
    for marked, value in row.marked.items():
        parts.append(
            f'<circle cx="{scale(value):.1f}" cy="{y:.1f}" r="4" class="cw">{_hint(f"{marked}: {value:.3f}")}</circle>'
        )
    return parts


def _jitter(index: int) -> float:
    """Up and down, so that equal values are seen as several."""
    return ((index * 7) % 11 - 5) * 1.1


def _thinned(values: Sequence[Value], most: int) -> list[Value]:
    """At most so many of them, evenly spread, with the first and the last."""
    if len(values) <= most:
        return list(values)
    return [values[round(i * (len(values) - 1) / (most - 1))] for i in range(most)]


def _round_step(step: float) -> float:
    """The next larger one of 1, 2, 5 times a power of ten."""
    power = 10.0 ** math.floor(math.log10(step))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= step * 0.999)


def _number(value: float) -> str:
    return f"{value:.4g}" if abs(value) < 10_000 else f"{value:,.0f}"


def _hint(text: str) -> str:
    """What is shown under the mouse."""
    return f"<title>{_safe(text)}</title>"


def _safe(text: str) -> str:
    return html.escape(text, quote=True)


def _rule(x1: float, y1: float, x2: float, y2: float) -> str:
    return f'<path d="M{x1:.1f} {y1:.1f}L{x2:.1f} {y2:.1f}" class="cg"/>'


def _text(x: float, y: float, text: str, kind: str, *, anchor: str = "start", title: str = "") -> str:
    if not text:
        return ""
    hint = _hint(title) if title and title != text else ""
    return f'<text x="{x:.1f}" y="{y:.1f}" class="{kind}" text-anchor="{anchor}">{_safe(text)}{hint}</text>'


def _svg(width: int, height: int, title: str, parts: Sequence[str]) -> str:
    return (
        f'<svg viewBox="0 0 {width} {height}" style="max-width:{width}px" role="img" aria-label="{_safe(title)}">'
        + "".join(parts)
        + "</svg>"
    )
