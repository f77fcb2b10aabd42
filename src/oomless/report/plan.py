"""A plan on the terminal, and the timeline of a rehearsal as a page or a picture."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from oomless.memory.profile import CATEGORIES, MemoryProfile
from oomless.planning.plan import Plan
from oomless.report.charts import page
from oomless.report.pictures import Held, held_over_time
from oomless.report.screen import COLOURS, Screen
from oomless.units import GiB, counted, format_bytes


def print_plan(screen: Screen, plan: Plan) -> None:
    """Print whether the plan fits, its bars, what happens at the peak and the headroom."""
    target, profile = plan.target, plan.profile
    screen.say(
        f"{plan.model} on {target.name}: ",
        ("fits", "bold green") if plan.fits else ("does not fit", "bold red"),
        f". It needs {'' if plan.whole else 'at least '}{format_bytes(plan.needed_bytes)} of the "
        f"{format_bytes(target.usable_bytes)} that are usable "
        f"({'headroom' if plan.headroom_bytes >= 0 else 'short by'} {format_bytes(abs(plan.headroom_bytes))}).",
    )
    if plan.parameters:  # which are not known where it ended while it was built
        screen.print(
            f"{counted(plan.parameters, 'parameter')}, of which {plan.trainable_parameters:,} train", style="dim"
        )
    if plan.fits and plan.cached_bytes > plan.headroom_bytes:
        screen.print(
            f"{format_bytes(plan.cached_bytes)} of this is cached but unused at the peak: PyTorch gives unused segments back "
            "before it runs out, so that somewhat less may be enough."
        )
    _print_bars(screen, plan)
    if profile.peak is not None:
        where = f" in {profile.peak.module}" if profile.peak.module else ""
        screen.print(
            f"peak: {format_bytes(profile.peak_allocated_bytes)} allocated, reached in the {profile.peak.phase} phase{where}, "
            f"when {profile.peak.operation} asked for {format_bytes(profile.peak.size_bytes)}"
        )
    phases = ", ".join(f"{name} {format_bytes(peak.allocated_bytes)}" for name, peak in profile.phases.items())
    screen.print(f"peak of each phase: {phases}")
    if not plan.fits:
        _print_failure(screen, plan)
    for note in target.notes:
        screen.print(note, style="dim")


def print_prediction(screen: Screen, plan: Plan, measured_bytes: int) -> None:
    """Print predicted against measured peak."""
    predicted = plan.profile.peak_allocated_bytes
    screen.print(
        f"peak allocated: predicted {format_bytes(predicted)}, measured {format_bytes(measured_bytes)} "
        f"({(predicted - measured_bytes) / max(1, measured_bytes):+.2%})"
    )


def _print_failure(screen: Screen, plan: Plan) -> None:
    if plan.stopped_at is not None:
        where = f" in {plan.stopped_at.module}" if plan.stopped_at.module else ""
        screen.print(
            f"it would stop in the {plan.stopped_at.phase} phase{where}, where {plan.stopped_at.operation} asks for "
            f"{format_bytes(plan.stopped_at.size_bytes)}. PyTorch would say:"
        )
        screen.print(f"  {plan.out_of_memory}", style="dim")
    if plan.batch_cannot_help:
        screen.say(
            ("No batch size and no sequence length can help:", "bold"),
            f" weights, gradients and optimizer state alone are {'' if plan.whole else 'at least '}{format_bytes(plan.fixed_bytes)}.",
        )


def _print_bars(screen: Screen, plan: Plan) -> None:
    """Print the breakdown at the peak, in proportion to the larger of what is needed and what the GPU has."""
    profile = plan.profile
    sizes: list[tuple[str, int]] = [(c, profile.peak_bytes_by_category.get(c, 0)) for c in CATEGORIES]
    sizes += [("cached but unused", plan.cached_bytes), ("outside the allocator", plan.target.outside_bytes)]
    total = sum(size for _, size in sizes)
    screen.sizes("Memory at the peak", sizes, max(plan.target.capacity_bytes, total))
    screen.print(f"together {format_bytes(total)} of {format_bytes(plan.target.capacity_bytes)}", style="bold")


def write_timeline(profile: MemoryProfile, path: Path) -> None:
    """Write the timeline of a rehearsal to ``path``, a page for ``.html`` or a picture for ``.png``.

    Raises:
        ValueError: the suffix is neither.
        ImportError: matplotlib, which draws the picture, is not installed.
    """
    if path.suffix == ".html":
        title = f"Rehearsal on {profile.device}: peak {format_bytes(profile.peak_allocated_bytes)}"
        path.write_text(page(title, [held_over_time(held_by(profile))]), encoding="utf-8")
    elif path.suffix == ".png":
        _picture(profile, path)
    else:
        raise ValueError(f"a timeline is written as .html or .png; got {path.name}")


def held_by(profile: MemoryProfile, limits: Sequence[tuple[str, float]] = ()) -> Held:
    """Return what a rehearsal held, by category."""
    timeline = profile.timeline
    moments = [
        phase
        + (f": {operation}" if operation else "")
        + (f" in {module}" if module else "")
        + (f" for {tensor}" if tensor else "")
        for phase, operation, module, tensor in zip(
            timeline.phases, timeline.operations, timeline.modules, timeline.tensors, strict=True
        )
    ]
    return Held(
        title="Memory from the beginning to the end of what was rehearsed",
        bands=[(name, timeline.bytes_by_category[name]) for name in CATEGORIES],
        moments=moments,
        limits=limits,
        line=("reserved by the allocator", timeline.reserved_bytes),
    )


def _picture(profile: MemoryProfile, path: Path) -> None:
    from matplotlib.figure import Figure

    figure = Figure(figsize=(12, 5), layout="constrained")
    axes = figure.add_subplot()
    timeline = profile.timeline
    shown = [c for c in CATEGORIES if any(timeline.bytes_by_category[c])]
    axes.stackplot(
        timeline.events,
        [[size / GiB for size in timeline.bytes_by_category[c]] for c in shown],
        labels=shown,
        colors=[COLOURS[c] for c in shown],
    )
    axes.plot(timeline.events, [size / GiB for size in timeline.reserved_bytes], "k--", linewidth=0.8, label="reserved")
    for event, phase in _phase_starts(profile):
        axes.axvline(event, color="black", linewidth=0.2)
        axes.annotate(phase, (event, 1), xycoords=("data", "axes fraction"), rotation=90, va="top", fontsize=6)
    axes.set(xlabel="allocations and frees, in order", ylabel="GiB", title=f"Rehearsal on {profile.device}")
    axes.legend(loc="upper left", fontsize=8)
    figure.savefig(path, dpi=120)


def _phase_starts(profile: MemoryProfile) -> list[tuple[int, str]]:
    timeline = profile.timeline
    starts: list[tuple[int, str]] = []
    for event, phase in zip(timeline.events, timeline.phases, strict=True):
        if not starts or starts[-1][1] != phase:
            starts.append((event, phase))
    # Only phases that last long enough to be read.
    span = max(1, timeline.events[-1] - timeline.events[0]) if timeline.events else 1
    following = [event for event, _ in starts[1:]] + [timeline.events[-1] if timeline.events else 0]
    return [start for start, end in zip(starts, following, strict=True) if end - start[0] > span / 60]
