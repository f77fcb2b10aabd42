"""A diagnosis on the terminal, and the same as a page."""

from __future__ import annotations

import io
from collections.abc import Iterable
from pathlib import Path

import yaml
from rich.padding import Padding
from rich.text import Text

from oomless.diagnosis.cures import Cure, Cures, own_settings
from oomless.diagnosis.explain import Diagnosis
from oomless.diagnosis.plain_step import Outcome
from oomless.memory.profile import CATEGORIES
from oomless.report.screen import Screen
from oomless.report.tables import bars
from oomless.units import counted, format_bytes

SUSPECTS = 3
PAGE_WIDTH = 110


def print_diagnosis(screen: Screen, diagnosis: Diagnosis) -> None:
    """Print what failed, what asked, what held the rest, and what would cure it."""
    _print_error(screen, diagnosis)
    for finding in diagnosis.findings:
        screen.say((f"{finding.topic}:", "bold yellow"), f" {finding.text}")
    _print_suspects(screen, diagnosis)
    if diagnosis.snapshot is not None:
        _print_holders(screen, diagnosis)
    if diagnosis.at_failure is not None and diagnosis.without_limit is not None:
        _print_run(screen, diagnosis)
        _print_held(screen, diagnosis, diagnosis.at_failure, diagnosis.without_limit)
    if diagnosis.cures is not None:
        _print_cures(screen, diagnosis, diagnosis.cures)
    if diagnosis.missing:
        _title(screen, "What would make this more certain")
        for missing in diagnosis.missing:
            screen.say(missing, indent=2)


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Write the diagnosis to ``path`` as a page of its own.

    Raises:
        OSError: it cannot be written.
    """
    screen = Screen(io.StringIO(), record=True, width=PAGE_WIDTH, force_terminal=True)
    print_diagnosis(screen, diagnosis)
    page = screen.export_html(inline_styles=True)
    path.write_text(page.replace("<head>", "<head>\n<title>out of memory</title>", 1), encoding="utf-8")


def _title(screen: Screen, text: str) -> None:
    screen.print(Text(f"\n{text}", "bold"))


def _print_error(screen: Screen, diagnosis: Diagnosis) -> None:
    first = diagnosis.reading.first
    if first is None:
        _title(screen, "No error is in the text: the run that it describes, rehearsed")
        return
    message, place = first.message, first.place
    _title(screen, f"{message.source}: {_said(message.kind)}")
    screen.say(" ".join(message.words.split()), style="dim")
    if first.count > 1:
        ranks = f", on ranks {', '.join(map(str, first.ranks))}" if first.ranks else ""
        screen.say(f"it stands {first.count} times in the text{ranks}")
    if len(diagnosis.reading.occurrences) > 1:
        screen.say(f"other errors follow: {len(diagnosis.reading.occurrences) - 1}; the first on the GPU is explained")
    if place.phase is not None:
        where = f", in {place.module}" if place.module else ""
        again = " (computing a checkpointed forward again)" if place.recomputing else ""
        screen.say(
            f"phase: {place.phase}{where}{again}",
            *((", at ", (place.code, "cyan")) if place.code else ()),
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


def _print_suspects(screen: Screen, diagnosis: Diagnosis) -> None:
    if not diagnosis.suspects:
        return
    first = diagnosis.reading.first
    asked = first.message.requested.text if first is not None and first.message.requested is not None else ""
    _title(screen, f"What asked for {asked}")
    for number, suspect in enumerate(diagnosis.suspects[:SUSPECTS]):
        solved = f", if a block has {suspect.tokens:,} tokens" if suspect.solved else ""
        model = f", of {suspect.model} and models alike" if suspect.model else ""
        screen.say(
            (suspect.tensor.kind, "bold" if number == 0 else ""),
            f": {suspect.tensor.describe(suspect.tokens)} = {suspect.size_bytes:,} bytes ({suspect.tensor.of}{model})",
            f"{solved}{suspect.rounding}",
            indent=2,
        )
        for support in suspect.support:
            screen.say(support, indent=6, style="dim")


def _print_holders(screen: Screen, diagnosis: Diagnosis) -> None:
    recorded = diagnosis.snapshot
    assert recorded is not None
    when = {
        "out of memory": "when it ran out",
        "peak": "at the peak of what was recorded",
        "end": "when it was written, as no history was recorded",
    }[recorded.moment]
    _title(screen, f"What held the memory of GPU {recorded.gpu}, by the snapshot, {when}")
    screen.say(
        f"{format_bytes(recorded.allocated_bytes)} allocated of {format_bytes(recorded.reserved_bytes)} reserved; the largest "
        f"free piece is {format_bytes(recorded.largest_cached_bytes)}",
        indent=2,
    )
    for holder in recorded.holders[:8]:
        where = holder.where or "no stack was recorded"
        screen.say(f"{format_bytes(holder.size_bytes)} in {counted(holder.blocks, 'block')}: {where}", indent=2)


def _print_run(screen: Screen, diagnosis: Diagnosis) -> None:
    run = diagnosis.run
    assert run.target is not None
    words = {"log": "from the text", "message": "from the message"}
    settings = [("model", run.model), ("gpu", run.target.name), *run.values.items()]
    known = [(name, value, run.sources.get(name, "assumed")) for name, value in settings]
    parts = [f"{name} {value} ({words.get(how, how)})" for name, value, how in known if how != "default"]
    if "default" in run.sources.values():
        parts.append("the rest as by default")
    if run.mixed_precision is not None:
        parts.append(f"cast to {run.mixed_precision}")
    _title(screen, "The run")
    screen.say(", ".join(parts), indent=2)


def _print_held(screen: Screen, diagnosis: Diagnosis, held: Outcome, free: Outcome) -> None:
    run, first = diagnosis.run, diagnosis.reading.first
    assert run.target is not None
    name = "oomless" if run.tool == "oomless" else "the plain step (transformers' loss, torch's optimizers)"
    if held.stopped_at is None:
        _title(screen, "What holds the memory at the peak")
        screen.say(
            f"Rehearsed, {name} needs {format_bytes(held.needed_bytes)} and fits into {format_bytes(run.target.usable_bytes)} "
            "with these settings. So something else took the memory: longer blocks, a larger batch, other settings, "
            "another process, or tensors that are kept from step to step.",
            indent=2,
        )
    else:
        where = f" in {held.stopped_at.module}" if held.stopped_at.module else ""
        _title(screen, "What held the rest")
        screen.say(
            f"Rehearsed, {name} stops in the {held.stopped_at.phase} phase{where}, where {held.stopped_at.operation} asks for "
            f"{format_bytes(held.stopped_at.size_bytes)}. The whole run needs {format_bytes(free.needed_bytes)} of "
            f"{format_bytes(run.target.usable_bytes)}.",
            indent=2,
        )
    sizes: list[tuple[str, int]] = [(category, held.held_bytes.get(category, 0)) for category in CATEGORIES]
    sizes += [
        ("cached but unused", held.reserved_bytes - held.allocated_bytes),
        ("outside the allocator", run.target.outside_bytes),
    ]
    full_bytes = sum(size for _, size in sizes)
    screen.print(Padding.indent(bars(screen, sizes, full_bytes), 2))
    if first is not None and first.message.allocated is not None:
        screen.say(
            f"allocated at that moment: {format_bytes(held.allocated_bytes)} rehearsed, {first.message.allocated.text} in the "
            "message",
            indent=2,
        )
    if diagnosis.cures is not None and diagnosis.cures.batch_cannot_help:
        screen.say(
            ("No batch size and no sequence length can help:", "bold"),
            f" weights, gradients and optimizer state alone are {format_bytes(free.fixed_bytes)}.",
            indent=2,
        )


def _print_cures(screen: Screen, diagnosis: Diagnosis, cures: Cures) -> None:
    _title(screen, "What cures it, in the order of what it costs")
    for cure in [c for c in cures.tried if not c.fits]:
        screen.say(
            f"not enough: {cure.title}; saves {format_bytes(cure.saved_bytes)}, needs {format_bytes(cure.needed_bytes)} "
            f"of {format_bytes(cures.usable_bytes)}",
            indent=2,
            style="dim",
        )
    for number, cure in enumerate(cures.fitting, 1):
        _print_cure(screen, number, cure, diagnosis.run.tool)
    if not cures.fitting:
        screen.say(("No setting makes this run fit.", "bold red"), " What would:", indent=2)
        for elsewhere in cures.elsewhere or ("nothing in the catalogue",):
            screen.say(elsewhere, indent=4)


def _print_cure(screen: Screen, number: int, cure: Cure, tool: str | None) -> None:
    screen.say(
        (f"{number}. fits: ", "bold green"),
        (cure.title, "bold"),
        f"; needs {format_bytes(cure.needed_bytes)}, saves "
        f"{format_bytes(cure.saved_bytes)}, {format_bytes(cure.headroom_bytes)} left",
        indent=2,
    )
    screen.say(f"quality: {cure.quality}. Speed: {cure.speed}.", indent=5)
    if cure.config is not None:
        screen.say("oomless train --config with this YAML:", indent=5)
        for line in _yaml_lines(cure):
            screen.say(line, indent=7, style="cyan")
    if cure.tool is not None:
        where = "do" if cure.config is None else f"the same in {tool}"
        screen.say(f"{where}: ", (cure.tool, "cyan"), indent=5)


def _yaml_lines(cure: Cure) -> Iterable[str]:
    assert cure.config is not None
    return str(yaml.safe_dump(own_settings(cure.config), sort_keys=False)).splitlines()
