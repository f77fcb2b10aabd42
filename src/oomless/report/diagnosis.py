"""A diagnosis on the terminal, as it is found, and the same as a page."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import yaml

from oomless.diagnosis.attribution import Suspect
from oomless.diagnosis.cures import Cure, Cures, own_settings
from oomless.diagnosis.explain import Diagnosis, Listener
from oomless.diagnosis.first_answer import FirstAnswer
from oomless.diagnosis.plain_step import Outcome
from oomless.diagnosis.run import FailedRun
from oomless.memory.profile import CATEGORIES
from oomless.report.charts import page
from oomless.report.first_answer import (
    print_first_answer,
    print_missing,
    print_remedies,
    print_suspects,
    print_why_not,
)
from oomless.report.paper import Paper, Teller
from oomless.report.pictures import DOES_NOT_FIT, FITS, held_over_time, made_of, ranked
from oomless.report.plan import held_by
from oomless.training.checkpoint import write_atomically
from oomless.units import counted, format_bytes

HOLDERS = 8
"""So many places that held memory are named."""


class Printer(Listener):
    """Prints a diagnosis as it is found, after its first answer."""

    def __init__(
        self,
        screen: Teller,
        first: FirstAnswer,
        say: Callable[[str], None] = lambda _: None,
        hide: Callable[[], None] = lambda: None,
    ) -> None:
        """Print on ``screen`` what follows ``first``; ``say`` is told what is rehearsed, and ``hide`` is called before each print."""
        super().__init__(say)
        self.screen, self.first, self.hide, self._fitting = screen, first, hide, 0

    def attributed(self, run: FailedRun, suspects: list[Suspect]) -> None:
        """Print what asked."""
        self.hide()
        if [(s.tensor.kind, s.tokens) for s in suspects[:1]] != [
            (s.tensor.kind, s.tokens) for s in self.first.suspects[:1]
        ]:
            print_suspects(self.screen, self.first, tuple(suspects), "by where the rehearsal stops")
        elif suspects and len(suspects[0].support) > len(self.first.suspects[0].support):
            self.screen.say(f"{suspects[0].support[-1]}: {suspects[0].tensor.kind}", indent=2)
        _print_run(self.screen, run)

    def rehearsed(self, run: FailedRun, at_failure: Outcome, without_limit: Outcome) -> None:
        """Print what held the memory."""
        self.hide()
        _print_held(self.screen, self.first, run, at_failure, without_limit)

    def cured(self, cure: Cure) -> None:
        """Print a cure."""
        self.hide()
        if not cure.fits:
            self.screen.say(
                f"not enough: {cure.title}; saves {format_bytes(cure.saved_bytes)}, needs {format_bytes(cure.needed_bytes)}",
                indent=2,
                style="dim",
            )
            return
        if not self._fitting:
            self.screen.title("What cures it, in the order of what it costs (each rehearsed)")
        self._fitting += 1
        _print_cure(self.screen, self._fitting, cure, self.first.situation.tool)

    def close(self, diagnosis: Diagnosis) -> None:
        """Print what comes last."""
        screen, cures = self.screen, diagnosis.cures
        if diagnosis.not_rehearsed is not None:
            print_why_not(screen, diagnosis.first, diagnosis.not_rehearsed)
        for note in diagnosis.first.situation.notes[len(self.first.situation.notes) :]:
            screen.say(note, style="dim")
        if cures is not None:
            screen.draw(lambda: _cures_beside(cures))
            _print_end_of_cures(screen, cures)
        if cures is None or not cures.fitting:
            print_remedies(screen, diagnosis.first)
        print_missing(screen, diagnosis.missing)


def print_diagnosis(screen: Teller, diagnosis: Diagnosis) -> None:
    """Print what failed, what asked, what held the rest, and what would cure it."""
    first, run = diagnosis.first, diagnosis.run
    print_first_answer(screen, first)
    if first.snapshot is not None:
        print_holders(screen, first)
    printer = Printer(screen, first)
    if run is not None and diagnosis.at_failure is not None and diagnosis.without_limit is not None:
        printer.attributed(run, list(diagnosis.suspects))
        printer.rehearsed(run, diagnosis.at_failure, diagnosis.without_limit)
    for cure in diagnosis.cures.tried if diagnosis.cures is not None else ():
        printer.cured(cure)
    printer.close(diagnosis)


def write_page(diagnosis: Diagnosis, path: Path) -> None:
    """Write the diagnosis to ``path`` as a page of its own.

    Raises:
        OSError: it cannot be written.
    """
    paper = Paper()
    print_diagnosis(paper, diagnosis)
    write_atomically(path, page("Out of memory", paper.parts()))


def print_holders(screen: Teller, answer: FirstAnswer) -> None:
    """Print what held the memory by the snapshot."""
    recorded = answer.snapshot
    assert recorded is not None
    when = {
        "out of memory": "when it ran out",
        "peak": "at the peak of what was recorded",
        "end": "when it was written, as no history was recorded",
    }[recorded.moment]
    screen.title(f"What held the memory of GPU {recorded.gpu}, by the snapshot, {when}")
    screen.say(
        f"{format_bytes(recorded.allocated_bytes)} allocated of {format_bytes(recorded.reserved_bytes)} reserved; the largest "
        f"free piece is {format_bytes(recorded.largest_cached_bytes)}",
        indent=2,
    )
    named = [(holder.where or "no stack was recorded", holder.size_bytes) for holder in recorded.holders[:HOLDERS]]
    others = ("elsewhere", sum(holder.size_bytes for holder in recorded.holders[HOLDERS:]))
    reserved = [("reserved by the allocator", float(recorded.reserved_bytes))]
    for holder in recorded.holders[:HOLDERS]:
        where = holder.where or "no stack was recorded"
        screen.say(f"{format_bytes(holder.size_bytes)} in {counted(holder.blocks, 'block')}: {where}", indent=2)
    screen.draw(lambda: made_of("What was held, by who asked for it", [*named, others], reserved))


def _print_run(screen: Teller, run: FailedRun) -> None:
    assert run.target is not None
    words = {"log": "from the text", "message": "from the message", "tool": "the tool's default"}
    settings = [("model", run.model), ("gpu", run.target.name), *run.values.items()]
    known = [(name, value, run.sources.get(name, "assumed")) for name, value in settings]
    parts = [f"{name} {value} ({words.get(how, how)})" for name, value, how in known if how != "default"]
    if "default" in run.sources.values():
        parts.append("the rest as by default")
    if run.mixed_precision is not None:
        parts.append(f"cast to {run.mixed_precision}")
    if run.sequences_each > 1:
        parts.append("chosen and rejected together")
    if run.reference:
        parts.append("a frozen copy as reference")
    screen.title("The run that is rehearsed")
    screen.say(", ".join(parts), indent=2)


def _print_held(screen: Teller, first: FirstAnswer, run: FailedRun, held: Outcome, free: Outcome) -> None:
    assert run.target is not None
    occurrence = first.situation.reading.first
    name = "oomless" if run.tool == "oomless" else "the plain step (transformers' loss, torch's optimizers)"
    if held.stopped_at is None:
        screen.title("What holds the memory at the peak")
        assumed = [
            n
            for n in ("max_seq_length", "dtype", "per_device_train_batch_size")
            if run.sources.get(n, "assumed") == "assumed"
        ]
        reason = f" {', '.join(assumed)} {'are' if len(assumed) > 1 else 'is'} assumed here." if assumed else ""
        screen.say(
            f"Rehearsed, {name} needs {format_bytes(held.needed_bytes)} and fits into {format_bytes(run.target.usable_bytes)} "
            f"with these settings.{reason} So if it failed, something else took the memory: longer sequences, a larger batch, other "
            "settings, another process, or tensors that are kept from step to step.",
            indent=2,
        )
    else:
        where = f" in {held.stopped_at.module}" if held.stopped_at.module else ""
        screen.title("What held the rest")
        screen.say(
            f"Rehearsed, {name} stops in the {held.stopped_at.phase} phase{where}, where {held.stopped_at.operation} asks for "
            f"{format_bytes(held.stopped_at.size_bytes)}. The whole run needs {format_bytes(free.needed_bytes)} of "
            f"{format_bytes(run.target.usable_bytes)}.",
            indent=2,
        )
        said = occurrence.place.phase if occurrence is not None else None
        if said is not None and said != held.stopped_at.phase and {said, held.stopped_at.phase} != {"forward", "loss"}:
            screen.say(
                f"The traceback says {said}, so the run differs in something that the text does not show.", indent=2
            )
    sizes: list[tuple[str, int]] = [(category, held.held_bytes.get(category, 0)) for category in CATEGORIES]
    sizes += [
        ("cached but unused", held.reserved_bytes - held.allocated_bytes),
        ("outside the allocator", run.target.outside_bytes),
    ]
    limits = [("the GPU has", float(run.target.capacity_bytes))]
    screen.sizes("What it was made of", sizes, sum(size for _, size in sizes), limits=limits, indent=2)
    usable = [("the allocator can have", float(run.target.usable_bytes))]
    screen.draw(lambda: held_over_time(held_by(held.device.profile(), usable)))
    if occurrence is not None and occurrence.message.allocated is not None:
        screen.say(
            f"allocated at that moment: {format_bytes(held.allocated_bytes)} rehearsed, {occurrence.message.allocated.text} in the "
            "message",
            indent=2,
        )
    if free.fixed_bytes > run.target.usable_bytes:
        screen.say(
            ("No batch size and no sequence length can help:", "bold"),
            f" weights, gradients and optimizer state alone are {format_bytes(free.fixed_bytes)}"
            + (
                f", with the dtype that is assumed ({run.values['dtype']})."
                if run.sources.get("dtype") == "assumed"
                else "."
            ),
            indent=2,
        )


def _print_end_of_cures(screen: Teller, cures: Cures) -> None:
    if cures.not_reached:
        screen.say(
            f"\nThe time did not suffice for {len(cures.not_reached)} more: --budget gives it more seconds.",
            style="dim",
        )
    if cures.fitting:
        return
    if cures.elsewhere or not cures.not_reached:
        screen.say(("\nNo setting that was rehearsed makes this run fit.", "bold red"), " What would:")
        for elsewhere in cures.elsewhere or ("nothing in the catalogue",):
            screen.say(elsewhere, indent=4)


def _print_cure(screen: Teller, number: int, cure: Cure, tool: str | None) -> None:
    screen.say(
        (f"{number}. fits: ", "bold green"),
        (cure.title, "bold"),
        f"; needs {format_bytes(cure.needed_bytes)}, saves "
        f"{format_bytes(cure.saved_bytes)}, {format_bytes(cure.headroom_bytes)} left",
        indent=2,
    )
    screen.say(f"quality: {cure.quality}. Speed: {cure.speed}.", indent=5)
    if cure.tool is not None:
        screen.say(f"{f'in {tool}' if tool else 'do'}: ", (cure.tool, "cyan"), indent=5)
    if cure.config is not None:
        screen.say("oomless train --config with this YAML:", indent=5)
        screen.code("YAML", yaml.safe_dump(own_settings(cure.config), sort_keys=False), indent=7)


def _cures_beside(cures: Cures) -> str:
    """Return what the run needs as it was and with each cure, as bars; empty where none was rehearsed."""
    if not cures.tried:
        return ""
    bars = [("as it was", cures.before_bytes, DOES_NOT_FIT)]
    bars += [(cure.title, cure.needed_bytes, FITS if cure.fits else DOES_NOT_FIT) for cure in cures.tried]
    return ranked("What the run needs with each cure", bars, [("the allocator can have", float(cures.usable_bytes))])
