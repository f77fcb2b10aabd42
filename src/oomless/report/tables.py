"""Tables that keep whole words on any screen: where the columns find no room beside each other, they stand below each other."""

from __future__ import annotations

import re
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.cells import cell_len
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oomless.report.screen import Screen

Cell = str | Text
GAP = 2
"""Columns of the screen between two of a table."""


@dataclass(kw_only=True)
class Grid:
    """Rows under named columns, of which the first names the row."""

    columns: Sequence[str]
    numbers: frozenset[str] = frozenset()
    """The columns that are aligned to the right."""

    title: str | None = None
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    below: list[Cell | None] = field(default_factory=list)
    """What stands under a row."""

    def add(self, *cells: Cell, below: Cell | None = None) -> None:
        """Add a row."""
        self.rows.append(cells)
        self.below.append(below)

    def print(self, screen: Screen) -> None:
        """Print to ``screen``, without columns that hold nothing."""
        used = [place for place in range(len(self.columns)) if any(len(row[place]) for row in self.rows)]
        self.columns = [self.columns[place] for place in used]
        self.rows = [tuple(row[place] for place in used) for row in self.rows]
        widths = [max(cell_len(str(cell)) for cell in column) for column in zip(self.columns, *self.rows, strict=True)]
        whole = self._table(
            self.rows, [size if name in self.numbers else None for name, size in zip(self.columns, widths, strict=True)]
        )
        endless = screen.options.update(max_width=sys.maxsize)
        if screen.measure(whole, options=endless).minimum > screen.width:
            self._print_stacked(screen)
        elif not any(self.below):
            screen.print(whole)
        else:
            self._print_row_by_row(screen, widths)

    def _table(self, rows: Sequence[tuple[Cell, ...]], widths: Sequence[int | None], *, first: bool = True) -> Table:
        """Return ``rows`` in columns of ``widths``, where there is none as wide as they need; the ``first`` has the columns' names."""
        title = self.title if first else None
        table = Table(title=title, title_justify="left", box=None, pad_edge=False, show_header=first)
        for place, (name, width) in enumerate(zip(self.columns, widths, strict=True)):
            number = name in self.numbers
            words = [len(word) for row in rows for word in re.findall(r"^ *\S+|\S+", str(row[place]))]  # with an indent
            table.add_column(
                name,
                justify="right" if number else "left",
                no_wrap=number,
                width=width,
                min_width=max(words, default=0),
            )
        for row in rows:
            table.add_row(*row)
        return table

    def _print_row_by_row(self, screen: Screen, widths: list[int]) -> None:
        """Print what stands under each row over the whole width, which a cell of a table cannot have."""
        room = screen.width - sum(widths[1:]) - GAP * len(widths[1:])
        for place, (row, below) in enumerate(zip(self.rows, self.below, strict=True)):
            screen.print(self._table([row], [min(widths[0], room), *widths[1:]], first=not place))
            if below:
                screen.print(Padding.indent(below, 2))

    def _print_stacked(self, screen: Screen) -> None:
        if self.title is not None:
            screen.print(self.title, style="italic")
        for (first, *others), below in zip(self.rows, self.below, strict=True):
            screen.print(first)
            facts = [
                Text.assemble(name, " ", cell) for name, cell in zip(self.columns[1:], others, strict=True) if len(cell)
            ]
            for part in (Text(", ").join(facts), below):
                if part:
                    screen.print(Padding.indent(part, 2))
