"""What a check of a GPU found, as a person sees it."""

from __future__ import annotations

from oomless.calibration.check import Checked
from oomless.calibration.points import Point
from oomless.report.screen import Screen
from oomless.report.tables import Grid
from oomless.units import counted, format_bytes

COLUMNS = ("training", "allocated", "error", "reserved", "its error", "tokens/s", "predicted")


def print_checked(screen: Screen, found: Checked) -> None:
    """Print ``found``."""
    wrong = [finding for finding in found.findings if not finding.right]
    verdict = "all as predicted" if not wrong else f"{counted(len(wrong), 'thing')} not as it should be"
    screen.print(f"{found.gpu}: {verdict}", style="bold", soft_wrap=True)
    if found.virtual:
        screen.print(
            "tried on a virtual GPU: tiny models on the CPU, whose speed says nothing of a GPU", soft_wrap=True
        )
    for finding in found.findings:
        screen.print(f"{'right' if finding.right else 'WRONG'}  {finding.part}: {finding.text}", soft_wrap=True)
    for name, rate in found.rates.items():
        reached = f"{rate / 1e12:,.2f} TFLOP/s" if "products" in name else f"{rate / 1e9:,.1f} GB/s"
        screen.print(f"       {name}: {reached}", soft_wrap=True)
    grid = Grid(columns=COLUMNS, numbers=frozenset(COLUMNS[1:]))
    for point in found.points:
        grid.add(point.name, *_cells(point))
    grid.print(screen)
    if found.untried:
        screen.print(f"no time was left for {counted(found.untried, 'training')}: give more --minutes", soft_wrap=True)


def _cells(point: Point) -> tuple[str, ...]:
    if not point.measured_allocated_bytes:
        return ("does not fit" if not point.fits else "ran out", "", "", "", "", "")
    speed = point.predicted_tokens_per_second
    return (
        format_bytes(point.measured_allocated_bytes),
        f"{point.allocated_error:+.2%}",
        format_bytes(point.measured_reserved_bytes),
        f"{point.reserved_error:+.2%}",
        f"{point.measured_tokens_per_second:,.0f}",
        "" if speed is None else f"{speed:,.0f}",
    )
