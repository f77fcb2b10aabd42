"""A run as a page of its own, drawn from what lies in its folder: it may be over, stopped, or still going on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from oomless.errors import ConfigError
from oomless.export import comparison
from oomless.report.charts import Chart, Line, draw, page, text
from oomless.report.compare import section, side_by_side
from oomless.report.knowledge import knowledge_section
from oomless.report.pictures import shown_bytes, unit_of
from oomless.training.run_files import CONFIG, EVALUATED, LENGTH, METRICS, PREDICTION, SAMPLES, stage_folders
from oomless.units import KiB, counted, format_bytes, short

MOST = 1e100
"""Beyond it a number is damage."""
LAST_SAMPLES = 5
"""So many of what was written after a prompt are shown, beside the first."""
PROMPTS, SAMPLE_CHARACTERS = 16, 1000
"""Of so many prompts, and so much of each text."""
EVENTS = 100
"""So many recoveries and bad steps are listed, the last ones."""
MOST_GPUS = 1 << 10
PEAK = ("profile", "peak_allocated_bytes")
SETTINGS_BYTES = 100 * KiB
END_BYTES = 64 * KiB
"""So much of the end of a run is read to list it."""


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
    samples: dict[str, dict[int, str]] = field(default_factory=dict)
    """By prompt: what the model wrote after a step, of the first step and of the last ones."""
    unread: int = 0
    """Lines that are no metrics."""
    cut: bool = False
    """Whether the last line is not whole, or not yet."""
    prediction: dict[str, Any] = field(default_factory=dict)
    settings: str = ""
    total_steps: int | None = None
    stages: Sequence[Logged] = ()
    """What is told of each stage; none where the run has none."""
    gpus: int = 1
    """On how many it trains."""

    @property
    def name(self) -> str:
        """What the run is called."""
        return self.folder.resolve().name

    @property
    def steps(self) -> int:
        """The last step of which something was measured."""
        return max((points[-1][0] for points in self.values.values()), default=0)

    def predicted(self, *path: str) -> float | None:
        """Return a number of the prediction."""
        found: Any = self.prediction
        for key in path:
            found = found.get(key) if isinstance(found, dict) else None
        return _number(found)

    def last(self, name: str) -> float:
        """Return the last value of a metric, 0 where there is none."""
        return self.values[name][-1][1] if name in self.values else 0.0


class Reader:
    """Reads a run folder, and then again what came since, so that a long run is not read anew at every look."""

    def __init__(self, folder: Path) -> None:
        """Read nothing yet of ``folder``."""
        self.folder = folder
        self._logged = Logged(folder=folder)
        self._file: int | None = None
        self._read_bytes = 0
        self._stages: dict[Path, Reader] = {}

    def read(self) -> Logged:
        """Return what the folder tells now, of a run in stages all of them.

        Raises:
            ConfigError: it is no run folder, or cannot be read.
        """
        if stages := stage_folders(self.folder):
            self._stages = {path: self._stages.get(path) or Reader(path) for path in stages}
            return _joined(
                self.folder, [reader.read() for path, reader in self._stages.items() if (path / METRICS).is_file()]
            )
        metrics = self.folder / METRICS
        if not metrics.is_file():
            raise ConfigError(
                f"a report is of a run folder, in which lies {METRICS}; got {self.folder}: name the output_dir of a run"
            )
        try:
            self._read_metrics(metrics)
            self._logged.settings = _text(self.folder / CONFIG, SETTINGS_BYTES)
            self._logged.prediction = _mapping(_text(self.folder / PREDICTION)) or {}
            _read_length(self._logged)
        except OSError as error:
            raise ConfigError(f"the run folder {self.folder} cannot be read: {error.strerror or error}") from error
        return self._logged

    def _read_metrics(self, path: Path) -> None:
        with path.open("rb") as file:
            found = os.fstat(file.fileno())
            if found.st_ino != self._file or found.st_size < self._read_bytes:  # a run that went on from a checkpoint
                self._logged, self._file, self._read_bytes = Logged(folder=self.folder), found.st_ino, 0
            file.seek(self._read_bytes)
            self._logged.cut = False
            for line in file:
                if not line.endswith(b"\n"):
                    self._logged.cut = True
                    return
                self._read_bytes += len(line)
                _read_line(self._logged, line.decode(errors="replace"))


def read_run(folder: Path) -> Logged:
    """Return what ``folder`` tells.

    Raises:
        ConfigError: it is no run folder, or cannot be read.
    """
    return Reader(folder).read()


def read_end(folder: Path) -> Logged:
    """Return what the last lines in ``folder`` tell, which takes no longer for a long run; a folder without any tells nothing."""
    if stages := stage_folders(folder):
        return _joined(folder, [read_end(stage) for stage in stages])
    logged, path = Logged(folder=folder), folder / METRICS
    try:
        if path.is_file():
            with path.open("rb") as file:
                beginning = max(0, path.stat().st_size - END_BYTES)
                file.seek(beginning)
                for line in file.read(END_BYTES).split(b"\n")[1 if beginning else 0 : -1]:
                    _read_line(logged, line.decode(errors="replace"))
        _read_length(logged)
    except OSError as error:
        raise ConfigError(f"the run folder {folder} cannot be read: {error.strerror or error}") from error
    return logged


def _joined(folder: Path, stages: Sequence[Logged]) -> Logged:
    """Return the run in ``folder`` of its ``stages``, whose steps and tokens are counted on from one to the next."""
    whole = Logged(folder=folder, settings=_text(folder / CONFIG, SETTINGS_BYTES), stages=stages)
    for stage in stages:
        first, tokens = whole.steps, whole.last("tokens")
        for name, points in stage.values.items():
            more = tokens if name == "tokens" else 0.0
            whole.values.setdefault(name, []).extend((first + step, value + more) for step, value in points)
        whole.events += [(first + step, said) for step, said in stage.events]
        whole.recovered += [first + step for step in stage.recovered]
        whole.bad += [first + step for step in stage.bad]
        for prompt, written in stage.samples.items():
            whole.samples.setdefault(prompt, {}).update((first + step, said) for step, said in written.items())
        whole.gpus = max(whole.gpus, stage.gpus)
        whole.unread += stage.unread
        whole.cut |= stage.cut
        if (stage.predicted(*PEAK) or 0) >= (whole.predicted(*PEAK) or 0):
            whole.prediction = stage.prediction
    lengths = [stage.total_steps for stage in stages]
    if len(lengths) == (_mapping(_text(folder / LENGTH)) or {}).get("stages") and None not in lengths:
        whole.total_steps = sum(filter(None, lengths))
    return whole


def _read_length(logged: Logged) -> None:
    found = _mapping(_text(logged.folder / LENGTH)) or {}
    steps, gpus = found.get("total_steps"), found.get("gpus")
    logged.total_steps = steps if type(steps) is int and 0 < steps < 2**53 else None
    logged.gpus = gpus if type(gpus) is int and 0 < gpus < MOST_GPUS else 1


def _text(path: Path, most: int = -1) -> str:
    """Return the text of a file, or the start of it; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open(encoding="utf-8", errors="replace") as file:
        return file.read(most)


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
    if SAMPLES in record:
        _keep_samples(logged, step, record[SAMPLES])
        return
    recoveries = _number(record.get("oom_recoveries"))
    if recoveries is not None and recoveries > logged.last("oom_recoveries"):
        logged.recovered.append(step)
        logged.events.append((step, f"memory ran out, recovered; rung {record.get('recovery_rung')} since then"))
    for name, value in record.items():
        number = _number(value)
        if number is not None and (math.isfinite(number) or "loss" in name or name == "gradient_norm"):
            logged.values.setdefault(name, []).append((step, number))


def _keep_samples(logged: Logged, step: int, samples: object) -> None:
    for sample in samples if isinstance(samples, list) else ():
        prompt, written = (sample.get("prompt"), sample.get("text")) if isinstance(sample, dict) else (None, None)
        if not isinstance(prompt, str) or not isinstance(written, str):
            logged.unread += 1
            continue
        of_prompt = logged.samples.setdefault(prompt, {})
        of_prompt[step] = written
        if len(of_prompt) > LAST_SAMPLES + 1:
            del of_prompt[sorted(of_prompt)[1]]


def _number(value: object) -> float | None:
    """Return ``value`` as a number of any use, or ``None``; what is not finite is one, as a loss may be."""
    if type(value) is int and abs(value) < 2**63:
        return float(value)
    return value if isinstance(value, float) and not MOST < abs(value) < math.inf else None


def run_page(logged: Logged) -> str:
    """Return the page of a run."""
    return page(f"Run {logged.name}", [*run_head(logged), *charts_of([logged]), *run_details(logged)])


def run_head(logged: Logged) -> Iterator[str]:
    """Yield a run in a few sentences."""
    yield "".join(f"<p>{text(line)}</p>" for line in summary(logged))


def charts_of(runs: Sequence[Logged]) -> Iterator[str]:
    """Yield the charts of ``runs``, several over each other."""
    for chart in _charts(runs):
        yield draw(chart)


def run_details(logged: Logged) -> Iterator[str]:
    """Yield what went wrong in a run, and its settings."""
    yield from knowledge_section(logged)
    if (compared := comparison.read(logged.folder)) is not None:
        yield section(compared)
    if logged.samples:
        yield '<section class="wide"><h2>Written on the way</h2>'
        if len(logged.samples) > PROMPTS:
            yield f"<p>The first {PROMPTS} of {len(logged.samples):,} texts.</p>"
        for prompt, of_prompt in islice(logged.samples.items(), PROMPTS):
            sides = [(f"after step {step:,}", _start_of(written)) for step, written in of_prompt.items()]
            yield side_by_side(_start_of(prompt), sides)
        yield "</section>"
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


def _start_of(written: str) -> str:
    return written if len(written) <= SAMPLE_CHARACTERS else f"{written[:SAMPLE_CHARACTERS]} ..."


def summary(logged: Logged) -> Iterator[str]:
    """Yield a run in a few sentences."""
    length = "" if logged.total_steps is None else f" of {logged.total_steps:,}"
    yield f"{counted(logged.steps, 'step')}{length}, {short(logged.last('tokens'))} tokens."
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
    if logged.unread or logged.cut:
        yield f"{counted(logged.unread + logged.cut, 'line')} of {METRICS} could not be read."


def _charts(runs: Sequence[Logged]) -> Iterator[Chart]:
    alone = len(runs) == 1

    def lines(*shown: tuple[str, str]) -> list[Line]:
        """The lines of all runs, by what a metric's name begins with and what it is called."""
        return [
            Line(_name(run, called + name.removeprefix(begin), alone), points)
            for run in runs
            for begin, called in shown
            for name, points in run.values.items()
            if name == begin or (begin.endswith("/") and name.startswith(begin))
        ]

    def marks(of: Callable[[Logged], Sequence[int]]) -> list[int]:
        return sorted(set(of(runs[0]))) if alone else []

    yield Chart(
        title="Loss",
        show=_plain,
        lines=lines(("loss", "training"), (EVALUATED, "evaluation: ")),
        marks=marks(lambda run: [*run.recovered, *run.bad]),
        marked="memory ran out, or a step was bad",
    )
    yield Chart(title="Learning rate", show=_plain, lines=lines(("learning_rate", "learning rate")), from_zero=True)
    yield Chart(
        title="Tokens/s",
        show=lambda value: f"{value:,.0f}",
        lines=lines(("tokens_per_second", "tokens/s")),
        from_zero=True,
    )
    known = (("predicted peak", PEAK), ("the GPU has", ("capacity_bytes",)))
    yield _memory(
        "Memory allocated on the device",
        lines(("peak_memory_bytes", "peak so far"), ("memory_bytes", "after the step")),
        limits=[
            (_name(run, name, alone), number)
            for run in runs
            for name, path in known
            if (number := run.predicted(*path)) is not None
        ],
        marks=marks(lambda run: run.recovered),
    )
    yield Chart(title="Gradient norm", show=_plain, lines=lines(("gradient_norm", "gradient norm")), from_zero=True)
    if any("busiest_expert_share" in run.values for run in runs):
        shares = lines(("busiest_expert_share", "busiest expert of a layer"))
        yield Chart(title="Share of choices", show=lambda value: f"{value:.1%}", lines=shares, from_zero=True)


def _name(run: Logged, of: str, alone: bool) -> str:
    return of if alone else f"{run.name}: {of}"


def _memory(title: str, lines: list[Line], limits: list[tuple[str, float]], marks: list[int]) -> Chart:
    values = [value for _, value in [*limits, *(p for line in lines for p in line.points)] if math.isfinite(value)]
    return Chart(
        title=title,
        show=shown_bytes,
        unit=unit_of(max(values, default=0)),
        from_zero=True,
        lines=lines,
        limits=limits,
        marks=marks,
        marked="memory ran out",
    )


def _plain(value: float) -> str:
    return f"{value:.4g}"
