"""What would cure it: changes of the settings in the order of what they cost, each rehearsed on the GPU that ran out.

A cure is said to fit only where the rehearsal of the whole run with it fits, and is left out where it saves nothing. It is
rehearsed as the tool that failed runs it, so that what it saves is the difference of two rehearsals that differ in it alone; and
last comes the same run in oomless.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from oomless import catalogue
from oomless.config import LORA_DEFAULTS, OPTIMIZER_DEFAULTS, TrainConfig
from oomless.diagnosis.changes import BUNDLES, CHANGES, EVALUATION, PARTS, PLAIN, SAME, SAME_SPEED, apply_all
from oomless.diagnosis.clock import Clock
from oomless.diagnosis.plain_step import Outcome
from oomless.diagnosis.run import FailedRun, oomless_values, rehearse_own, rehearse_run
from oomless.diagnosis.tools import change_in
from oomless.errors import UserError
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.models.spec import resolve_for_plan
from oomless.planning.nearby import first_with
from oomless.planning.plan import Target, target_for

ENOUGH = 3
"""So many cures that fit are looked for."""

LEAST_SAVING = 0.005
"""Share of what is needed below which a cure is not worth naming."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cure:
    """A rehearsed change of the run."""

    title: str
    changes: tuple[str, ...]
    settings: Mapping[str, Any]
    """What it sets, under oomless' names."""

    config: TrainConfig | None
    """The whole run with it, where it was rehearsed in oomless; ``None`` for a run of another tool."""

    needed_bytes: int
    saved_bytes: int
    """Against the run as it was."""

    fits: bool
    headroom_bytes: int
    quality: str
    speed: str
    tool: str | None
    """The same change in the tool that failed."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "title": self.title,
            "fits": self.fits,
            "needed_bytes": self.needed_bytes,
            "saved_bytes": self.saved_bytes,
            "headroom_bytes": self.headroom_bytes,
            "quality": self.quality,
            "speed": self.speed,
            "settings": dict(self.settings),
            "oomless": None if self.config is None else own_settings(self.config),
            "tool": self.tool,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Cures:
    """What was found."""

    usable_bytes: int
    before_bytes: int
    """What the run as it was needs."""

    fixed_bytes: int
    """Of that, weights, gradients and optimizer state."""

    tried: tuple[Cure, ...]
    """In the order of what they cost."""

    elsewhere: tuple[str, ...]
    """The smallest GPU or model change that fits, where no cure does."""

    not_reached: tuple[str, ...] = ()
    """What the time did not suffice for."""

    @property
    def fitting(self) -> tuple[Cure, ...]:
        """Those that fit."""
        return tuple(cure for cure in self.tried if cure.fits)

    @property
    def batch_cannot_help(self) -> bool:
        """Whether what no batch size changes is more than the GPU has."""
        return self.fixed_bytes > self.usable_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "usable_bytes": self.usable_bytes,
            "needed_before_bytes": self.before_bytes,
            "fixed_bytes": self.fixed_bytes,
            "batch_cannot_help": self.batch_cannot_help,
            "tried": [cure.to_dict() for cure in self.tried],
            "elsewhere": list(self.elsewhere),
            "not_reached": list(self.not_reached),
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What the rehearsal of a bundle came to."""

    needed_bytes: int
    fits: bool
    headroom_bytes: int


class _Search:
    """Rehearses bundles, each different one once, and keeps what they came to."""

    def __init__(
        self, run: FailedRun, before: Outcome, clock: Clock, heard: Callable[[Cure], None], evaluates: bool
    ) -> None:
        self.run, self.before, self.clock, self.heard, self.evaluates = run, before, clock, heard, evaluates
        self.base: dict[str, Any] = dict(run.values)
        if run.tool == "oomless":
            self.base = oomless_values(run)
        else:
            self.base |= {name: getattr(run, name, evaluates) for name in PLAIN}
        self.known: list[tuple[dict[str, Any], _Answer | None]] = []
        self.cures: list[Cure] = []
        self.not_reached: list[str] = []

    def plan(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any], _Answer | None]:
        """Return the changes of ``names`` that apply, what they set, and what they come to, if they can be rehearsed in time."""
        applied, sets = apply_all(names, self.base)
        if not applied:
            return applied, sets, None
        settings = {k: v for k, v in (self.base | sets).items() if v is not None}
        for known, answer in self.known:
            if known == settings:
                return applied, sets, answer
        title = ", ".join(CHANGES[name].title for name in applied)
        if not self.clock.has_time():
            self.not_reached.append(title)
            return applied, sets, None
        with self.clock.timing(f"cure: {title}"):
            answer = _measured(changed(self.run, sets), self.evaluates)
        self.known.append((settings, answer))
        return applied, sets, answer

    def add(self, names: tuple[str, ...]) -> None:
        """Take the bundle into the list, if it applies and saves something that no smaller bundle saves."""
        applied, sets, answer = self.plan(names)
        if not applied or answer is None or any(set(cure.changes) == set(applied) for cure in self.cures):
            return
        if any(c.fits and set(c.changes) < set(applied) for c in self.cures):
            return  # what it adds is not needed
        smaller = [c.needed_bytes for c in self.cures if set(c.changes) < set(applied)]
        least = min([self.before.needed_bytes, *smaller])
        saved = self.before.needed_bytes - answer.needed_bytes
        if saved > 0 and (answer.fits or answer.needed_bytes < least - LEAST_SAVING * self.before.needed_bytes):
            self.take(_cure(self.run, applied, sets, answer, saved))

    def take(self, cure: Cure) -> None:
        """Take ``cure`` into the list."""
        self.cures.append(cure)
        self.heard(cure)

    def found(self) -> int:
        """Return how many fit."""
        return sum(cure.fits for cure in self.cures)

    def groups(self, groups: tuple[tuple[tuple[str, ...], ...], ...], enough: int) -> None:
        """Go through ``groups`` as far as one with bundles that fit, ``enough`` at most; of one whose leanest does not, take that alone."""
        before = self.found()
        for group in groups:
            if self.found() > before or self.found() >= enough:
                return
            leanest = self.plan(group[-1])[2]
            if leanest is None or not leanest.fits:
                self.add(group[-1])
                continue
            for names in group:
                if self.found() < enough:
                    self.add(names)


def find_cures(
    run: FailedRun,
    before: Outcome,
    *,
    evaluates: bool,
    fragmented: bool,
    others_bytes: int,
    clock: Clock,
    heard: Callable[[Cure], None],
) -> Cures:
    """Return the cures of ``run``, which as it was needs what ``before`` says.

    Args:
        run: complete: model, GPU, length and dtype are known.
        before: of the run as it was, without a limit.
        evaluates: whether it failed in its evaluation.
        fragmented: whether the message shows memory that is reserved but cannot be used.
        others_bytes: what other processes hold of the GPU.
        clock: says whether there is time for another rehearsal.
        heard: is told each cure as it is found.
    """
    assert run.target is not None
    search = _Search(run, before, clock, heard, evaluates)
    for cure in _around_the_run(run, before, clock, evaluates, fragmented=fragmented, others_bytes=others_bytes):
        search.take(cure)
    if evaluates:
        search.groups((EVALUATION,), 1)
    if not search.found() or not evaluates:
        search.groups(BUNDLES[:1], ENOUGH)
        if not search.found():
            leanest = search.plan(BUNDLES[-1][-1])[2]
            search.groups(BUNDLES[1:] if leanest is None or leanest.fits else (BUNDLES[-1][-1:],), ENOUGH)
        for name, group in PARTS.items():
            if CHANGES[name].apply(search.base) is not None and search.found() < 2:
                search.groups((group,), ENOUGH)
    if run.tool != "oomless" and run.method is None and not evaluates:
        _in_oomless(run, before, search)
    return Cures(
        usable_bytes=run.target.usable_bytes,
        before_bytes=before.needed_bytes,
        fixed_bytes=before.fixed_bytes,
        tried=tuple(search.cures),
        elsewhere=() if search.found() else tuple(_elsewhere(run, clock)),
        not_reached=tuple(dict.fromkeys(search.not_reached)),
    )


def _in_oomless(run: FailedRun, before: Outcome, search: _Search) -> None:
    """Take the same run in oomless, as it was or as lean as it has to be to fit."""
    own = dataclasses.replace(
        run, tool="oomless", values=oomless_values(run), mixed_precision=None, attention="sdpa", fused_loss=False
    )
    for names in ((), *(group[-1] for group in BUNDLES)):
        applied, sets = apply_all(names, own.values)
        if not search.clock.has_time():
            search.not_reached.append("the same run in oomless")
            return
        with search.clock.timing("cure: the same run in oomless"):
            answer = _measured(changed(own, sets), False)
        saved = 0 if answer is None else before.needed_bytes - answer.needed_bytes
        if answer is not None and answer.fits and saved > 0:
            cure = _cure(own, applied, sets, answer, saved)
            more = f", with {cure.title}" if applied else ""
            quality = (
                cure.quality
                if run.values.get("dtype") == "fp32" and run.mixed_precision is None
                else f"updates are made to exact copies of 16-bit weights{'' if cure.quality == SAME else '; ' + cure.quality}"
            )
            search.take(
                dataclasses.replace(
                    cure,
                    title=f"the same run in oomless{more}",
                    changes=("oomless", *applied),
                    quality=quality,
                    tool=None,
                )
            )
            return


def changed(run: FailedRun, sets: Mapping[str, Any]) -> FailedRun:
    """Return ``run`` with what a change ``sets``; ``None`` takes a setting away."""
    plain = {name: sets[name] for name in PLAIN if name in sets and name not in ("evaluates", "scores")}
    values = {k: v for k, v in {**run.values, **sets}.items() if v is not None and k not in PLAIN}
    return dataclasses.replace(run, values=values, **plain)


def _measured(run: FailedRun, evaluates: bool, target: Target | None = None) -> _Answer | None:
    """Return what ``run`` comes to on ``target``; ``None`` where its settings do not go together."""
    target = target or run.target
    assert target is not None
    try:
        free = _rehearsed(run, target, evaluates, limited=False)
        needed = free.needed_bytes
        fits = needed <= target.usable_bytes
        if not fits and free.device.profile().peak_allocated_bytes <= target.usable_bytes:
            # The allocator gives cached memory back before it fails; only a rehearsal at the limit knows if that is enough.
            limited = _rehearsed(run, target, evaluates, limited=True)
            fits = limited.out_of_memory is None
            needed = limited.needed_bytes if fits else needed
    except UserError:
        return None
    return _Answer(needed_bytes=needed, fits=fits, headroom_bytes=target.usable_bytes - needed)


def _rehearsed(run: FailedRun, target: Target, evaluates: bool, *, limited: bool) -> Outcome:
    if run.tool == "oomless":
        assert run.spec is not None
        return rehearse_own(run.spec, run.config(), target, limited=limited)[0]
    return rehearse_run(run, target, limited=limited, evaluates=evaluates)


def _cure(run: FailedRun, names: tuple[str, ...], sets: Mapping[str, Any], answer: _Answer, saved: int) -> Cure:
    changes = [CHANGES[name] for name in names]
    qualities = [change.quality for change in changes if change.quality != SAME]
    speeds = list(dict.fromkeys(c.speed for c in changes if c.speed not in ("none", SAME_SPEED)))
    after = changed(run, sets)
    own = run.tool == "oomless"
    return Cure(
        title=", ".join(change.title for change in changes),
        changes=names,
        settings={key: value for key, value in sets.items() if value is not None},
        config=after.config() if own else None,
        needed_bytes=answer.needed_bytes,
        saved_bytes=saved,
        fits=answer.fits,
        headroom_bytes=answer.headroom_bytes,
        quality="; ".join(qualities) or SAME,
        speed="; ".join(speeds) or SAME_SPEED,
        tool=None if own else change_in(run.tool or "torch", _named(run, names), _said(after)),
    )


def _named(run: FailedRun, names: tuple[str, ...]) -> list[str]:
    """Return the changes as tools have settings for them: of answers that the model generates, their own length."""
    return ["completion" if run.answers and name.endswith("_length") else name for name in names]


def _said(run: FailedRun) -> dict[str, Any]:
    """Return the numbers of ``run`` as they are said in a tool's words."""
    length = {"max_seq_length": run.answers} if run.answers else {}
    return {**run.values, **length, "half": run.half}


def _around_the_run(
    run: FailedRun, before: Outcome, clock: Clock, evaluates: bool, *, fragmented: bool, others_bytes: int
) -> Iterator[Cure]:
    """Yield what needs no change of the run: the GPU for itself, an allocator that does not fragment."""
    assert run.target is not None
    if others_bytes and clock.has_time():
        alone = dataclasses.replace(run.target, outside_bytes=max(0, run.target.outside_bytes - others_bytes))
        with clock.timing("cure: the GPU for itself"):
            outcome = rehearse_run(run, alone, limited=True, evaluates=evaluates)
        if outcome.stopped_at is None:
            yield Cure(
                title="the GPU for itself: end the other processes on it",
                changes=("alone",),
                settings={},
                config=None,
                needed_bytes=outcome.needed_bytes,
                saved_bytes=others_bytes,
                fits=True,
                headroom_bytes=alone.usable_bytes - outcome.needed_bytes,
                quality=SAME,
                speed=SAME_SPEED,
                tool="nvidia-smi shows them; a notebook that was not shut down is one",
            )
    if fragmented and clock.has_time():
        with clock.timing("cure: an allocator that does not fragment"):
            settings = AllocatorSettings(expandable_segments=True)
            outcome = rehearse_run(run, run.target, limited=True, evaluates=evaluates, settings=settings)
        saved = before.needed_bytes - outcome.needed_bytes
        if outcome.stopped_at is None and saved > 0:
            yield Cure(
                title="an allocator that does not fragment",
                changes=("expandable",),
                settings={},
                config=None,
                needed_bytes=outcome.needed_bytes,
                saved_bytes=saved,
                fits=True,
                headroom_bytes=run.target.usable_bytes - outcome.needed_bytes,
                quality=SAME,
                speed=SAME_SPEED,
                tool="PYTORCH_ALLOC_CONF=expandable_segments:True (before torch 2.9: PYTORCH_CUDA_ALLOC_CONF)",
            )


def _elsewhere(run: FailedRun, clock: Clock) -> Iterator[str]:
    """Yield the smallest GPU and the largest model of the family for which the leanest settings fit."""
    assert run.spec is not None
    base = (
        run.values if run.tool == "oomless" else {**run.values, **{name: getattr(run, name, False) for name in PLAIN}}
    )
    names, sets = apply_all(BUNDLES[-1][-1], base)
    how = ", ".join(CHANGES[name].title for name in names) or "the same settings"
    lean = changed(run, sets)
    needed = _measured(lean, False) if clock.has_time() else None
    if needed is None:
        return
    for gpu in sorted(catalogue.gpus(), key=lambda gpu: gpu.usable_bytes):
        target = target_for(gpu.name)
        if target.usable_bytes >= needed.needed_bytes and clock.has_time():
            answer = _measured(lean, False, target)
            if answer is not None and answer.fits:
                yield f"GPU: {gpu.name} is the smallest of the catalogue on which this fits with {how}"
                break
    family = catalogue.models_of(str(run.spec.config.model_type))
    try:
        parameters = catalogue.parameters(run.spec.name)
    except UserError:
        return

    def fits(name: str) -> _Answer | None:
        if not clock.has_time():
            return None
        answer = _measured(dataclasses.replace(lean, model=name, spec=resolve_for_plan(name)), False)
        return answer if answer is not None and answer.fits else None

    largest = first_with([name for name in family if catalogue.parameters(name) < parameters], fits)
    if largest is not None:
        yield f"model: {largest[0]} is the largest of its architecture that fits here with {how}"


def own_settings(config: TrainConfig) -> dict[str, Any]:
    """Return the settings of ``config`` that are not those of a config that says nothing."""
    plain = TrainConfig.from_mapping({"model": config.model, "data": "YOUR_TEXT", "output_dir": config.output_dir})
    usual, given = plain.to_dict(), config.to_dict()
    shown = {key: value for key, value in given.items() if usual.get(key) != value or key in ("model", "output_dir")}
    shown.setdefault("data", "YOUR_TEXT")
    if config.per_device_eval_batch_size == config.per_device_train_batch_size:
        shown.pop("per_device_eval_batch_size", None)
    if config.optimizer_in_backward:
        shown.pop("max_grad_norm", None)
    for key, value in {**LORA_DEFAULTS, **OPTIMIZER_DEFAULTS[config.optimizer]}.items():
        if shown.get(key) == value:
            del shown[key]
    order = ["model", "data", "output_dir"]
    return {key: shown[key] for key in order + sorted(shown.keys() - set(order))}
