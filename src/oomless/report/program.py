"""The rehearsal of somebody else's program, on the terminal."""

from __future__ import annotations

from collections.abc import Sequence

from oomless.memory.profile import CATEGORIES
from oomless.programs.rehearse import ProgramAnswer
from oomless.report.screen import Screen
from oomless.units import counted, format_bytes


def print_program(screen: Screen, answer: ProgramAnswer) -> None:
    """Print whether the program fits, what filled the memory at the peak, the line that asked, and what was assumed."""
    target, profile = answer.target, answer.profile
    left = target.usable_bytes - answer.needed_bytes
    screen.say(
        f"{answer.script} on {target.name}: ",
        ("fits", "bold green") if answer.fits else ("does not fit", "bold red"),
        f". It needs {format_bytes(answer.needed_bytes)} of the {format_bytes(target.usable_bytes)} that are usable "
        f"({'headroom' if left >= 0 else 'short by'} {format_bytes(abs(left))}).",
    )
    screen.print(f"rehearsed over {counted(answer.steps, 'optimizer step')}: it {answer.ended}", style="dim")
    sizes: list[tuple[str, int]] = [(c, profile.peak_bytes_by_category.get(c, 0)) for c in CATEGORIES]
    sizes += [("cached but unused", profile.cached_bytes), ("outside the allocator", target.outside_bytes)]
    total = sum(size for _, size in sizes)
    screen.sizes("Memory at the peak", sizes, max(target.capacity_bytes, total))
    screen.print(f"together {format_bytes(total)} of {format_bytes(target.capacity_bytes)}", style="bold")
    if profile.peak is not None:
        where = f" in {profile.peak.module}" if profile.peak.module else ""
        screen.print(
            f"peak: {format_bytes(profile.peak_allocated_bytes)} allocated, reached in the {profile.peak.phase} phase{where}, "
            f"when {profile.peak.operation} asked for {format_bytes(profile.peak.size_bytes)}"
        )
    if answer.line:
        screen.print(f"your line at the peak: {answer.line}")
    if answer.message is not None:
        screen.say(
            ("it would stop", "bold"), f" at {answer.stopped_at or 'a line outside of your code'}. PyTorch would say:"
        )
        screen.print(f"  {answer.message}", style="dim")
    for assumed, times in answer.assumed.items():
        screen.print(f"assumed {counted(times, 'time')}: {assumed}", style="dim")
    for note in target.notes:
        screen.print(note, style="dim")


def print_programs(screen: Screen, answers: Sequence[ProgramAnswer]) -> None:
    """Print a line for each GPU that was compared."""
    for answer in answers:
        left = answer.target.usable_bytes - answer.needed_bytes
        screen.say(
            f"{answer.target.name}: ",
            ("fits", "bold green") if answer.fits else ("does not fit", "bold red"),
            f", needs {format_bytes(answer.needed_bytes)} of {format_bytes(answer.target.usable_bytes)} "
            f"({'headroom' if left >= 0 else 'short by'} {format_bytes(abs(left))})",
        )
