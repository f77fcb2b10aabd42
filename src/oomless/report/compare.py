"""Two models side by side, as a person sees them."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oomless.report.charts import table
from oomless.report.charts import text as escaped
from oomless.report.screen import Screen
from oomless.report.tables import Grid
from oomless.units import format_bytes

if TYPE_CHECKING:
    from oomless.export.comparison import Comparison
    from oomless.export.room import Room

_BESIDE = 64
"""From so many columns on two texts stand beside each other."""


def print_room(screen: Screen, room: Room) -> None:
    """Print what a model and its text take."""
    parts = [room.text_bytes, room.blocks_bytes]
    known = [part for part in parts if part is not None]
    more = (
        f"text takes up to {format_bytes(max(known))} more"
        if len(known) == len(parts)
        else "what text takes beside them is not known, since it depends on values"
    )
    screen.print(
        f"{format_bytes(room.weights_bytes)} of weights, {more}; {format_bytes(room.free_bytes)} free on {room.device.name}",
        style="dim",
    )


def print_comparison(screen: Screen, found: Comparison) -> None:
    """Print ``found``."""
    base, trained = found.base, found.trained
    screen.print(f"base: {base.name}\ntrained: {trained.name}\nboth in {found.numbers}, greedy text", soft_wrap=True)
    if base.losses:
        screen.print()
        grid = Grid(columns=COLUMNS, numbers=frozenset(COLUMNS[1:]))
        for row in rows(found):
            grid.add(*row)
        grid.print(screen)
    for prompt, *texts in zip(found.prompts, base.texts, trained.texts, strict=True):
        screen.print()
        screen.print(prompt, style="dim", soft_wrap=True)
        screen.print(_beside(texts) if screen.width >= _BESIDE else _below(texts))


COLUMNS = ("held-out text", "tokens", "base", "trained", "change")


def rows(found: Comparison) -> list[tuple[str, str, str, str, str]]:
    """Return the losses by source as cells of a table."""
    return [
        (name, f"{found.base.tokens[name]:,}", f"{before:.4f}", f"{after:.4f}", f"{after - before:+.4f}")
        for name, before, after in ((n, loss, found.trained.losses[n]) for n, loss in found.base.losses.items())
    ]


def _beside(texts: list[str]) -> Table:
    table = Table(box=None, pad_edge=False, expand=True, padding=(0, 2, 0, 0))
    for name in ("base", "trained"):
        table.add_column(name, ratio=1, overflow="fold")
    table.add_row(*(Text(text) for text in texts))
    return table


def _below(texts: list[str]) -> Group:
    return Group(
        *(
            part
            for name, text in zip(("base", "trained"), texts, strict=True)
            for part in (Text(name, "bold"), Padding.indent(Text(text), 2))
        )
    )


def section(found: Comparison) -> str:
    """Return ``found`` as a part of a page."""
    parts = [
        f'<section class="wide"><h2>Beside the model it began with</h2><p>{escaped(found.trained.name)} beside {escaped(found.base.name)}, both in {found.numbers}.</p>'
    ]
    if found.base.losses:
        parts.append(table("held-out text", COLUMNS, [[escaped(cell) for cell in row] for row in rows(found)]))
    for prompt, before, after in zip(found.prompts, found.base.texts, found.trained.texts, strict=True):
        parts.append(side_by_side(prompt, [("base", before), ("trained", after)]))
    return "".join([*parts, "</section>"])


def side_by_side(prompt: str, sides: Iterable[tuple[str, str]]) -> str:
    """Return what follows ``prompt`` by each of ``sides``, which are named, beside each other."""
    columns = [f'<div><h3>{escaped(name)}</h3><pre tabindex="0">{escaped(said)}</pre></div>' for name, said in sides]
    return f'<pre class="prompt" tabindex="0">{escaped(prompt)}</pre><div class="pair">{"".join(columns)}</div>'
