"""Charts as SVG inside a page: no script, nothing from elsewhere, the same on paper, in a mail and for a screen reader.

A chart of any number of points is drawn from at most ``COLUMNS`` columns, of which each keeps its lowest and highest value, so that no
spike is lost. The pointer reads the values of a column from its ``title``; the table below says first, last, lowest and highest.
"""

from __future__ import annotations

import html
import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass

from oomless.report.screen import visible
from oomless.units import counted

WIDTH, HEIGHT = 720, 240
LEFT, RIGHT, TOP, BOTTOM = 84, 12, 10, 24
COLUMNS = 300
TICKS = 4
LABEL = 12
"""Labels that are nearer to each other stand in one line."""

LEAST = 1e-100
"""Closer than this values are drawn as one."""
LINES = 9
"""So many colours there are; further lines begin anew."""

BAR = 34
"""The height of a bar and what lies between two."""

STYLE = """
:root{color-scheme:light dark;--ink:#1b1f24;--dim:#59636e;--grid:#d5dae0;--page:#fff;
--c0:#2f63a8;--c1:#c4432b;--c2:#1d7a3a;--c3:#8a6d00;--c4:#7c3f9e;--c5:#0b7285;--c6:#a5376f;--c7:#5c5f66;--c8:#a3a8b0}
@media(prefers-color-scheme:dark){:root{--ink:#e6e9ed;--dim:#9aa4af;--grid:#353c45;--page:#14171b;
--c0:#7db2f5;--c1:#ff8f78;--c2:#6fd08c;--c3:#e3c04d;--c4:#cd9bec;--c5:#5fcbe0;--c6:#f092c0;--c7:#b4b8bf;--c8:#6b727c}}
body{font:15px/1.45 system-ui,sans-serif;color:var(--ink);background:var(--page);max-width:60rem;margin:0 auto;padding:1rem}
h1{font-size:1.3rem;overflow-wrap:anywhere}h2{font-size:1.05rem;margin:1.6rem 0 .3rem}p{margin:.3rem 0}p,li,h2{overflow-wrap:anywhere}
.scroll{overflow-x:auto;position:relative}table{border-collapse:collapse;font-size:.9rem;font-variant-numeric:tabular-nums}
th,td{text-align:right;vertical-align:top;padding:.1rem .9rem .1rem 0;white-space:nowrap}th{color:var(--dim);font-weight:normal}
th:first-child,td:first-child{text-align:left}th.text{text-align:left}td.text{text-align:left;white-space:normal;overflow-wrap:anywhere;min-width:12rem}
svg{width:100%;min-width:34rem;height:auto;display:block}svg text{font:11px system-ui,sans-serif;fill:var(--dim)}
svg .grid{stroke:var(--grid);stroke-width:1}svg .limit{stroke:var(--ink);stroke-dasharray:6 4}svg .mark{stroke:var(--c1);stroke-dasharray:2 3}
svg path{fill:none;stroke:var(--c);stroke-width:1.6;stroke-linejoin:round}svg .hit{fill:transparent}svg .hit:hover{fill:var(--grid);fill-opacity:.5}
i.key{display:inline-block;width:1rem;height:.2rem;vertical-align:middle;margin-right:.4rem;background:var(--c)}
.c0{--c:var(--c0)}.c1{--c:var(--c1)}.c2{--c:var(--c2)}.c3{--c:var(--c3)}.c4{--c:var(--c4)}.c5{--c:var(--c5)}.c6{--c:var(--c6)}.c7{--c:var(--c7)}.c8{--c:var(--c8)}
svg .area,svg .dot,i.area{fill:var(--c);background:var(--c);stroke:none}i.area{height:.7rem}svg .dot{fill-opacity:.75}svg .dot.picked{stroke:var(--ink);stroke-width:2}
.pair{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,20rem),1fr));gap:0 1.5rem}.pair>div{min-width:0}
.pair pre,pre.prompt{white-space:pre-wrap;overflow-wrap:anywhere}h3{font-size:.9rem;font-weight:normal;color:var(--dim);margin:.4rem 0 0}pre{margin:.3rem 0}
p.dim{color:var(--dim)}p.deep{margin-left:1.2rem}
.over{--c:var(--ink)}svg text.in{fill:var(--ink);paint-order:stroke;stroke:var(--page);stroke-width:3px}
pre{overflow-x:auto;font-size:.85rem;border:1px solid var(--grid);padding:.6rem}
"""


@dataclass(frozen=True, slots=True)
class Line:
    """Values over steps; ``points`` are in the order of their steps."""

    name: str
    points: Sequence[tuple[int, float]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Chart:
    """Lines that share an axis."""

    title: str
    show: Callable[[float], str]
    """A value with its unit."""
    lines: Sequence[Line]
    unit: int = 1
    """The axis has round numbers of these."""
    from_zero: bool = False
    limits: Sequence[tuple[str, float]] = ()
    """Named values drawn across the chart."""
    marks: Sequence[int] = ()
    """Steps at which something happened."""
    marked: str = ""
    """What happened there."""


def page(title: str, parts: Iterable[str]) -> str:
    """Return a page that needs nothing but itself, and may not ask for anything else."""
    shown = text(title)
    head = (
        '<!doctype html>\n<html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">"
        f"<title>{shown}</title><style>{STYLE}</style></head>\n<body><main><h1>{shown}</h1>\n"
    )
    return head + "\n".join(parts) + "\n</main></body></html>\n"


def text(value: object) -> str:
    """Return ``value`` as text of a page: nothing in it is markup, and nothing in it turns the text around."""
    return html.escape(visible(str(value)))


def table(name: str, columns: Sequence[str], rows: Iterable[Sequence[str]], words: Sequence[str] = ()) -> str:
    """Return a table of cells that are already text of a page; the columns in ``words`` hold sentences, not numbers."""
    kinds = [' class="text"' if column in words else "" for column in columns]
    head = "".join(f'<th scope="col"{kind}>{text(column)}</th>' for column, kind in zip(columns, kinds, strict=True))
    body = "".join(
        "<tr>" + "".join(f"<td{kind}>{cell}</td>" for cell, kind in zip(row, kinds, strict=True)) + "</tr>\n"
        for row in rows
    )
    return scrolling(f"<table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table>", f"{name}: values")


def scrolling(inside: str, name: str) -> str:
    """Return ``inside`` so that it scrolls by itself on a narrow screen, also by keyboard."""
    return f'<div class="scroll" role="region" aria-label="{text(name)}" tabindex="0">{inside}</div>'


def draw(chart: Chart) -> str:
    """Return ``chart`` as a section of a page; empty where nothing in it was measured."""
    finite = [Line(line.name, [p for p in line.points if math.isfinite(p[1])]) for line in chart.lines]
    missing = sum(len(line.points) for line in chart.lines) - sum(len(line.points) for line in finite)
    drawn = [line for line in finite if line.points]
    note = f"<p>Not finite, and not drawn: {counted(missing, 'value')}.</p>" if missing else ""
    if not drawn:
        return f"<section><h2>{text(chart.title)}</h2>{note}</section>" if missing else ""
    colours = {id(line): f"c{number % LINES}" for number, line in enumerate(drawn)}
    rows = [_row(chart, line, colours[id(line)]) for line in drawn]
    rows += [(text(name), "", text(chart.show(value)), "", "") for name, value in chart.limits]
    marked = f"<p>Dotted: {text(chart.marked)}.</p>" if chart.marks else ""
    return (
        f"<section><h2>{text(chart.title)}</h2>{scrolling(_svg(chart, drawn, colours), chart.title)}"
        f"{table(chart.title, ('', 'first', 'last', 'lowest', 'highest'), rows)}{marked}{note}</section>"
    )


def _row(chart: Chart, line: Line, colour: str) -> tuple[str, ...]:
    values = [value for _, value in line.points]
    of_line = (values[0], values[-1], min(values), max(values))
    key = f'<i class="key {colour}"></i>{text(line.name)}'
    return (key, *(text(chart.show(value)) for value in of_line))


@dataclass(frozen=True, slots=True)
class Frame:
    """Where values lie in a picture, and what stands around them."""

    title: str
    across: tuple[float, float]
    up: tuple[float, float]
    height: float = HEIGHT

    def x(self, value: float) -> float:
        """Return where a value lies from the left."""
        low, high = self.across
        return LEFT + (value - low) / ((high - low) or 1) * (WIDTH - LEFT - RIGHT)

    def y(self, value: float) -> float:
        """Return where a value lies from the top."""
        low, high = self.up
        return TOP + (high - value) / ((high - low) or 1) * (self.height - TOP - BOTTOM)

    def begin(self, said: str = "") -> str:
        """Return the beginning of the picture; ``said`` is told to who does not see it."""
        told = f"{self.title}: {said}" if said else self.title
        return f'<svg viewBox="0 0 {WIDTH} {self.height}" role="img" aria-label="{text(told)}">'

    def rows(self, ticks: Iterable[float], show: Callable[[float], str]) -> Iterator[str]:
        """Yield lines across the picture at ``ticks``, with their values."""
        for tick in ticks:
            yield f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(tick):.1f}" y2="{self.y(tick):.1f}"/>'
            yield f'<text x="{LEFT - 6}" y="{self.y(tick) + 4:.1f}" text-anchor="end">{text(show(tick))}</text>'

    def columns(self, ticks: Sequence[float], show: Callable[[float], str]) -> Iterator[str]:
        """Yield lines at ``ticks``, of which the outer ones are named inside the picture."""
        for place, tick in enumerate(ticks):
            anchor = "end" if place == len(ticks) - 1 else "middle" if place else "start"
            yield f'<line class="grid" x1="{self.x(tick):.1f}" x2="{self.x(tick):.1f}" y1="{TOP}" y2="{self.height - BOTTOM}"/>'
            yield f'<text x="{self.x(tick):.1f}" y="{self.height - 6}" text-anchor="{anchor}">{text(show(tick))}</text>'

    def ends(self, first: str, last: str) -> Iterator[str]:
        """Yield what stands below the two ends."""
        yield f'<text x="{LEFT}" y="{self.height - 6}">{text(first)}</text>'
        yield f'<text x="{WIDTH - RIGHT}" y="{self.height - 6}" text-anchor="end">{text(last)}</text>'

    def limits(self, limits: Iterable[tuple[str, float]]) -> Iterator[str]:
        """Yield named values across the picture; names that would lie over each other stand in one line."""
        beside: dict[int, list[str]] = {}
        for name, value in limits:
            yield f'<line class="limit" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{self.y(value):.1f}" y2="{self.y(value):.1f}"/>'
            height = self.y(value) - 4 if self.y(value) > TOP + 14 else self.y(value) + 12
            beside.setdefault(next((one for one in beside if abs(one - height) < LABEL), round(height)), []).append(
                name
            )
        for height, names in beside.items():
            yield f'<text x="{LEFT + 4}" y="{height}">{text(", ".join(names))}</text>'

    def hit(self, left: float, right: float, said: str) -> str:
        """Return a column of the picture in which the pointer reads ``said``."""
        return (
            f'<rect class="hit" x="{left:.1f}" y="{TOP}" width="{right - left:.1f}" height="{self.height - TOP - BOTTOM}">'
            f"<title>{text(said)}</title></rect>"
        )


def _svg(chart: Chart, lines: Sequence[Line], colours: dict[int, str]) -> str:
    steps = [step for line in lines for step in (line.points[0][0], line.points[-1][0])]
    values = [value for line in lines for _, value in line.points] + [value for _, value in chart.limits]
    first, last = min(steps), max(steps)
    low = 0 if chart.from_zero else min(values)
    ticks = round_ticks(low, max(values), chart.unit)
    frame = Frame(chart.title, (first, last), (min(ticks[0], *values), max(ticks[-1], *values)))
    parts = [frame.begin(), *frame.rows(ticks, chart.show), *frame.ends(f"step {first:,}", f"step {last:,}")]
    parts += frame.limits(chart.limits)
    for column in sorted({round(frame.x(step)) for step in chart.marks if first <= step <= last}):
        parts.append(f'<line class="mark" x1="{column}" x2="{column}" y1="{TOP}" y2="{HEIGHT - BOTTOM}"/>')
    read: dict[int, list[str]] = {}
    for line in lines:
        columns = _columns(line.points, first, last)
        shown = [point for inside in columns.values() for point in inside]
        path = "L".join(f"{frame.x(step):.1f} {frame.y(value):.1f}" for step, value in shown)
        cap = ' stroke-linecap="round"' if len(shown) == 1 else ""
        parts.append(f'<path class="{colours[id(line)]}"{cap} d="M{path}{"h.1" if cap else ""}"/>')
        for number, inside in columns.items():
            step, value = inside[-1]
            read.setdefault(number, []).append(f"step {step:,}: {line.name} {chart.show(value)}")
    width = (WIDTH - LEFT - RIGHT) / COLUMNS
    for number, said in sorted(read.items()):
        at = LEFT + number * width
        parts.append(frame.hit(at - 4, at + width + 4, "\n".join(said)))
    return "".join(parts) + "</svg>"


def _columns(points: Sequence[tuple[int, float]], first: int, last: int) -> dict[int, list[tuple[int, float]]]:
    """Return the points to draw by column: of each its lowest, highest and last, in their order."""
    columns: dict[int, list[tuple[int, float]]] = {}
    for point in points:
        columns.setdefault(min(COLUMNS - 1, (point[0] - first) * COLUMNS // (last - first or 1)), []).append(point)
    kept = {}
    for number, inside in columns.items():
        values = [value for _, value in inside]
        places = sorted({values.index(min(values)), values.index(max(values)), len(values) - 1})
        kept[number] = [inside[place] for place in places]
    return kept


def round_ticks(low: float, high: float, unit: int) -> list[float]:
    """Return round numbers of ``unit`` around what lies between ``low`` and ``high``."""
    return [tick * unit for tick in _ticks(low / unit, high / unit)]


def _ticks(low: float, high: float) -> list[float]:
    """Return round values from just below ``low`` to at least near ``high``."""
    largest = max(abs(low), abs(high))
    if high - low <= max(largest * 1e-9, LEAST):
        room = largest / 10 if largest > LEAST else 1.0
        low, high = low - room, high + room
    rough = (high - low) / TICKS
    size = 10.0 ** math.floor(math.log10(rough))
    step = next(size * factor for factor in (1, 2, 2.5, 5, 10) if size * factor >= rough)
    return [number * step for number in range(math.floor(low / step), math.ceil(high / step) + 1)]
