"""What a search chose, on the terminal: the frontier with the pick, and comparisons of GPUs and models."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

from rich.text import Text

from oomless.config import TrainConfig
from oomless.planning.choice import Choice
from oomless.planning.choose import Compared
from oomless.planning.duration import Reading, tokens_to_read
from oomless.planning.plan import Plan
from oomless.planning.row import Row
from oomless.planning.strategies import Prefer, in_words
from oomless.planning.throughput import Throughput
from oomless.planning.wish import Wish
from oomless.report.screen import Screen
from oomless.report.tables import Grid
from oomless.techniques.quantization import missing
from oomless.techniques.sharding import shared
from oomless.units import counted, format_bytes, short

NUMBERS = ("memory", "tokens/s")
NAMES: dict[Prefer, str] = {"quality": "best quality", "balanced": "balanced", "fast": "fastest"}


def print_choice(screen: Screen, choice: Choice) -> None:
    """Print the answer: what to train, in one sentence; the choices there are; how a step is made."""
    if choice.picked is None or choice.config is None or choice.wish is None:
        _print_rejected(screen, choice)
        return
    headline, took = answer(choice)
    screen.say((headline, "bold"), took)
    text = read_text(choice)
    grid = Grid(columns=("choice", *NUMBERS, text, "learns"), numbers=frozenset((*NUMBERS, text, "learns")))
    for row in named_rows(choice):
        _add_choice(grid, choice, row)
    grid.print(screen)
    screen.print(of_a_step(choice))
    if choice.stopped:
        screen.print("The search was stopped: this is the best that it had found.", style="bold")
    if (command := missing(choice.picked.quality.quantization)) is not None:
        screen.print(f"To train it here bitsandbytes is needed: {command}", style="bold")


def answer(choice: Choice) -> tuple[str, str]:
    """Return the pick in one sentence, and how long it takes, where that is known."""
    assert choice.picked is not None
    assert choice.wish is not None
    took = choice.wish.hours_of(choice.picked)
    known = "" if choice.wish.tokens else "(assumed) "
    said = "." if took is None else f". {read_text(choice)} {known}take {hours_in_words(took)}, predicted."
    return f"{choice.model} on {choice.target.name}: {choice.picked.quality}", said + _too_long(choice.wish, took)


def _too_long(wish: Wish, took: tuple[float, float] | None) -> str:
    """Return, where that is so, that there is no time, or may be none, for the whole text in the hours that there are."""
    if took is None or wish.hours is None or took[1] <= wish.hours:
        return ""
    if took[0] <= wish.hours:
        return f" That may be more than the {wish.hours:g} h that there are."
    read = (short(round(wish.text_tokens * wish.hours / hours)) for hours in reversed(took))
    return f" In the {wish.hours:g} h that there are it reads {' to '.join(read)} of them."


def read_text(choice: Choice) -> str:
    """Return how much text the run reads."""
    assert choice.wish is not None
    return f"{short(choice.wish.text_tokens)} tokens"


def named_rows(choice: Choice) -> list[Row]:
    """Return the pick, and the best by each preference, each once."""
    assert choice.picked is not None
    return list({id(row): row for row in (choice.picked, *choice.named.values())}.values())


def rejected_rows(choice: Choice) -> list[Row]:
    """Return what does not fit, the nearest miss first."""
    return sorted((row for row in choice.rows if not row.fits), key=lambda row: row.needed_bytes)


def lacking(choice: Choice, row: Row) -> str:
    """Return what a row that does not fit lacks."""
    if row.host_bytes:
        return "host memory"
    size = row.needed_bytes - (choice.target.usable_bytes - choice.target.margin_bytes)
    return f"> {format_bytes(size)}" if row.needed_bytes else "cannot run"


def of_a_step(choice: Choice) -> str:
    """Return what a step reads, and what the figures are."""
    assert choice.config is not None
    config, gpus = choice.config, choice.target.gpus
    passes = f", in passes of {config.per_device_train_batch_size}" if config.blocks_per_step > 1 else ""
    return (
        f"A step has {counted(config.blocks_per_step * gpus, 'block')} of {counted(config.max_seq_length, 'token')}{passes}. "
        "Speeds are predicted, not measured. learns: what a token teaches beside full training with AdamW, a rough figure."
    )


REPLAYED = (0.05, 0.1)
"""Shares of old text that published recipes of continued pretraining replay."""


def of_replay(choice: Choice) -> str:
    """Return what replaying old text would cost in time."""
    assert choice.picked is not None
    assert choice.wish is not None
    if choice.given.get("replay_data"):
        return ""
    if choice.given.get("max_steps") or choice.given.get("max_tokens"):
        return (
            "Replaying old text (replay_data) costs no time in a run of a given length: at 5 % or 10 % of replay it reads so much "
            "less of the new."
        )
    took, tokens = choice.wish.hours_of(choice.picked), choice.wish.text_tokens
    costs = []
    for share in REPLAYED:
        more = share / (1 - share)
        cost = (
            f"{short(round(more * tokens))} tokens"
            if took is None
            else hours_in_words((more * took[0], more * took[1]))
        )
        costs.append(f"{share:.0%} of it costs {cost} more")
    return f"Replaying old text (replay_data), so that less is forgotten: {', '.join(costs)}."


def _add_choice(grid: Grid, choice: Choice, row: Row) -> None:
    assert choice.wish is not None
    names = ", ".join(NAMES[name] for name in row.named)
    below = [] if row.picked else [str(row.quality)]
    below += [in_words(row.settings), f"given up: {row.quality.given_up()}"]
    grid.add(
        Text.assemble(
            ("► " if row.picked else "  ", "bold green"), (names or "compared", "bold" if row.picked else "")
        ),
        format_bytes(row.needed_bytes),
        speed_in_words(row),
        hours_of(choice, row),
        f"{choice.wish.share(row):.0%}",
        below=Text("\n".join(below), "dim"),
    )


def print_why(screen: Screen, choice: Choice) -> None:
    """Print what was compared, what does not fit, the nearest miss first, and what the figures rest on."""
    picked, wish = choice.picked, choice.wish
    assert picked is not None
    assert choice.config is not None
    assert wish is not None
    others = [row for row in choice.rows if row.fits and not row.named and not row.picked]
    if others:
        grid = Grid(
            columns=("also fits", *NUMBERS, "hours", "learns"), numbers=frozenset((*NUMBERS, "hours", "learns"))
        )
        for row in others:
            grid.add(
                str(row.quality),
                format_bytes(row.needed_bytes),
                speed_in_words(row),
                hours_of(choice, row),
                f"{wish.share(row):.0%}",
                below=Text(in_words(row.settings), "dim"),
            )
        grid.print(screen)
    _print_rejected(screen, choice)
    if picked.speed is not None:
        print_speed(screen, picked.speed, choice.config, choice.target.gpus)
    screen.print(
        f"{wish.text_tokens:,} tokens of text: {wish.basis if wish.tokens else 'assumed, as nothing says how many'}",
        style="dim",
    )
    for name, share in {
        one.name: one for row in (picked, *choice.named.values()) for one in wish.given_up(row)
    }.items():
        screen.print(
            f"{name.replace('_', ' ')} learns {share.share:.0%} ({share.evidence}): {share.source}", style="dim"
        )


MOST_REJECTED = 6


def _print_rejected(screen: Screen, choice: Choice) -> None:
    """Print what does not fit, the nearest miss first."""
    rejected = rejected_rows(choice)
    lines: dict[Any, Row] = {}
    for row in rejected:  # of those of the same parts and the same lack the one that gives up least says it for all
        lines.setdefault((row.quality.trainable, row.quality.quantization, lacking(choice, row), row.host_bytes), row)
    shown = list(lines.values())[:MOST_REJECTED]
    grid = Grid(columns=("does not fit", "needs", "short by"), numbers=frozenset(("needs", "short by")))
    for row in shown:
        grid.add(
            str(row.quality),
            f"> {format_bytes(row.needed_bytes)}",
            lacking(choice, row),
            below=Text(row.reason, "dim"),
        )
    if rejected:
        grid.print(screen)
    if len(rejected) > len(shown):
        screen.print(f"and {len(rejected) - len(shown)} more, which need as much or more", style="dim")


def print_speed(screen: Screen, speed: Throughput, config: TrainConfig, gpus: int = 1) -> None:
    """Print the predicted speed, what it rests on, and how long the run would take where its length is known."""
    reading = tokens_to_read(shared(config, gpus), gpus)
    if reading is not None:
        fewest, most = hours_to_read(speed, reading)
        count = f"{reading.tokens_low:,}"
        if reading.tokens_high > reading.tokens_low:
            count += f" to {reading.tokens_high:,}"
        screen.print(f"{count} tokens ({reading.basis}) would take {_hours(fewest)} to {_hours(most)}, predicted")
    screen.print(
        f"{speed.tokens_per_second_low:,.0f} to {speed.tokens_per_second_high:,.0f} tokens/s, {speed.tokens_per_second:,.0f} "
        f"expected, are predicted, not measured: {speed.basis}",
        style="dim",
    )


def hours_to_read(speed: Throughput, reading: Reading) -> tuple[float, float]:
    """Return the fewest and the most hours in which ``reading`` is done at ``speed``."""
    return speed.hours(reading.tokens_low)[0], speed.hours(reading.tokens_high)[1]


def _hours(hours: float) -> str:
    return f"{hours:,.1f} hours" if hours >= 1 else f"{max(1, round(hours * 60))} min"


def hours_in_words(hours: tuple[float, float]) -> str:
    """Return ``"41-92 h"``, or minutes or days where these suit it."""
    unit, name, digits = next(
        (size, name, 1 if hours[0] < 10 * size else 0)
        for size, name in ((24, "days"), (1, "h"), (0, ""))
        if hours[1] >= 3 * size
    )
    ends = [f"{end / unit:.{digits}f}" if unit else f"{max(1, round(60 * end))}" for end in hours]
    return f"{'-'.join(dict.fromkeys(ends))} {name or 'min'}"


def speed_in_words(row: Row) -> str:
    """Return the predicted range of tokens a second, or nothing where the GPU's rates are not known."""
    if row.speed is None:
        return ""
    return f"{row.speed.tokens_per_second_low:,.0f}-{row.speed.tokens_per_second_high:,.0f}"


def print_comparison(screen: Screen, compared: Sequence[Compared]) -> None:
    """Print the pick for each model and GPU."""
    grid = Grid(columns=("model", "GPU", "strategy", *NUMBERS, "hours", "how"), numbers=frozenset((*NUMBERS, "hours")))
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
            speed_in_words(row),
            hours_of(item.choice, row),
            in_words(row.settings),
        )
    grid.print(screen)


def hours_of(choice: Choice, row: Row) -> str:
    """Return how long a row takes, or nothing where that is not known."""
    took = None if choice.wish is None else choice.wish.hours_of(row)
    return "" if took is None else hours_in_words(took)


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


def launcher(gpus: int, machines: int = 1) -> str:
    """Return what starts a command on so many GPUs, which are those of each of several ``machines``."""
    several = (
        "" if machines == 1 else f"--nnodes {machines} --rdzv-backend c10d --rdzv-endpoint HOST:29500 --rdzv-id mine "
    )
    return "oomless" if gpus == machines == 1 else f"torchrun {several}--nproc-per-node {gpus} -m oomless"
