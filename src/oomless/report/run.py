"""A run as a page of its own, drawn from what lies in its folder: it may be over, stopped, or still going on."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from oomless.errors import ConfigError
from oomless.report.charts import Chart, Line, draw, page, text
from oomless.training.run_folder import EVALUATED, METRICS, PREDICTION
from oomless.units import GiB, KiB, MiB, counted, format_bytes, short

MOST = 1e100
"""Beyond it a number is damage."""
EVENTS = 100
"""So many recoveries and bad steps are listed, the last ones."""
PEAK = ("profile", "peak_allocated_bytes")
SETTINGS_BYTES = 100 * KiB


@dataclass(kw_only=True)
class Logged:
    """What a run folder tells of a run."""

    folder: Path
    values: dict[str, list[tuple[int, float]]] = field(default_factory=dict)
    """By name of metric: its value after a step."""
    events: list[tuple[int, str]] = field(default_factory=list)
    """What went wrong after a step, and what was done."""
    recovered: list[int] = field(default_factory=list)
    bad: list[int] = field(default_factory=list)
    unread: int = 0
    """Lines that are no metrics."""
    prediction: dict[str, Any] = field(default_factory=dict)
    settings: str = ""

    def predicted(self, *path: str) -> float | None:
        """Return a number of the prediction."""
        found: Any = self.prediction
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return _number(found)

    def last(self, name: str) -> float:
        """Return the last value of a metric, 0 where there is none."""
        return self.values[name][-1][1] if name in self.values else 0.0


def read_run(folder: Path) -> Logged:
    """Return what ``folder`` tells.

    Raises:
        ConfigError: it is no run folder, or cannot be read.
    """
    metrics = folder / METRICS
    if not metrics.is_file():
        raise ConfigError(
            f"a report is of a run folder, in which lies {METRICS}; got {folder}: name the output_dir of a run"
        )
    logged = Logged(folder=folder)
    try:
        with metrics.open(encoding="utf-8", errors="replace") as lines:
            for line in lines:
                _read_line(logged, line)
        config = folder / "config.yaml"
        if config.is_file():
            with config.open(encoding="utf-8", errors="replace") as file:
                logged.settings = file.read(SETTINGS_BYTES)
        predicted = folder / PREDICTION
        if predicted.is_file():
            logged.prediction = _mapping(predicted.read_text(encoding="utf-8", errors="replace")) or {}
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be read: {error.strerror or error}") from error
    return logged


def _mapping(line: str) -> dict[str, Any] | None:
    try:
        found = json.loads(line)
    except (ValueError, RecursionError):  # a line that a kill cut short, or that another program wrote
        return None
    return found if isinstance(found, dict) else None


def _read_line(logged: Logged, line: str) -> None:
    record = _mapping(line)
    step = None if record is None else record.pop("step", None)
    if record is None or type(step) is not int or not 0 <= step < 2**53:
        logged.unread += 1
        return
    if "bad_step" in record:
        logged.bad.append(step)
        logged.events.append(
            (step, f"step {record['bad_step']} was bad: {record.get('reason')}; answer: {record.get('answer')}")
        )
        return
    recoveries = _number(record.get("oom_recoveries"))
    if recoveries is not None and recoveries > logged.last("oom_recoveries"):
        logged.recovered.append(step)
        logged.events.append((step, f"memory ran out, recovered; rung {record.get('recovery_rung')} since then"))
    for name, value in record.items():
        number = _number(value)
        if number is not None and (math.isfinite(number) or "loss" in name or name == "gradient_norm"):
            logged.values.setdefault(name, []).append((step, number))


def _number(value: object) -> float | None:
    """Return ``value`` as a number of any use, or ``None``; what is not finite is one, as a loss may be."""
    if type(value) is int and abs(value) < 2**63:
        return float(value)
    return value if isinstance(value, float) and not MOST < abs(value) < math.inf else None


def run_page(logged: Logged) -> str:
    """Return the page of a run."""
    return page(f"Run {logged.folder.resolve().name}", _parts(logged))


def _parts(logged: Logged) -> Iterator[str]:
    yield "".join(f"<p>{text(line)}</p>" for line in summary(logged))
    for chart in _charts(logged):
        yield draw(chart)
    if logged.events:
        events = sorted(logged.events, key=lambda event: event[0])
        yield "<section><h2>Recoveries and bad steps</h2>"
        if len(events) > EVENTS:
            yield f"<p>The last {EVENTS} of {len(events):,}.</p>"
        rows = "".join(
            f'<tr><td>{step:,}</td><td class="text">{text(said[:500])}</td></tr>' for step, said in events[-EVENTS:]
        )
        yield f'<table><thead><tr><th scope="col">after step</th><th scope="col"></th></tr></thead><tbody>{rows}</tbody></table></section>'
    if logged.settings:
        yield f'<section><h2>Settings</h2><pre tabindex="0">{text(logged.settings)}</pre></section>'


def summary(logged: Logged) -> Iterator[str]:
    """Yield a run in a few sentences."""
    steps = [points[-1][0] for points in logged.values.values()]
    yield f"{counted(max(steps, default=0), 'step')}, {short(logged.last('tokens'))} tokens."
    if "loss" in logged.values:
        first, last = logged.values["loss"][0][1], logged.values["loss"][-1][1]
        yield f"Loss {first:.4f} at first, {last:.4f} at last."
    for name, points in logged.values.items():
        if name.startswith(EVALUATED):
            step, best = min(points, key=lambda point: point[1] if math.isfinite(point[1]) else math.inf)
            yield f"Evaluation of {name.removeprefix(EVALUATED)}: {points[0][1]:.4f} at first, best {best:.4f} after step {step:,}."
    if "tokens_per_second" in logged.values:
        yield f"{median(value for _, value in logged.values['tokens_per_second']):,.0f} tokens/s in the middle."
    if "peak_memory_bytes" in logged.values:
        measured = max(value for _, value in logged.values["peak_memory_bytes"])
        predicted = logged.predicted(*PEAK)
        said = (
            ""
            if predicted is None
            else f", predicted {format_bytes(int(predicted))} ({predicted / max(1, measured) - 1:+.2%})"
        )
        yield f"Peak memory {format_bytes(int(measured))} allocated{said}."
    recoveries = int(logged.last("oom_recoveries"))
    if recoveries:
        yield f"Memory ran out {counted(recoveries, 'time')}, and the run went on."
    if logged.unread:
        yield f"{counted(logged.unread, 'line')} of {METRICS} could not be read."


def _charts(logged: Logged) -> Iterator[Chart]:
    def line(name: str, shown: str | None = None) -> Line:
        return Line(shown or name, logged.values.get(name, []))

    evaluated = [
        line(name, f"evaluation: {name.removeprefix(EVALUATED)}")
        for name in logged.values
        if name.startswith(EVALUATED)
    ]
    loss: list[Line] = [line("loss", "training"), *evaluated]
    events = sorted({*logged.recovered, *logged.bad})
    yield Chart(title="Loss", show=_plain, lines=loss, marks=events, marked="memory ran out, or a step was bad")
    yield Chart(title="Learning rate", show=_plain, lines=[line("learning_rate", "learning rate")], from_zero=True)
    yield Chart(
        title="Tokens/s",
        show=lambda value: f"{value:,.0f}",
        lines=[line("tokens_per_second", "tokens/s")],
        from_zero=True,
    )
    yield _memory(logged, [line("peak_memory_bytes", "peak so far"), line("memory_bytes", "after the step")])
    yield Chart(title="Gradient norm", show=_plain, lines=[line("gradient_norm", "gradient norm")], from_zero=True)


def _memory(logged: Logged, lines: list[Line]) -> Chart:
    known = (("predicted peak", PEAK), ("the GPU has", ("capacity_bytes",)))
    limits = [(name, number) for name, path in known if (number := logged.predicted(*path)) is not None]
    most = max(
        (value for _, value in [*limits, *(p for line in lines for p in line.points)] if math.isfinite(value)),
        default=0,
    )
    unit = next((size for size in (GiB, MiB, KiB) if most >= size), 1)
    shown: Callable[[float], str] = lambda value: format_bytes(int(value))  # noqa: E731
    return Chart(
        title="Memory allocated on the device",
        show=shown,
        unit=unit,
        from_zero=True,
        lines=lines,
        limits=limits,
        marks=logged.recovered,
        marked="memory ran out",
    )


def _plain(value: float) -> str:
    return f"{value:.4g}"
