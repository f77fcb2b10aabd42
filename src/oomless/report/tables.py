"""Tables that keep whole words on any screen: where the columns find no room beside each other, they stand below each other."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field

from rich.console import Group
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from oomless.report.screen import Screen

Cell = str | Text


@dataclass(kw_only=True)
class Grid:
    """Rows under named columns, of which the first names the row."""

    columns: Sequence[str]
    numbers: frozenset[str] = frozenset()
    """The columns that are aligned to the right."""

    title: str | None = None
    rows: list[tuple[Cell, ...]] = field(default_factory=list)
    below: list[Cell | None] = field(default_factory=list)
    """What stands under a row's first cell."""

    def add(self, *cells: Cell, below: Cell | None = None) -> None:
        """Add a row."""
        self.rows.append(cells)
        self.below.append(below)

    def print(self, screen: Screen) -> None:
        """Print to ``screen``, without columns that hold nothing."""
        used = [place for place in range(len(self.columns)) if any(len(row[place]) for row in self.rows)]
        self.columns = [self.columns[place] for place in used]
        self.rows = [tuple(row[place] for place in used) for row in self.rows]
        table = self._table()
        endless = screen.options.update(max_width=sys.maxsize)
        if screen.measure(table, options=endless).minimum <= screen.width:
            screen.print(table)
        else:
            self._print_stacked(screen)

    def _table(self) -> Table:
        table = Table(title=self.title, title_justify="left", box=None, pad_edge=False)
        for name in self.columns:
            number = name in self.numbers
            table.add_column(name, justify="right" if number else "left", no_wrap=number)
        for (first, *others), below in zip(self.rows, self.below, strict=True):
            table.add_row(first if below is None else Group(first, Padding.indent(below, 2)), *others)
        return table

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
