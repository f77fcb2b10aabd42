"""The best training that fits: strategies in the order of their quality, each proved by rehearsal.

For each quality (``strategies.py``), best first:

1. *Exact lower bounds* reject what cannot fit: the weights as they are built, the optimizer's state as it is made, gradients where
   all of them exist together. No activation is counted, so nothing that fits is rejected.
2. *Trials* (``trial.py``) find for each placement and micro-batch the fastest rung that fits: what a rung needs falls from one to
   the next, so a few trials, several at a time, find the place where fitting begins.
3. The fastest by predicted speed is rehearsed whole, at the capacity less the margin: the pick.

Every better quality has then been proved not to fit, by its bound or by a rehearsal that ran out. Below the pick, what would give up
more is tried for the frontier, so that its gain in memory and speed can be weighed.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import product
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.memory.work import Work
from oomless.models.make import ties
from oomless.models.spec import ModelSpec
from oomless.planning.layout import OF_THE_TEXT, read_layout
from oomless.planning.plan import Plan, Target
from oomless.planning.strategies import (
    CHEAP,
    LEANER_RUNGS,
    OPTIMIZER_NAMES,
    Quality,
    Settings,
    any_run,
    micro_batches,
    parts_in_order,
    placements,
    qualities,
    rungs,
)
from oomless.planning.throughput import Throughput, relative_seconds, throughput
from oomless.planning.trial import Laboratory, Parts, Proof, Setting, Trial, host_bytes_of_state, state_bytes
from oomless.units import format_bytes

Progress = Callable[[str, float], None]
ALTERNATIVES = 3
"""So many strategies that give up more than the pick are shown beside it."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One strategy of the frontier."""

    quality: Quality
    settings: Settings
    """All that the planner chose."""

    fits: bool
    picked: bool = False
    needed_bytes: int
    """The most that is reserved; for one that does not fit, at least this."""

    speed: Throughput | None = None
    reason: str = ""
    """Why it does not fit."""

    host_bytes: int = 0
    """The host memory that it would need, where that is what it lacks."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "strategy": str(self.quality),
            "settings": self.settings,
            "fits": self.fits,
            "picked": self.picked,
            "needed_bytes": self.needed_bytes,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "reason": self.reason,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class Choice:
    """What a search found."""

    target: Target
    given: Settings
    """What the search was told to keep."""

    rows: tuple[Row, ...]
    """Best quality first: what was rejected, the pick, and what gives up more."""

    config: TrainConfig | None
    """The run as it was picked; ``None`` where nothing fits."""

    plan: Plan | None
    trials: int
    """Rehearsals that were made, not read from earlier searches."""

    @property
    def picked(self) -> Row | None:
        """The row of the pick."""
        return next((row for row in self.rows if row.picked), None)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "gpu": self.target.name,
            "usable_bytes": self.target.usable_bytes,
            "margin_bytes": self.target.margin_bytes,
            "host_bytes": self.target.host_bytes,
            "strategies": [row.to_dict() for row in self.rows],
            "plan": None if self.plan is None else self.plan.to_dict(),
            "config": None if self.config is None else self.config.to_dict(),
            "trials": self.trials,
        }


@dataclass(frozen=True, kw_only=True, slots=True)
class _Found:
    """A candidate that fits."""

    settings: Settings
    trial: Trial
    speed: Throughput | None
    seconds: float
    """What orders candidates: predicted seconds for a token, or something in proportion to it."""


def search(
    spec: ModelSpec,
    given: Settings,
    target: Target,
    *,
    held: Quality | None = None,
    processes: int | None = None,
    results: Path | None = None,
    alternatives: int = ALTERNATIVES,
    progress: Progress | None = None,
) -> Choice:
    """Return the best training of ``spec`` that agrees with ``given`` and fits ``target``.

    Args:
        spec: the model; its weights are not needed.
        given: the settings that the user gave, as ``config.read`` returns them; the rest is chosen.
        target: the GPU.
        held: look at nothing of another quality.
        processes: trials at a time; by default as many as there are cores, four at most.
        results: a folder that keeps trials for later searches.
        alternatives: how many strategies that give up more are tried as well.
        progress: is told what is being tried, and what share of the search is done, from 0 to 1.

    Raises:
        UserError: what was given does not fit together.
    """
    text = TrainConfig.from_mapping({name: value for name, value in given.items() if name in OF_THE_TEXT})
    setting = Setting(spec=spec, target=target, base=dict(given), layout=read_layout(text))
    laboratory = Laboratory(setting, processes or min(4, len(os.sched_getaffinity(0))), results)
    try:
        return _Search(setting, laboratory, progress or (lambda *_: None), held).run(alternatives)
    finally:
        laboratory.close()


@dataclass(frozen=True, kw_only=True, slots=True)
class _Failure:
    """Why a candidate does not fit."""

    needed_bytes: int
    """At least."""

    reason: str
    host_bytes: int = 0


class _Search:
    def __init__(
        self, setting: Setting, laboratory: Laboratory, progress: Progress, held: Quality | None = None
    ) -> None:
        self.setting, self.laboratory, self.progress, self.held = setting, laboratory, progress, held
        self.pins, self.target = setting.base, setting.target
        self.usable_bytes = self.target.usable_bytes - self.target.margin_bytes
        self.passes = micro_batches(self.pins, self.target.gpus)
        self.disproved: list[Settings] = []
        self.refused: str | None = None

    def run(self, alternatives: int) -> Choice:
        """Go through the qualities, best first, and on from the pick to some that give up more."""
        rows: list[Row] = []
        proof: Callable[[], Proof] | None = None
        shown: set[tuple[str, ...]] = set()
        left, order = alternatives, parts_in_order(self.pins, tied=is_tied(self.setting.spec))
        for place, parts in enumerate(order):
            trainable = parts["trainable"]
            if self.held is not None and not self.held.has(parts):
                continue
            if proof is not None and (not left or (trainable,) in shown):
                continue
            self.progress(f"building {trainable}", _share(place / len(order), left, alternatives, proof is not None))
            built = self.laboratory.parts(any_run(self.pins, parts))
            if built.refused is not None:
                self.refused = self.refused or built.refused
                continue
            kinds = qualities(self.pins, parts, sixteen_bit=built.sixteen_bit)
            for number, quality in enumerate(kinds):
                if self.held not in (None, quality):
                    continue
                if proof is not None and (not left or (trainable, quality.optimizer) in shown):
                    continue
                tried = (place + number / len(kinds)) / len(order)
                self.progress(str(quality), _share(tried, left, alternatives, proof is not None))
                row = self._best(quality, built, quick=proof is not None)
                if row.fits:
                    shown |= {(trainable,), (trainable, quality.optimizer)}
                    if proof is None:
                        proof = self.laboratory.proof(row.settings)
                        row = replace(row, picked=True)
                    else:
                        left -= 1
                if row.fits or proof is None:
                    rows.append(row)
                if row.fits and not row.picked and trainable != _picked(rows).quality.trainable:
                    break
        if not rows:
            raise ConfigError(self.refused or "no strategy agrees with what was given")
        if proof is None:
            return Choice(
                target=self.target,
                given=self.pins,
                rows=tuple(rows),
                config=None,
                plan=None,
                trials=self.laboratory.made,
            )
        return self._proved(rows, proof(), alternatives)

    def _proved(self, rows: list[Row], proof: Proof, alternatives: int) -> Choice:
        """Return the choice; or, where the whole run does not fit, though a step of it did, what is best without it."""
        picked = _picked(rows)
        if not proof.fits:
            self.disproved.append(picked.settings)
            return self.run(alternatives)
        whole = proof.as_plan(self.setting)
        return Choice(
            target=self.target,
            given=self.pins,
            rows=tuple(replace(row, needed_bytes=whole.needed_bytes) if row.picked else row for row in rows),
            config=self.setting.config(picked.settings),
            plan=whole,
            trials=self.laboratory.made,
        )

    def _best(self, quality: Quality, built: Parts, *, quick: bool) -> Row:
        """Return the fastest way to train with ``quality`` that fits, or why none does."""
        found: _Found | None = None
        failures: list[_Failure] = []
        ladder = rungs(self.pins, built.layers)
        usual = ladder[: max(1, len(ladder) - LEANER_RUNGS)]
        # Where any way will do, the leanest, which takes the longest to try, comes last.
        ladders = [usual[:1] + usual[1:][-1:], ladder[-1:]] if quick else [ladder]
        for part, placement in product(ladders, placements(quality, self.pins, experts=built.expert_bytes > 0)):
            bound = self._bound(quality, placement, built)
            if bound is not None:
                failures.append(bound)
                continue
            if found is not None and (quick or not self._could_be_faster(quality, placement, found)):
                continue
            candidate, failed = self._fastest(quality.settings() | placement, part, quick)
            failures += [failed] if failed is not None else []
            if candidate is not None and (found is None or candidate.seconds < found.seconds):
                found = candidate
        if found is not None:
            return Row(
                quality=quality,
                settings=found.settings,
                fits=True,
                speed=found.speed,
                needed_bytes=found.trial.needed_bytes,
            )
        hosts = [failure for failure in failures if failure.host_bytes]
        reason = "; ".join(dict.fromkeys(failure.reason for failure in [failures[0], *hosts[:1]]))
        lacking = min((failure.host_bytes for failure in hosts), default=0)
        return Row(
            quality=quality,
            settings={},
            fits=False,
            needed_bytes=failures[0].needed_bytes,
            reason=reason,
            host_bytes=lacking,
        )

    def _bound(self, quality: Quality, placement: Settings, built: Parts) -> _Failure | None:
        """Return why ``placement`` cannot fit whatever its activations are, or ``None``."""
        total, movable = state_bytes(built.trainable, quality.optimizer, quality.weight_precision)
        moved = movable if placement.get("offload_optimizer") else 0
        streamed = built.streamed_bytes if placement.get("stream_frozen") else 0
        streamed += built.expert_bytes if placement.get("experts_on_host") else 0
        used_up = placement.get("optimizer_in_backward") and any(
            size["gradient_accumulation_steps"] == 1 for size in self.passes
        )
        parts = {
            "weights": built.weight_bytes - streamed,
            f"{OPTIMIZER_NAMES.get(quality.optimizer, quality.optimizer)} state": total - moved,
            "gradients": 0 if used_up else built.trainable_bytes,
        }
        needed = sum(parts.values())
        if needed > self.usable_bytes:
            return _Failure(needed_bytes=needed, reason=f"needs at least {format_bytes(needed)}: {_listed(parts)}")
        if self.target.host_bytes is None or not moved + streamed:
            return None
        hosted = moved + streamed
        if moved and hosted <= self.target.host_bytes:
            hosted = streamed + host_bytes_of_state(built.trainable, quality.optimizer, quality.weight_precision)
        if hosted > self.target.host_bytes:
            reason = f"offloaded, {self._of_the_host(hosted)}"
            return _Failure(needed_bytes=needed, reason=reason, host_bytes=hosted)
        return None

    def _could_be_faster(self, quality: Quality, placement: Settings, found: _Found) -> bool:
        """Whether ``placement`` could be faster than ``found`` by computing less again."""
        if not set(found.settings) & {"gradient_checkpointing", "cheap_recompute", "mlp_tiles"}:
            return False
        sizes = self.passes[:1] + self.passes[1:][-1:]
        least = [quality.settings() | placement | size | rung for size, rung in product(sizes, ({}, CHEAP))]
        trials = zip(least, self.laboratory.trials(least, limited=False), strict=True)
        faster = [
            settings
            for settings, trial in trials
            if trial.work is not None and self._found({}, trial).seconds < found.seconds
        ]
        if any("cheap_recompute" in settings for settings in faster):
            return True  # and so may be others that compute more again
        return any(self._fits(trial) for trial in self.laboratory.trials(faster))

    def _fastest(
        self, settings: Settings, ladder: list[Settings], quick: bool
    ) -> tuple[_Found | None, _Failure | None]:
        """Return the fastest micro-batch and rung of ``settings`` that fit; larger micro-batches are tried while they pay."""
        best: _Found | None = None
        failure: _Failure | None = None
        for size in self.passes[:1] if quick else self.passes:
            candidate, failed = self._first_fitting(settings | size, ladder, quick)
            failure = failure or failed
            if candidate is None or (best is not None and candidate.seconds >= best.seconds):
                break
            best = candidate
        return best, failure

    def _first_fitting(
        self, settings: Settings, ladder: list[Settings], quick: bool
    ) -> tuple[_Found | None, _Failure | None]:
        """Return ``settings`` with the first rung of ``ladder`` that fits, and why the leanest that was tried does not."""
        failure: tuple[int, _Failure] | None = None
        trials: dict[int, Trial] = {}
        low, high = -1, len(ladder)
        while high - low > 1 and not (quick and high < len(ladder)):
            probes = [*range(len(ladder))] if quick else _probes(low, high, len(ladder), self.laboratory.processes)
            made = self.laboratory.trials([settings | ladder[index] for index in probes])
            refused = [
                index for index, trial in zip(probes, made, strict=True) if self._cannot_apply(trial, ladder[index])
            ]
            if refused:
                self.refused = self.refused or made[probes.index(refused[0])].refused
                ladder = [rung for index, rung in enumerate(ladder) if index not in refused]
                low, high = -1, len(ladder)
                continue
            for index, trial in zip(probes, made, strict=True):
                if trial.fits and not self._fits(trial):
                    return None, self._failure(trial)  # a lean rung asks no less of the host
                trials[index] = trial
                if self._fits(trial) and settings | ladder[index] not in self.disproved:
                    high = min(high, index)
                else:
                    low = max(low, index)
                    if failure is None or index >= failure[0]:
                        failure = (index, self._failure(trial))
        if not ladder:
            return None, _Failure(needed_bytes=0, reason=self.refused or "")
        if high == len(ladder):
            return None, failure[1] if failure else None
        found = self._found(settings | ladder[high], trials[high])
        if high == 0 and ladder[1:2] == [CHEAP] and not quick:
            # Of frozen norms its backward moves less than autograd's, so that it may be the faster one.
            cheap = settings | CHEAP
            (trial,) = self.laboratory.trials([cheap])
            if self._fits(trial) and cheap not in self.disproved:
                found = min(found, self._found(cheap, trial), key=lambda candidate: candidate.seconds)
        return found, None

    def _fits(self, trial: Trial) -> bool:
        host = self.target.host_bytes
        return trial.fits and (host is None or trial.host_bytes <= host)

    def _cannot_apply(self, trial: Trial, rung: Settings) -> bool:
        """Whether this rung is none for this model, or asks too much of the host for what it saves on the GPU."""
        return trial.refused is not None or (trial.fits and not self._fits(trial) and "offload_activations" in rung)

    def _of_the_host(self, needed_bytes: int) -> str:
        may = format_bytes(self.target.host_bytes or 0)
        return f"{format_bytes(needed_bytes)} of host memory, of which {may} may be used"

    def _failure(self, trial: Trial) -> _Failure:
        if trial.fits:
            reason = self._of_the_host(trial.host_bytes)
            return _Failure(needed_bytes=trial.needed_bytes, reason=reason, host_bytes=trial.host_bytes)
        stopped = trial.stopped_at
        if stopped is None:
            return _Failure(needed_bytes=trial.needed_bytes, reason=trial.refused or "")
        where = f"{stopped['phase']}" + (f" of {stopped['module']}" if stopped["module"] else "")
        more = trial.needed_bytes + stopped["size_bytes"]
        return _Failure(
            needed_bytes=more,
            reason=f"runs out in {where}, asking for {format_bytes(stopped['size_bytes'])} beside {_listed(trial.held_bytes)}",
        )

    def _found(self, settings: Settings, trial: Trial) -> _Found:
        config = self.setting.config(settings)
        assert trial.work is not None
        work = Work.from_dict(trial.work)
        return _Found(
            settings=settings,
            trial=trial,
            speed=throughput(work, self.target, config),
            seconds=relative_seconds(work, self.target, config),
        )


def _share(tried: float, left: int, alternatives: int, picked: bool) -> float:
    """Return how much of a search is done: the pick is the first half, what is shown beside it the second."""
    if not picked:
        return tried / 2
    return 1 - left / (2 * alternatives) if alternatives else 1.0


def _picked(rows: Sequence[Row]) -> Row:
    return next(row for row in rows if row.picked)


def is_tied(spec: ModelSpec) -> bool:
    """Return whether the model's ``embed_tokens`` and ``lm_head`` are one matrix."""
    return ties(spec.config)


def _listed(sizes: Mapping[str, int]) -> str:
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)


def _probes(low: int, high: int, count: int, at_once: int) -> list[int]:
    """Return which of the rungs between ``low``, which does not fit, and ``high``, which does or is the end, to try at once."""
    between = range(low + 1, high)
    if high == count:
        # Nothing fits so far: the fastest and what suffices most often, then the leanest.
        first = [between[0], max(between[0], count - 4)] if low < 0 else [count - 1, (low + count) // 2]
        return sorted({index for index in first[:at_once] if index in between} or {between[-1]})
    apart = (high - low) / (at_once + 1)
    return sorted({min(max(low + round(apart * number), low + 1), high - 1) for number in range(1, at_once + 1)})
