"""A diagnosis on the terminal, and the same as a page."""

from __future__ import annotations

import io
from collections.abc import Iterable, Mapping
from pathlib import Path

import yaml
from rich.console import Console
from rich.markup import escape
from rich.padding import Padding
from rich.table import Table

from oomless.diagnosis.cures import Cure, Cures, own_settings
from oomless.diagnosis.explain import Diagnosis
from oomless.diagnosis.plain_step import Outcome
from oomless.memory.device import Category
from oomless.memory.profile import CATEGORIES
from oomless.report.plan import BAR_WIDTH, COLOURS
from oomless.units import format_bytes

SUSPECTS = 3
PAGE_WIDTH = 110


def print_diagnosis(console: Console, diagnosis: Diagnosis) -> None:
    """Print what failed, what asked, what held the rest, and what would cure it."""
    _print_error(console, diagnosis)
    for finding in diagnosis.findings:
        _line(console, f"[bold yellow]{finding.topic}:[/] {escape(finding.text)}")
    _print_suspects(console, diagnosis)
    if diagnosis.snapshot is not None:
        _print_holders(console, diagnosis)
    if diagnosis.at_failure is not None and diagnosis.without_limit is not None:
        _print_run(console, diagnosis)
        _print_held(console, diagnosis, diagnosis.at_failure, diagnosis.without_limit)
    if diagnosis.cures is not None:
        _print_cures(console, diagnosis, diagnosis.cures)
    if diagnosis.missing:
        _title(console, "What would make this more certain")
        for missing in diagnosis.missing:
            _line(console, escape(missing), indent=2)


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Write the diagnosis to ``path`` as a page of its own.

    Raises:
        OSError: it cannot be written.
    """
    console = Console(record=True, width=PAGE_WIDTH, file=io.StringIO(), force_terminal=True)
    print_diagnosis(console, diagnosis)
    page = console.export_html(inline_styles=True)
    path.write_text(page.replace("<head>", "<head>\n<title>out of memory</title>", 1), encoding="utf-8")


def _title(console: Console, text: str) -> None:
    console.print(f"\n[bold]{text}[/]", highlight=False)


def _line(console: Console, text: str, indent: int = 0, style: str | None = None) -> None:
    console.print(Padding.indent(text, indent) if indent else text, highlight=False, style=style)


def _print_error(console: Console, diagnosis: Diagnosis) -> None:
    first = diagnosis.reading.first
    if first is None:
        _title(console, "No error is in the text: the run that it describes, rehearsed")
        return
    message, place = first.message, first.place
    _title(console, f"{message.source}: {_said(message.kind)}")
    _line(console, f"[dim]{escape(' '.join(message.words.split()))}[/]")
    if first.count > 1:
        ranks = f", on ranks {', '.join(map(str, first.ranks))}" if first.ranks else ""
        _line(console, f"it stands {first.count} times in the text{ranks}")
    if len(diagnosis.reading.occurrences) > 1:
        _line(
            console, f"{len(diagnosis.reading.occurrences) - 1} other errors follow; the first on the GPU is explained"
        )
    if place.phase is not None:
        where = f", in {place.module}" if place.module else ""
        again = " (computing a checkpointed forward again)" if place.recomputing else ""
        _line(
            console,
            f"phase: {place.phase}{where}{again}" + (f", at [cyan]{escape(place.code)}[/]" if place.code else ""),
        )


def _said(kind: str) -> str:
    return {
        "allocator": "the GPU is full",
        "driver": "the GPU is full",
        "library": "the GPU is full",
        "kernel": "a kernel wants more than a multiprocessor has",
        "host": "the host is full",
        "killed": "the process was killed",
    }[kind]


def _print_suspects(console: Console, diagnosis: Diagnosis) -> None:
    if not diagnosis.suspects:
        return
    first = diagnosis.reading.first
    asked = first.message.requested.text if first is not None and first.message.requested is not None else ""
    _title(console, f"What asked for {asked}")
    for number, suspect in enumerate(diagnosis.suspects[:SUSPECTS]):
        solved = f", if a block has {suspect.tokens:,} tokens" if suspect.solved else ""
        model = f", of {suspect.model} and models alike" if suspect.model else ""
        text = (
            f"{'[bold]' if number == 0 else ''}{suspect.tensor.kind}{'[/]' if number == 0 else ''}: "
            f"{suspect.tensor.describe(suspect.tokens)} = {suspect.size_bytes:,} bytes ({escape(suspect.tensor.of)}{model})"
            f"{solved}{escape(suspect.rounding)}"
        )
        _line(console, text, indent=2)
        for support in suspect.support:
            _line(console, escape(support), indent=6, style="dim")


def _print_holders(console: Console, diagnosis: Diagnosis) -> None:
    recorded = diagnosis.snapshot
    assert recorded is not None
    when = {
        "out of memory": "when it ran out",
        "peak": "at the peak of what was recorded",
        "end": "when it was written, as no history was recorded",
    }[recorded.moment]
    _title(console, f"What held the memory of GPU {recorded.gpu}, by the snapshot, {when}")
    _line(
        console,
        f"{format_bytes(recorded.allocated_bytes)} allocated of {format_bytes(recorded.reserved_bytes)} reserved; the largest "
        f"free piece is {format_bytes(recorded.largest_cached_bytes)}",
        indent=2,
    )
    for holder in recorded.holders[:8]:
        where = escape(holder.where or "no stack was recorded")
        _line(console, f"{format_bytes(holder.size_bytes)} in {holder.blocks} blocks: {where}", indent=2)


def _print_run(console: Console, diagnosis: Diagnosis) -> None:
    run = diagnosis.run
    assert run.target is not None
    words = {"given": "given", "log": "from the text", "message": "from the message", "assumed": "assumed"}
    settings = [("model", run.model), ("gpu", run.target.name), *run.values.items()]
    parts = [f"{name} {value} ({words[run.sources.get(name, 'assumed')]})" for name, value in settings]
    if run.mixed_precision is not None:
        parts.append(f"cast to {run.mixed_precision}")
    _title(console, "The run")
    _line(console, escape(", ".join(parts)), indent=2)


def _print_held(console: Console, diagnosis: Diagnosis, held: Outcome, free: Outcome) -> None:
    run, first = diagnosis.run, diagnosis.reading.first
    assert run.target is not None
    name = "oomless" if run.tool == "oomless" else "the plain step (transformers' loss, torch's optimizers)"
    if held.stopped_at is None:
        _title(console, "What holds the memory at the peak")
        _line(
            console,
            f"Rehearsed, {name} needs {format_bytes(held.needed_bytes)} and fits into {format_bytes(run.target.usable_bytes)} "
            "with these settings. So something else took the memory: longer blocks, a larger batch, other settings, "
            "another process, or tensors that are kept from step to step.",
            indent=2,
        )
    else:
        where = f" in {held.stopped_at.module}" if held.stopped_at.module else ""
        _title(console, "What held the rest")
        _line(
            console,
            f"Rehearsed, {name} stops in the {held.stopped_at.phase} phase{where}, where {held.stopped_at.operation} asks for "
            f"{format_bytes(held.stopped_at.size_bytes)}. The whole run needs {format_bytes(free.needed_bytes)} of "
            f"{format_bytes(run.target.usable_bytes)}.",
            indent=2,
        )
    console.print(
        Padding.indent(
            _bars(dict(held.held_bytes), held.reserved_bytes - held.allocated_bytes, run.target.outside_bytes), 2
        )
    )
    if first is not None and first.message.allocated is not None:
        _line(
            console,
            f"allocated at that moment: {format_bytes(held.allocated_bytes)} rehearsed, {first.message.allocated.text} in the "
            "message",
            indent=2,
        )
    if diagnosis.cures is not None and diagnosis.cures.batch_cannot_help:
        _line(
            console,
            f"[bold]No batch size and no sequence length can help:[/] weights, gradients and optimizer state alone are "
            f"{format_bytes(free.fixed_bytes)}.",
            indent=2,
        )


def _bars(held: Mapping[Category, int], cached: int, outside: int) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column()
    table.add_column(justify="right")
    table.add_column()
    rows: list[tuple[str, int]] = [(category, held.get(category, 0)) for category in CATEGORIES]
    rows += [("cached but unused", cached), ("outside the allocator", outside)]
    total = sum(size for _, size in rows) or 1
    for name, size in rows:
        if size:
            colour = COLOURS.get(name, "#bbbbbb")
            table.add_row(name, format_bytes(size), f"[{colour}]{'█' * max(1, round(BAR_WIDTH * size / total))}[/]")
    return table


def _print_cures(console: Console, diagnosis: Diagnosis, cures: Cures) -> None:
    _title(console, "What cures it, in the order of what it costs")
    for cure in [c for c in cures.tried if not c.fits]:
        _line(
            console,
            f"not enough: {escape(cure.title)}; saves {format_bytes(cure.saved_bytes)}, needs {format_bytes(cure.needed_bytes)} "
            f"of {format_bytes(cures.usable_bytes)}",
            indent=2,
            style="dim",
        )
    for number, cure in enumerate(cures.fitting, 1):
        _print_cure(console, number, cure, diagnosis.run.tool)
    if not cures.fitting:
        _line(console, "[bold red]No setting makes this run fit.[/] What would:", indent=2)
        for elsewhere in cures.elsewhere or ("nothing in the catalogue",):
            _line(console, escape(elsewhere), indent=4)


def _print_cure(console: Console, number: int, cure: Cure, tool: str | None) -> None:
    _line(
        console,
        f"[bold green]{number}. fits:[/] [bold]{escape(cure.title)}[/]; needs {format_bytes(cure.needed_bytes)}, saves "
        f"{format_bytes(cure.saved_bytes)}, {format_bytes(cure.headroom_bytes)} left",
        indent=2,
    )
    _line(console, f"quality: {cure.quality}. Speed: {cure.speed}.", indent=5)
    if cure.config is not None:
        _line(console, "oomless train --config with this YAML:", indent=5)
        for line in _yaml_lines(cure):
            _line(console, f"[cyan]{escape(line)}[/]", indent=7)
    if cure.tool is not None:
        where = "do" if cure.config is None else f"the same in {tool}"
        _line(console, f"{where}: [cyan]{escape(cure.tool)}[/]", indent=5)


def _yaml_lines(cure: Cure) -> Iterable[str]:
    assert cure.config is not None
    return str(yaml.safe_dump(own_settings(cure.config), sort_keys=False)).splitlines()
