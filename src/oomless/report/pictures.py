"""Pictures of memory and of choices, in the frames of ``charts``: what is held over time, what it is made of, and what may be chosen."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from oomless.report.charts import (
    BAR,
    BOTTOM,
    COLUMNS,
    LABEL,
    LEFT,
    LINES,
    RIGHT,
    TOP,
    WIDTH,
    Frame,
    round_ticks,
    scrolling,
    table,
    text,
)
from oomless.units import GiB, KiB, MiB, format_bytes

FITS, DOES_NOT_FIT = 2, 1
OTHERS = 8
"""Of the colours of a chart that of what has no name of its own."""

FAR = 6
"""A limit that is so many times what is drawn is told in words, or nothing else would be seen."""


def unit_of(most_bytes: float) -> int:
    """Return the unit in which an axis up to so many bytes has round numbers."""
    return next((size for size in (GiB, MiB, KiB) if most_bytes >= size), 1)


def shown_bytes(size: float) -> str:
    """Return a size as an axis shows it."""
    return format_bytes(int(size))


@dataclass(frozen=True, kw_only=True, slots=True)
class Held:
    """What was held at moments of a run, by what it was for."""

    title: str
    bands: Sequence[tuple[str, Sequence[int]]]
    """Names and bytes at each moment, the lowest band first."""
    moments: Sequence[str]
    """What happened at each moment."""
    limits: Sequence[tuple[str, float]] = ()
    line: tuple[str, Sequence[int]] | None = None
    """What is drawn over the bands."""


def held_over_time(held: Held) -> str:
    """Return ``held`` as bands on top of each other, as a section of a page."""
    columns = _highest(held)
    totals = [sum(band[moment] for _, band in held.bands) for moment in columns]
    far = [limit for limit in held.limits if limit[1] > FAR * max(totals)]
    near = [limit for limit in held.limits if limit not in far]
    name, over = held.line or ("", [0] * len(held.moments))
    most = max([*totals, *(over[moment] for moment in columns), *(value for _, value in near), 1])
    ticks = round_ticks(0, most, unit_of(most))
    frame = Frame(held.title, (0, max(1, len(columns) - 1)), (0, max(ticks[-1], most)))
    parts = [frame.begin(), *frame.rows(ticks, shown_bytes)]
    below = [0] * len(columns)
    for number, (_, band) in enumerate(held.bands):
        above = [under + band[moment] for under, moment in zip(below, columns, strict=True)]
        if above != below:
            corners = [*enumerate(above), *reversed([*enumerate(below)])]
            path = "L".join(f"{frame.x(at):.1f} {frame.y(size):.1f}" for at, size in corners)
            parts.append(f'<path class="area c{number % LINES}" d="M{path}Z"/>')
        below = above
    if name:
        path = "L".join(f"{frame.x(at):.1f} {frame.y(over[moment]):.1f}" for at, moment in enumerate(columns))
        parts.append(f'<path class="over" d="M{path}"/>')
    parts += frame.limits(near)
    parts += frame.ends("the beginning", "the end")
    for at, moment in enumerate(columns):
        said = [held.moments[moment], f"together {format_bytes(totals[at])}"]
        said += [f"{name} {format_bytes(over[moment])}"] if name else []
        said += [f"{called} {format_bytes(band[moment])}" for called, band in reversed(held.bands) if band[moment]]
        parts.append(frame.hit(frame.x(at - 0.5), frame.x(at + 0.5), "\n".join(said)))
    drawn = scrolling("".join(parts) + "</svg>", held.title)
    out_of_sight = "".join(
        f"<p>Far above the picture: {text(name)} {format_bytes(int(value))}.</p>" for name, value in far
    )
    return f"<section><h2>{text(held.title)}</h2>{drawn}{_keys(held)}{out_of_sight}</section>"


def _highest(held: Held) -> list[int]:
    """Return the moments to draw: of so many columns the highest of each, in their order."""
    count = len(held.moments)
    width = max(1, -(-count // COLUMNS))
    totals = [sum(band[moment] for _, band in held.bands) for moment in range(count)]
    return [max(range(start, min(start + width, count)), key=totals.__getitem__) for start in range(0, count, width)]


def _keys(held: Held) -> str:
    keys = [
        f'<span class="named"><i class="key area c{number % LINES}"></i>{text(name)}</span>'
        for number, (name, band) in enumerate(held.bands)
        if any(band)
    ]
    if held.line is not None:
        keys.append(f'<span class="named"><i class="key over"></i>{text(held.line[0])}</span>')
    return f"<p>{' '.join(keys)}</p>"


def made_of(
    title: str,
    parts: Sequence[tuple[str, int]],
    limits: Sequence[tuple[str, float]],
    said: str = "",
    within: Mapping[str, Sequence[str]] = MappingProxyType({}),
) -> str:
    """Return what a sum of bytes is made of as one bar, with ``limits`` across it, a table, and what is ``said`` below.

    The pointer on a part reads the lines that ``within`` has of it.
    """
    total = sum(size for _, size in parts)
    most = max([total, *(value for _, value in limits), 1])
    ticks = round_ticks(0, most, unit_of(most))
    frame = Frame(title, (0, max(ticks[-1], most)), (0, 1), TOP + BAR + BOTTOM)
    drawn, at, rows = [frame.begin(), *frame.columns(ticks, shown_bytes)], 0, []
    for number, (name, size) in enumerate(parts):
        if not size:
            continue
        left, right = frame.x(at), frame.x(at + size)
        drawn.append(
            f'<rect class="area c{number % LINES}" x="{left:.1f}" y="{TOP + 6}" width="{right - left:.1f}" height="{BAR - 12}"/>'
        )
        lines = [f"{name}: {format_bytes(size)}, {size / total:.1%}", *within.get(name, ())]
        drawn.append(frame.hit(left, right, "\n".join(lines)))
        rows.append(
            (f'<i class="key area c{number % LINES}"></i>{text(name)}', format_bytes(size), f"{size / total:.1%}")
        )
        at += size
    rows.append(("together", format_bytes(total), ""))
    for name, value in limits:
        drawn.append(
            f'<line class="limit" x1="{frame.x(value):.1f}" x2="{frame.x(value):.1f}" y1="{TOP}" y2="{TOP + BAR}"/>'
        )
        rows.append((text(name), format_bytes(int(value)), ""))
    shown = scrolling("".join(drawn) + "</svg>", title)
    return f"<section><h2>{text(title)}</h2>{shown}{table(title, ('', 'memory', 'share'), rows)}<p>{text(said)}</p></section>"


def ranked(title: str, bars: Sequence[tuple[str, int, int]], limits: Sequence[tuple[str, float]]) -> str:
    """Return ``bars``, names with bytes and a colour, below each other, with ``limits`` across them, as a section of a page."""
    most = max([*(size for _, size, _ in bars), *(value for _, value in limits), 1])
    ticks = round_ticks(0, most, unit_of(most))
    frame = Frame(title, (0, max(ticks[-1], most)), (0, 1), TOP + BAR * len(bars) + BOTTOM)
    said = "; ".join(f"{name} {format_bytes(size)}" for name, size, _ in bars)
    parts = [frame.begin(said), *frame.columns(ticks, shown_bytes)]
    for number, (name, size, colour) in enumerate(bars):
        top = TOP + BAR * number
        parts.append(
            f'<rect class="area c{colour % LINES}" x="{LEFT}" y="{top + BAR / 2:.0f}" width="{frame.x(size) - LEFT:.1f}" height="{BAR / 2 - 5:.0f}"/>'
            f'<text class="in" x="{LEFT + 4}" y="{top + BAR / 2 - 4:.0f}">{text(name)}: {format_bytes(size)}</text>'
        )
    for _, value in limits:
        at = frame.x(value)
        parts.append(f'<line class="limit" x1="{at:.1f}" x2="{at:.1f}" y1="{TOP}" y2="{frame.height - BOTTOM}"/>')
    named = "; ".join(f"{name} {format_bytes(int(value))}" for name, value in limits)
    shown = scrolling("".join(parts) + "</svg>", title)
    return f"<section><h2>{text(title)}</h2>{shown}<p>Dashed: {text(named)}.</p></section>"


@dataclass(frozen=True, kw_only=True, slots=True)
class Dot:
    """One of several choices."""

    name: str
    x: float
    y: float
    size: float
    """By its area, beside the others'."""
    said: str
    colour: int
    picked: bool = False


def choices(title: str, across: str, dots: Sequence[Dot], show: Callable[[float], str]) -> str:
    """Return ``dots`` as a section of a page: further right and higher is better; ``across`` says what the horizontal axis is."""
    x_ticks, y_ticks = round_ticks(0, max(dot.x for dot in dots), 1), [0, 0.25, 0.5, 0.75, 1.0]
    frame = Frame(title, (0, x_ticks[-1]), (0, 1.08))
    largest = max(dot.size for dot in dots)
    parts = [frame.begin(), *frame.rows(y_ticks, lambda share: f"{share:.0%}"), *frame.columns(x_ticks, show)]
    for dot in sorted(dots, key=lambda dot: -dot.size):
        radius = 4 + 12 * (dot.size / largest) ** 0.5
        picked = " picked" if dot.picked else ""
        parts.append(
            f'<circle class="dot c{dot.colour % LINES}{picked}" cx="{frame.x(dot.x):.1f}" cy="{frame.y(dot.y):.1f}" r="{radius:.1f}">'
            f"<title>{text(dot.said)}</title></circle>"
        )
    heights: list[float] = []
    for dot in sorted(dots, key=lambda dot: -dot.y):
        if dot.name:
            height = frame.y(dot.y) + 4
            while any(abs(height - other) < LABEL for other in heights):
                height += LABEL
            heights.append(height)
            late = frame.x(dot.x) > (LEFT + WIDTH - RIGHT) / 2
            radius = 8 + 12 * (dot.size / largest) ** 0.5
            at = frame.x(dot.x) - radius if late else frame.x(dot.x) + radius
            parts.append(
                f'<text class="in" x="{at:.1f}" y="{height:.1f}" text-anchor="{"end" if late else "start"}">{text(dot.name)}</text>'
            )
    return (
        f"<section><h2>{text(title)}</h2>{scrolling(''.join(parts) + '</svg>', title)}<p>{text(across)}</p></section>"
    )
