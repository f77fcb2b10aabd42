"""What would cure it: changes of the settings in the order of what they cost, each rehearsed on the GPU that ran out.

A cure is said to fit only where the rehearsal of the whole run with it fits, and is left out where it saves nothing. Each
is given as settings of oomless and, where the tool that failed has the same, as the change there.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from oomless import catalogue
from oomless.config import LORA_DEFAULTS, OPTIMIZER_DEFAULTS, TrainConfig
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
class Change:
    """One change of settings, and what it costs."""

    name: str
    title: str
    quality: str
    speed: str
    reduces_fixed: bool
    """Whether it makes weights, gradients or optimizer state smaller; what does not, cannot help where these exceed."""

    apply: Callable[[dict[str, Any]], dict[str, Any] | None]
    """Returns the changed settings, or ``None`` where it does not apply."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Cure:
    """A rehearsed change of the run."""

    title: str
    changes: tuple[str, ...]
    settings: Mapping[str, Any]
    """What it sets, under oomless' names."""

    config: TrainConfig | None
    """The whole run with it, in oomless; ``None`` where it changes the surroundings of the run alone."""

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
        }


def _smaller_batch(values: dict[str, Any]) -> dict[str, Any] | None:
    batch = values.get("per_device_train_batch_size", 1)
    evaluation = {"per_device_eval_batch_size": 1} if values.get("per_device_eval_batch_size", 1) > 1 else {}
    if batch <= 1:
        return evaluation or None
    accumulation = values.get("gradient_accumulation_steps", 1) * batch
    return {"per_device_train_batch_size": 1, "gradient_accumulation_steps": accumulation, **evaluation}


def _checkpointing(values: dict[str, Any]) -> dict[str, Any] | None:
    return None if values.get("gradient_checkpointing") else {"gradient_checkpointing": True}


def _in_backward(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("optimizer_in_backward") or "lora" in values.get("trainable", "full"):
        return None
    return {"optimizer_in_backward": True, "max_grad_norm": None}


def _correction(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("dtype") == "fp32" or values.get("weight_precision") not in (None, "master"):
        return None
    return None if values.get("trainable") == "lora" else {"weight_precision": "correction"}


def _half(values: dict[str, Any]) -> dict[str, Any] | None:
    return {"dtype": "auto"} if values.get("dtype") == "fp32" else None


def _optimizer(name: str) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    order = ("adamw", "adamw_8bit", "adafactor")

    def change(values: dict[str, Any]) -> dict[str, Any] | None:
        now = values.get("optimizer", "adamw")
        if now not in order or order.index(now) >= order.index(name):
            return None
        dropped = {key: None for key in OPTIMIZER_DEFAULTS[now] if key not in OPTIMIZER_DEFAULTS[name]}
        return {"optimizer": name, **dropped}

    return change


def _shorter(divisor: int) -> Callable[[dict[str, Any]], dict[str, Any] | None]:
    def change(values: dict[str, Any]) -> dict[str, Any] | None:
        length = values["max_seq_length"] // divisor
        return {"max_seq_length": length} if length >= 64 else None

    return change


def _lora(values: dict[str, Any]) -> dict[str, Any] | None:
    if "lora" in values.get("trainable", "full"):
        return None
    return {"trainable": "lora", "tied_weights": None, "weight_precision": None, "optimizer_in_backward": None}


def _quantized(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("quantization") or "full" in values.get("trainable", "full") or values.get("use_dora"):
        return None
    return {"quantization": "nf4"}


def _head_alone(values: dict[str, Any]) -> dict[str, Any] | None:
    if values.get("trainable", "full") == "lm_head":
        return None
    return {"trainable": "lm_head", **dict.fromkeys(LORA_DEFAULTS), "quantization": None}


SAME, SAME_SPEED = "none: the same numbers", "none, or faster"
CHANGES = {
    change.name: change
    for change in (
        Change(name="batch", title="one block at a time, accumulated", quality=SAME, reduces_fixed=False,
               speed="more, smaller passes", apply=_smaller_batch),
        Change(name="checkpointing", title="gradient checkpointing", quality=SAME, reduces_fixed=False,
               speed="each layer's forward is computed twice", apply=_checkpointing),
        Change(name="in_backward", title="updates inside the backward pass", reduces_fixed=True,
               quality="no clipping by the global norm", speed="none", apply=_in_backward),
        Change(name="half", title="16-bit weights", reduces_fixed=True,
               quality="16-bit arithmetic", speed="faster on tensor cores", apply=_half),
        Change(name="correction", title="8 bits of correction instead of fp32 copies", reduces_fixed=True,
               quality="weights exact to 2^-15 of themselves or better", speed="a slower update", apply=_correction),
        Change(name="adamw_8bit", title="AdamW with 8-bit state", reduces_fixed=True,
               quality="moments rounded to 8 bits in blocks", speed="a slower update", apply=_optimizer("adamw_8bit")),
        Change(name="adafactor", title="Adafactor", reduces_fixed=True,
               quality="another optimizer: second moments by rows and columns, no first", speed="a slower update",
               apply=_optimizer("adafactor")),
        Change(name="half_length", title="blocks of half the length", reduces_fixed=False,
               quality="no token sees further back than that", speed="about the same for each token", apply=_shorter(2)),
        Change(name="quarter_length", title="blocks of a quarter of the length", reduces_fixed=False,
               quality="no token sees further back than that", speed="about the same for each token", apply=_shorter(4)),
        Change(name="lora", title="LoRA instead of all weights", reduces_fixed=True,
               quality="learns less new knowledge than full training", speed="faster", apply=_lora),
        Change(name="nf4", title="frozen weights in 4 bits", reduces_fixed=True,
               quality="frozen weights are rounded to 4 bits", speed="weights are unpacked in each pass", apply=_quantized),
        Change(name="lm_head", title="lm_head alone", reduces_fixed=True,
               quality="the body learns nothing", speed="much faster", apply=_head_alone),
    )
}  # fmt: skip
_LEAN = ("batch", "checkpointing", "half", "correction")
BUNDLES: tuple[tuple[tuple[str, ...], ...], ...] = (
    (
        (),
        ("batch",),
        ("checkpointing",),
        ("batch", "checkpointing"),
        ("in_backward",),
        ("batch", "checkpointing", "in_backward"),
    ),
    (
        ("half",),
        ("half", "correction"),
        ("half", "adamw_8bit"),
        ("half", "correction", "adamw_8bit"),
        (*_LEAN, "adamw_8bit"),
        (*_LEAN, "adamw_8bit", "in_backward"),
    ),
    (
        ("half", "correction", "adafactor"),
        (*_LEAN, "adafactor", "in_backward"),
    ),
    (
        ("batch", "checkpointing", "half_length"),
        (*_LEAN, "adafactor", "in_backward", "half_length"),
        (*_LEAN, "adafactor", "in_backward", "quarter_length"),
    ),
)
"""Changes taken together, that leave what trains as it is: by what they cost, and in each group the leanest last."""

PARTS: dict[str, tuple[tuple[str, ...], ...]] = {
    "nf4": (("batch", "checkpointing", "nf4"), (*_LEAN, "nf4", "adamw_8bit")),
    "lora": (
        ("half", "lora"),
        ("batch", "checkpointing", "half", "lora"),
        ("batch", "checkpointing", "half", "lora", "nf4"),
        ("batch", "checkpointing", "half", "lora", "nf4", "half_length"),
    ),
    "lm_head": (
        ("half", "lm_head", "correction", "adamw_8bit"),
        ("half", "lm_head", "correction", "adafactor", "in_backward"),
        ("half", "lm_head", "correction", "adafactor", "in_backward", "quarter_length"),
    ),
}
"""The same for changes of what trains, or of what frozen weights are stored in."""


def apply_all(names: tuple[str, ...], values: Mapping[str, Any]) -> tuple[tuple[str, ...], dict[str, Any]]:
    """Return those changes of ``names`` that apply to ``values``, and what they set."""
    applied: list[str] = []
    changed, sets = dict(values), dict[str, Any]()
    for name in names:
        change = CHANGES[name].apply(changed)
        if change is not None:
            applied.append(name)
            sets |= change
            changed = {k: v for k, v in (changed | change).items() if v is not None}
    return tuple(applied), sets


@dataclass(frozen=True, kw_only=True, slots=True)
class _Answer:
    """What the rehearsal of a bundle came to."""

    needed_bytes: int
    fits: bool
    headroom_bytes: int
    parameters: int


class _Search:
    """Rehearses bundles, each different one once, and keeps what they came to."""

    def __init__(self, run: FailedRun, before: Outcome, say: Callable[[str], None]) -> None:
        self.run, self.before, self.say = run, before, say
        self.base = oomless_values(run)
        self.known: list[tuple[dict[str, Any], tuple[str, ...], _Answer | None]] = []
        self.cures: list[Cure] = []

    def plan(self, names: tuple[str, ...]) -> tuple[tuple[str, ...], dict[str, Any], _Answer | None]:
        """Return the changes of ``names`` that apply, what they set, and the plan with them, if there can be one."""
        applied, sets = apply_all(names, self.base)
        settings = {k: v for k, v in (self.base | sets).items() if v is not None}
        for known, _, answer in self.known:
            if known == settings:
                return applied, sets, answer
        self.say(f"cure: {', '.join(CHANGES[name].title for name in applied) or 'the same run in oomless'}")
        answer = _planned(self.run, sets)
        self.known.append((settings, applied, answer))
        return applied, sets, answer

    def add(self, names: tuple[str, ...], *, always: bool = False) -> None:
        """Take the bundle into the list, if it applies and saves something that no smaller bundle saves."""
        applied, sets, answer = self.plan(names)
        if answer is None or any(set(cure.changes) == set(applied or ("logits",)) for cure in self.cures):
            return
        if self.run.tool == "oomless" and not applied:
            return
        smaller = [c.needed_bytes for c in self.cures if set(c.changes) - {"logits"} < set(applied)]
        least = min([self.before.needed_bytes, *smaller])
        if answer.fits or always or answer.needed_bytes < least - LEAST_SAVING * self.before.needed_bytes:
            saved = self.before.needed_bytes - answer.needed_bytes
            self.cures.append(_cure(self.run, applied, sets, answer, saved))

    def found(self) -> int:
        """Return how many fit."""
        return sum(cure.fits for cure in self.cures)

    def groups(self, groups: tuple[tuple[tuple[str, ...], ...], ...], enough: int) -> None:
        """Go through ``groups`` until ``enough`` bundles fit; of a group whose leanest does not fit, take that alone."""
        for group in groups:
            if self.found() >= enough:
                return
            leanest = self.plan(group[-1])[2]
            if leanest is None or not leanest.fits:
                self.add(group[-1])
                continue
            for names in group:
                if self.found() < enough:
                    self.add(names)


def find_cures(
    run: FailedRun, before: Outcome, *, fragmented: bool, others_bytes: int, say: Callable[[str], None]
) -> Cures:
    """Return the cures of ``run``, which as it was needs what ``before`` says.

    Args:
        run: complete: model, GPU, length and dtype are known.
        before: of the run as it was, without a limit.
        fragmented: whether the message shows memory that is reserved but cannot be used.
        others_bytes: what other processes hold of the GPU.
        say: is told what is rehearsed.
    """
    assert run.target is not None
    search = _Search(run, before, say)
    search.cures += _around_the_run(run, before, fragmented=fragmented, others_bytes=others_bytes)
    search.add(())
    leanest = search.plan(BUNDLES[-1][-1])[2]
    if leanest is None or leanest.fits:
        search.groups(BUNDLES, ENOUGH)
    else:
        search.add(BUNDLES[-1][-1])
    for name, group in PARTS.items():
        if CHANGES[name].apply(search.base) is not None and search.found() < 2:
            search.groups((group,), ENOUGH)
    return Cures(
        usable_bytes=run.target.usable_bytes,
        before_bytes=before.needed_bytes,
        fixed_bytes=before.fixed_bytes,
        tried=tuple(search.cures),
        elsewhere=() if search.found() else tuple(_elsewhere(run)),
    )


def _planned(run: FailedRun, sets: Mapping[str, Any], target: Target | None = None) -> _Answer | None:
    """Return the plan of the run with ``sets``; ``None`` where the settings do not go together."""
    target = target or run.target
    assert run.spec is not None
    assert target is not None
    try:
        config = run.config(**{**oomless_values(run), **sets})
        free, found = rehearse_own(run.spec, config, target, limited=False)
        fits = free.needed_bytes <= target.usable_bytes
        if not fits and found.profile.peak_allocated_bytes <= target.usable_bytes:
            # The allocator gives cached memory back before it fails; only a rehearsal at the limit knows if that is enough.
            limited, at_limit = rehearse_own(run.spec, config, target, limited=True)
            fits = at_limit.out_of_memory is None
            free = limited if fits else free
    except UserError:
        return None
    return _Answer(
        needed_bytes=free.needed_bytes,
        fits=fits,
        headroom_bytes=target.usable_bytes - free.needed_bytes,
        parameters=found.parameters,
    )


def _cure(run: FailedRun, names: tuple[str, ...], sets: Mapping[str, Any], answer: _Answer, saved: int) -> Cure:
    changes = [CHANGES[name] for name in names]
    qualities = [change.quality for change in changes if change.quality != SAME]
    speeds = list(dict.fromkeys(change.speed for change in changes if change.speed != "none"))
    return Cure(
        title=", ".join(change.title for change in changes) or "the same run in oomless, which never holds all logits",
        changes=names or ("logits",),
        settings={key: value for key, value in sets.items() if value is not None},
        config=run.config(**{**oomless_values(run), **sets}),
        needed_bytes=answer.needed_bytes,
        saved_bytes=saved,
        fits=answer.fits,
        headroom_bytes=answer.headroom_bytes,
        quality="; ".join(qualities) or SAME,
        speed="; ".join(speeds) or SAME_SPEED,
        tool=change_in(run.tool, names or ("logits",), {**oomless_values(run), **sets}),
    )


def _around_the_run(run: FailedRun, before: Outcome, *, fragmented: bool, others_bytes: int) -> Iterator[Cure]:
    """Yield what needs no change of the run: the GPU for itself, an allocator that does not fragment."""
    assert run.target is not None
    if others_bytes:
        alone = dataclasses.replace(run.target, outside_bytes=max(0, run.target.outside_bytes - others_bytes))
        outcome = rehearse_run(run, alone, limited=True)
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
    if fragmented:
        outcome = rehearse_run(run, run.target, limited=True, settings=AllocatorSettings(expandable_segments=True))
        if outcome.stopped_at is None:
            yield Cure(
                title="an allocator that does not fragment",
                changes=("expandable",),
                settings={},
                config=None,
                needed_bytes=outcome.needed_bytes,
                saved_bytes=before.needed_bytes - outcome.needed_bytes,
                fits=True,
                headroom_bytes=run.target.usable_bytes - outcome.needed_bytes,
                quality=SAME,
                speed=SAME_SPEED,
                tool="PYTORCH_ALLOC_CONF=expandable_segments:True (before torch 2.9: PYTORCH_CUDA_ALLOC_CONF)",
            )


def _elsewhere(run: FailedRun) -> Iterator[str]:
    """Yield the smallest GPU and the largest model of the family for which the leanest settings fit."""
    assert run.spec is not None
    names, sets = apply_all(BUNDLES[-1][-1], oomless_values(run))
    how = ", ".join(CHANGES[name].title for name in names) or "the same settings"
    needed = _planned(run, sets)
    if needed is None:
        return
    for gpu in sorted(catalogue.gpus(), key=lambda gpu: gpu.usable_bytes):
        target = target_for(gpu.name)
        if target.usable_bytes >= needed.needed_bytes:
            answer = _planned(run, sets, target)
            if answer is not None and answer.fits:
                yield f"GPU: {gpu.name} is the smallest of the catalogue on which this fits with {how}"
                break
    family = catalogue.models_of(str(run.spec.config.model_type))

    def fits(name: str) -> _Answer | None:
        answer = _planned(dataclasses.replace(run, model=name, spec=resolve_for_plan(name)), sets)
        return answer if answer is not None and answer.fits else None

    largest = first_with([name for name in family if catalogue.parameters(name) < needed.parameters], fits)
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
