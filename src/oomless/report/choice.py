"""What a search chose, on the terminal: the frontier with the pick, and comparisons of GPUs and models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from oomless.config import TrainConfig
from oomless.planning.choose import Compared
from oomless.planning.duration import tokens_to_read
from oomless.planning.plan import Plan
from oomless.planning.search import Choice, Row
from oomless.planning.strategies import in_words
from oomless.planning.throughput import Throughput
from oomless.report.screen import Screen
from oomless.report.tables import Grid
from oomless.techniques.sharding import shared
from oomless.units import counted, format_bytes

NUMBERS = ("needs", "headroom", "tokens/s")


def print_choice(screen: Screen, choice: Choice) -> None:
    """Print the frontier: what was rejected and why, the pick, and what gives up more."""
    grid = Grid(columns=("strategy", *NUMBERS), numbers=frozenset(NUMBERS))
    for row in _shown(choice.rows):
        mark = ("► ", "bold green") if row.picked else ("✓ ", "green") if row.fits else ("✗ ", "red")
        if row.fits:
            below = f"{in_words(row.settings)}; given up: {row.quality.given_up()}"
        else:
            below = row.reason
        grid.add(
            Text.assemble(mark, (str(row.quality), "bold" if row.picked else "")),
            ("" if row.fits else "> ") + format_bytes(row.needed_bytes),
            format_bytes(choice.target.usable_bytes - row.needed_bytes) if row.fits else "",
            speed_in_words(row),
            below=Text(below, "dim"),
        )
    grid.print(screen)
    picked = choice.picked
    if choice.config is not None:
        screen.print(f"► trains blocks of {counted(choice.config.max_seq_length, 'token')} (max_seq_length)")
    if picked is not None and picked.speed is not None and choice.config is not None:
        print_speed(screen, picked.speed, choice.config, choice.target.gpus)


def print_speed(screen: Screen, speed: Throughput, config: TrainConfig, gpus: int = 1) -> None:
    """Print the predicted speed, what it rests on, and how long the run would take where its length is known."""
    reading = tokens_to_read(shared(config, gpus), gpus)
    if reading is not None:
        fewest, most = speed.hours(reading.tokens_low)[0], speed.hours(reading.tokens_high)[1]
        count = f"{reading.tokens_low:,}"
        if reading.tokens_high > reading.tokens_low:
            count += f" to {reading.tokens_high:,}"
        screen.print(f"{count} tokens ({reading.basis}) would take {_hours(fewest)} to {_hours(most)}, predicted")
    screen.print(
        f"{speed.tokens_per_second_low:,.0f} to {speed.tokens_per_second_high:,.0f} tokens/s, {speed.tokens_per_second:,.0f} "
        f"expected, are predicted, not measured: {speed.basis}",
        style="dim",
    )


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{max(1, round(hours * 60))} min"


def _shown(rows: Sequence[Row]) -> Iterable[Row]:
    """Yield the rows, but of those that were rejected for what trains alone only the first and the last."""
    rejected = [row for row in rows if not row.fits]
    few = {id(row) for row in [*rejected[:3], *rejected[-3:]]}
    for row in rows:
        if row.fits or id(row) in few:
            yield row


def speed_in_words(row: Row) -> str:
    """Return the predicted range of tokens a second, or nothing where the GPU's rates are not known."""
    if row.speed is None:
        return ""
    return f"{row.speed.tokens_per_second_low:,.0f}-{row.speed.tokens_per_second_high:,.0f}"


def print_comparison(screen: Screen, compared: Sequence[Compared]) -> None:
    """Print the pick for each model and GPU."""
    grid = Grid(columns=("model", "GPU", "strategy", *NUMBERS, "how"), numbers=frozenset(NUMBERS))
    for item in compared:
        row = item.choice.picked
        if row is None:
            grid.add(item.model, item.gpu, Text("nothing fits", "red"), *[""] * 4)
            continue
        grid.add(
            item.model,
            item.gpu,
            str(row.quality),
            format_bytes(row.needed_bytes),
            format_bytes(item.choice.target.usable_bytes - row.needed_bytes),
            speed_in_words(row),
            in_words(row.settings),
        )
    grid.print(screen)


def print_nothing_fits(screen: Screen, choice: Choice, changes: Iterable[str]) -> None:
    """Print that nothing fits, and each of ``changes`` as it is found."""
    usable = format_bytes(choice.target.usable_bytes - choice.target.margin_bytes)
    screen.say(("Nothing fits", "bold red"), f" the {usable} of {choice.target.name} that a plan may fill. What would:")
    any_found = False
    for change in changes:
        any_found = True
        screen.print(f"  - {change}")
    if not any_found:
        screen.print(
            "  - nothing that was tried: not a shorter sequence, host memory, any GPU known, or a smaller model"
        )


def plan_to_dict(plan: Plan, speed: Throughput | None) -> dict[str, Any]:
    """Return plain values for JSON of a plan by itself, with its predicted speed."""
    return {**plan.to_dict(), "speed": None if speed is None else speed.to_dict()}


def compared_to_dict(compared: Sequence[Compared]) -> list[dict[str, Any]]:
    """Return plain values for JSON."""
    return [{"model": item.model, "gpu": item.gpu, **item.choice.to_dict()} for item in compared]
