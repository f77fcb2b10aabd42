"""What a run learnt and what it forgot: the bits per byte of held-out text before it and after each of its stages."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from oomless.report.charts import table, text
from oomless.report.screen import Screen
from oomless.report.tables import Grid
from oomless.training.run_files import BITS_PER_BYTE

if TYPE_CHECKING:
    from oomless.report.run import Logged

TITLE = "Learnt and forgotten, in bits per byte of held-out text"
WHY = "Bits per byte compare texts and tokenizers, which the loss per token does not."


@dataclass(frozen=True, kw_only=True, slots=True)
class Known:
    """How well a text was predicted on the way."""

    name: str
    bits: tuple[float | None, ...]
    """Before the run and after each of its stages; ``None`` where that was not measured."""

    @property
    def change(self) -> str:
        """What became of it."""
        measured = [value for value in self.bits if value is not None]
        less = measured[0] - measured[-1]
        return f"{'learnt' if less >= 0 else 'forgot'} {abs(less):.3f}"


def known(logged: Logged) -> list[Known]:
    """Return what was measured of each text of a run, before it and after each stage; a text of later stages begins with theirs."""
    stages = logged.stages or (logged,)
    names = dict.fromkeys(name for stage in stages for name in stage.values if name.startswith(BITS_PER_BYTE))
    found = []
    for name in names:
        first = next(place for place, stage in enumerate(stages) if name in stage.values)
        before: list[float | None] = [None] * first + [stages[first].values[name][0][1]]
        after = [stage.values[name][-1][1] if name in stage.values else None for stage in stages[first:]]
        found.append(Known(name=name.removeprefix(BITS_PER_BYTE), bits=(*before, *after)))
    return found


def columns(logged: Logged) -> list[str]:
    """Return when each of the numbers was measured."""
    return ["before", *([f"after {stage.name}" for stage in logged.stages] or ["after"])]


def print_knowledge(screen: Screen, logged: Logged) -> None:
    """Print what a run learnt and forgot."""
    rows, names = known(logged), columns(logged)
    if not rows:
        return
    grid = Grid(title=TITLE, columns=("text", *names, ""), numbers=frozenset(names))
    for row in rows:
        grid.add(row.name, *map(_shown, row.bits), row.change)
    grid.print(screen)


def knowledge_section(logged: Logged) -> Iterator[str]:
    """Yield the same as a part of a page."""
    rows = [(text(row.name), *map(_shown, row.bits), row.change) for row in known(logged)]
    if rows:
        yield f"<section><h2>{TITLE}</h2><p>{WHY}</p>{table(TITLE, ('text', *map(text, columns(logged)), ''), rows)}</section>"


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
