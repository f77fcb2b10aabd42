"""An export as a person sees it: what it will take, how far it is, and how it was checked."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from rich.text import Text

from oomless.report.screen import LiveLine, Screen, bar
from oomless.units import counted, format_bytes

if TYPE_CHECKING:
    from oomless.export.plan import Plan
    from oomless.export.run import Exported

_BAR_WIDTH = 20


def print_export_plan(screen: Screen, plan: Plan) -> None:
    """Print what ``plan`` takes."""
    source = plan.source
    of = f" of {source.base.name}" if source.kind != "model" else ""
    files = counted(len(plan.files.streams), "file")
    screen.print(f"{source.name}{of} -> {plan.target}", soft_wrap=True)
    screen.print(
        f"  {format_bytes(plan.disk_bytes)} of disk in {files} ({format_bytes(plan.free_bytes)} free), numbers in {plan.files.dtype}"
    )
    screen.print(f"  {format_bytes(plan.host_bytes)} of memory while it is written, about {_duration(plan.seconds)}")
    screen.print(f"  verify: {plan.verify}")
    for note in plan.files.notes:
        screen.print(f"  {note}")
    if plan.begun_bytes:
        screen.print(f"  {format_bytes(plan.begun_bytes)} were written before: it goes on from there")


def print_export(screen: Screen, exported: Exported) -> None:
    """Print what came of it."""
    checked = exported.checked
    if checked.error is not None:
        screen.print(
            f"checked: every tensor read back, logits off by {checked.error:.2%} (at most {checked.tolerance:.2%})"
        )
    else:
        screen.print("checked: every tensor read back" if checked.how == "sample" else "not checked")
    there = "was exported already" if exported.was_there else "exported"
    screen.print(f"{there}: {exported.folder}", soft_wrap=True)


@contextmanager
def exporting(screen: Screen) -> Iterator[Callable[[str, float], None]]:
    """Show how far an export is, in one line that goes away."""
    began, live = time.monotonic(), LiveLine(screen)

    def say(what: str, share: float) -> None:
        seconds = f"{time.monotonic() - began:.0f} s"
        drawn = bar(share, min(_BAR_WIDTH, screen.width // 4))
        live.show(Text.assemble(drawn, f" {seconds:>5}  {what}"), f"{what}, {share:.0%}, {seconds}")

    try:
        yield say
    finally:
        live.close()


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{max(1, round(seconds))} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes / 60:.1f} h"
