"""The best training that fits: strategies in the order of their quality, each proved by rehearsal.

For each quality (``strategies.py``), best first:

1. *Exact lower bounds* reject what cannot fit: the weights as they are built, the optimizer's state as it is made, gradients where
   all of them exist together. No activation is counted, so nothing that fits is rejected.
2. *Trials* (``trial.py``) find for each placement and micro-batch the fastest rung that fits: what a rung needs falls from one to
   the next, so a few trials, several at a time, find the place where fitting begins. What they tell of others (``known.py``) says
   where to look first, and what need not be tried.
3. The fastest by predicted speed is rehearsed whole, at the capacity less the margin: the pick.

Every better quality has then been proved not to fit, by its bound or by a rehearsal that ran out. For a wish (``wish.py``) what people
run is looked at first, and what gives up more than the first that fits is compared with it where it could be preferred.
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.memory.work import Work
from oomless.models.make import ties
from oomless.models.spec import ModelSpec
from oomless.planning.choice import Choice
from oomless.planning.known import Known
from oomless.planning.layout import of_the_text, read_layout, with_new_tokens
from oomless.planning.plan import Target
from oomless.planning.row import Heard, Row, unheard
from oomless.planning.strategies import (
    COMMON,
    COMPARED,
    FROZEN_BITS,
    QLORA,
    Quality,
    Settings,
    any_run,
    micro_batches,
    parts_in_order,
    qualities,
)
from oomless.planning.throughput import Throughput, relative_seconds, throughput
from oomless.planning.trial import Laboratory, Parts, Setting, Trial
from oomless.planning.ways import Failure, Way, Ways, listed, too_much
from oomless.planning.wish import Wish
from oomless.units import format_bytes

Progress = Callable[[str, float], None]
BUSY_PASS_TOKENS = 1 << 9
"""So many tokens keep a GPU busy: what a larger pass gains is less than what it costs to compute more again for it."""

WORTH_A_TRIAL = 0.01
"""What has less state is compared where it may be faster by so much."""


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
    wish: Wish | None = None,
    progress: Progress | None = None,
    heard: Heard | None = None,
) -> Choice:
    """Return the best training of ``spec`` that agrees with ``given`` and fits ``target``.

    Args:
        spec: the model; its weights are not needed.
        given: the settings that the user gave, as ``config.read`` returns them; the rest is chosen.
        target: the GPU.
        held: look at nothing of another quality.
        processes: trials at a time; by default as many as there are cores, four at most.
        results: a folder that keeps trials for later searches.
        wish: what is wanted of what fits, for which strategies that give up more are compared; by default the first that fits is taken.
        progress: is told what is being tried, and what share of the search is done, from 0 to 1.
        heard: is told the rows that were found so far, each time that there is one more.

    Raises:
        UserError: what was given does not fit together.
    """
    with with_new_tokens(spec, given) as (grown, settings):
        setting = Setting(spec=grown, target=target, base=settings, layout=read_layout(of_the_text(settings)))
        laboratory = Laboratory(setting, processes or min(4, len(os.sched_getaffinity(0))), results)
        try:
            return _Search(setting, laboratory, progress or unheard, held, wish).run(heard or unheard).as_given(given)
        finally:
            laboratory.close()


class _Search:
    def __init__(
        self,
        setting: Setting,
        laboratory: Laboratory,
        progress: Progress,
        held: Quality | None = None,
        wish: Wish | None = None,
    ) -> None:
        self.setting, self.laboratory, self.progress, self.held, self.wish = setting, laboratory, progress, held, wish
        self.pins, self.target = setting.base, setting.target
        self.usable_bytes = self.target.usable_bytes - self.target.margin_bytes
        self.passes = micro_batches(self.pins, self.target.gpus)
        self.busy = self.pins.get("max_seq_length", TrainConfig.max_seq_length) >= BUSY_PASS_TOKENS
        self.slower: set[tuple[str, str | None]] = set()
        """Parts that no memory would make better than what fits."""

        self.known = Known(self.usable_bytes, self.target.gpus)
        self.ways = Ways(setting, laboratory, self.passes)
        self.disproved: list[Settings] = []
        self.refused: str | None = None

    def run(self, heard: Heard) -> Choice:
        """Find rows, prove the one that is preferred, and return them."""
        found: dict[tuple[int, int], Row] = {}
        stopped = False
        try:
            for place, row in self._rows(found):
                found[place] = row
                heard([one for _, one in sorted(found.items())])
        except KeyboardInterrupt:
            if not any(row.fits for row in found.values()):
                raise
            stopped = True
            self.laboratory.drop()
        rows = [row for _, row in sorted(found.items())]
        if not rows:
            raise ConfigError(self.refused or "no strategy agrees with what was given")
        fitting = [row for row in rows if row.fits]
        best = {} if self.wish is None or not fitting else self.wish.choices(fitting)
        picked = best[self.wish.prefer] if self.wish is not None and best else next(iter(fitting), None)
        known: dict[str, Any] = {
            "model": self.setting.spec.name,
            "target": self.target,
            "given": self.pins,
            "wish": self.wish,
            "stopped": stopped,
        }
        if picked is None:
            return Choice(**known, rows=tuple(rows), config=None, plan=None, trials=self.laboratory.made)
        self.progress(f"proving {picked.quality}", 1.0)
        proof = self.laboratory.proof(picked.settings)()
        if not proof.fits:  # though a step of it did
            self.disproved.append(picked.settings)
            return self.run(heard)
        whole = proof.as_plan(self.setting)
        named = {id(row): tuple(name for name, one in best.items() if one is row) for row in fitting}
        rows = [replace(row, named=named.get(id(row), ()), picked=row is picked) for row in rows]
        return Choice(
            **known,
            rows=tuple(replace(row, needed_bytes=whole.needed_bytes) if row.picked else row for row in rows),
            config=self.setting.config(picked.settings),
            plan=whole,
            trials=self.laboratory.made,
        )

    def _rows(self, found: Mapping[tuple[int, int], Row]) -> Iterator[tuple[tuple[int, int], Row]]:
        """Yield each row with its place in the order of quality: up to the first that fits and, for a wish, what is compared with it.

        ``found`` has those that were yielded. What most people run comes first then, so that there soon is an answer.
        """
        order = parts_in_order(self.pins, tied=is_tied(self.setting.spec))
        common = [place for place, parts in enumerate(order) if (parts["trainable"], parts["quantization"]) == QLORA]
        if self.wish is not None and self.held is None:
            for place in common:
                yield from self._rows_of(place, order, found, first_alone=True, share=0.0)
        for place, parts in enumerate(order):
            fits = any(row.fits for (of_parts, _), row in found.items() if of_parts < place)
            if not fits or (self.wish is not None and self._compared(parts, found)):
                yield from self._rows_of(place, order, found, first_alone=fits)
            if self.wish is None and any(row.fits for row in found.values()):
                return

    def _compared(self, parts: Settings, found: Mapping[tuple[int, int], Row]) -> bool:
        """Whether ``parts``, which give up more than what fits already, may be better by some preference."""
        trainable, bits = parts["trainable"], parts["quantization"]
        if (trainable, bits) == QLORA:
            return True
        not_asked = "trainable" not in self.pins and trainable not in COMPARED
        if not_asked or (trainable, parts["tied_weights"]) in self.slower:
            return False
        # Fewer bits have to be unpacked, so that they are faster only where more of them have to spend time.
        return all(
            row.saves_by_time
            for row in found.values()
            if row.fits
            and (row.quality.trainable, row.quality.tied_weights) == (trainable, parts["tied_weights"])
            and FROZEN_BITS[row.quality.quantization] > FROZEN_BITS[bits]
        )

    def _rows_of(
        self,
        place: int,
        order: list[Settings],
        found: Mapping[tuple[int, int], Row],
        *,
        first_alone: bool,
        share: float | None = None,
    ) -> Iterator[tuple[tuple[int, int], Row]]:
        """Yield the rows of the parts at ``place``: up to the first that fits or, for a wish, on to what has less state and may be faster."""
        parts = order[place]
        if self.held is not None and not self.held.has(parts):
            return
        begun = place / len(order) if share is None else share
        self._say(f"building {parts['trainable']}", begun, found)
        built = self.laboratory.parts(any_run(self.pins, parts))
        if built.refused is not None:
            self.refused = self.refused or built.refused
            return
        kinds = qualities(self.pins, parts, sixteen_bit=built.sixteen_bit, gpus=self.target.gpus)
        leaner: Sequence[Quality] | None = None
        for number, quality in enumerate(kinds):
            if self.held not in (None, quality) or (leaner is not None and quality not in leaner):
                continue
            self._say(str(quality), begun + (number / len(kinds) / len(order) if share is None else 0.0), found)
            fitting, more = [row for row in found.values() if row.fits], leaner is not None
            if (more or number == 0) and not self._may_be_preferred(quality, built, fitting, leaner=more):
                if more:
                    continue
                self.slower.add((quality.trainable, quality.tied_weights))
                return  # what gives up more here is no faster
            row = self._best(quality, built)
            yield (place, number), row
            if row.fits and (first_alone or self.wish is None):
                return
            if row.fits and leaner is None and self.wish is not None:
                leaner = self.wish.leaner(quality, kinds[number + 1 :], built.state_bytes)

    def _may_be_preferred(self, quality: Quality, built: Parts, fitting: list[Row], *, leaner: bool) -> bool:
        """Whether ``quality`` would be the best beside ``fitting`` by some preference if all fitted that is not known not to."""
        always = self.held is not None or (not leaner and (quality.trainable, quality.quantization) in COMMON)
        if self.wish is None or not fitting or always:
            return True
        possible = [way for way in self.ways.of(quality, built) if way.bound is None]
        for way in possible:
            for known in (self.known.least_passes, self.known.least_work):  # the first rules most out without a trial
                seconds = self._soonest(way, built.rungs(self.pins), known) * (1 + WORTH_A_TRIAL * leaner)
                row = Row(quality=quality, settings=way.settings, fits=True, needed_bytes=0, seconds=seconds)
                if row not in self.wish.choices([*fitting, row]).values():
                    break
            else:
                return True
        return not possible and not leaner  # and why is worth a line

    def _say(self, text: str, share: float, found: Mapping[tuple[int, int], Row]) -> None:
        fitting = [row for row in found.values() if row.fits]
        if self.wish is not None and fitting:
            text += f"; so far {self.wish.choices(fitting)[self.wish.prefer].quality}"
        self.progress(text, share)

    def _best(self, quality: Quality, built: Parts) -> Row:
        """Return the fastest way to train with ``quality`` that fits, or why none does."""
        found: _Found | None = None
        failures: list[Failure] = []
        ladder = built.rungs(self.pins)
        for way in self.ways.of(quality, built):
            if way.bound is not None:
                failures.append(way.bound)
                continue
            if found is not None and not self._could_be_faster(way, ladder, found):
                continue
            candidate, failed = self._fastest(way, ladder)
            failures += [failed] if failed is not None else []
            if candidate is not None and (found is None or candidate.seconds < found.seconds):
                found = candidate
        if found is not None:
            return Row(
                quality=quality,
                settings=found.settings,
                fits=True,
                speed=found.speed,
                seconds=1 / found.speed.tokens_per_second if found.speed is not None else found.seconds,
                needed_bytes=found.trial.needed_bytes,
            )
        # The host's memory where that is all that lacks, else the least that is needed; last, what cannot be applied and so needs 0.
        nearest = min(failures, key=lambda one: (not one.host_bytes, one.host_bytes, one.needed_bytes or math.inf))
        return Row(
            quality=quality,
            settings={},
            fits=False,
            needed_bytes=nearest.needed_bytes,
            reason=nearest.reason,
            host_bytes=nearest.host_bytes,
        )

    def _could_be_faster(self, way: Way, ladder: list[Settings], found: _Found) -> bool:
        """Whether ``way``, with another placement than ``found``, could be faster by computing less again."""
        if not set(found.settings) & {"gradient_checkpointing", "cheap_recompute", "mlp_tiles"}:
            return False
        # The first rules most out without a trial.
        return all(
            self._soonest(way, ladder, known) < found.seconds for known in (self.known.least_work, self.known.work)
        )

    def _soonest(self, way: Way, ladder: list[Settings], known: Callable[[Settings], Work | None]) -> float:
        """Return the seconds for a token than which ``way`` cannot be faster, with the smallest micro-batch or with the largest.

        They are those of the first rung that is not known not to fit or, where its work is not ``known``, of the nearest before it.
        """
        soonest = math.inf
        for size in self.passes[:1] if self.busy else self.passes[:1] + self.passes[1:][-1:]:
            whole = [way.settings | size | rung for rung in ladder]
            first = self.known.first_possible(whole, way.fixed_bytes)
            works = ((settings, known(settings)) for settings in reversed(whole[: first + 1]))
            settings, work = next(((settings, work) for settings, work in works if work), (whole[first], None))
            if work is None:
                self._learn([settings], way)
                work = self.known.work(settings)
            if work is not None:
                of_pass, of_update = way.link_bytes
                work = replace(
                    work,
                    link_bytes_of_passes=max(work.link_bytes_of_passes, of_pass * work.passes),
                    link_bytes_of_update=max(work.link_bytes_of_update, of_update),
                )
                soonest = min(soonest, relative_seconds(work, self.target, self.setting.config(settings)))
        return soonest

    def _learn(self, candidates: Sequence[Settings], way: Way, *, limited: bool = False) -> list[Trial]:
        """Try ``candidates`` of ``way``; without an end of memory they tell all that their passes hold."""
        made = self.laboratory.trials(candidates, limited=limited)
        for settings, trial in zip(candidates, made, strict=True):
            self.known.learn(settings, trial, way.fixed_bytes)
        return made

    def _tried(self, candidates: Sequence[Settings], way: Way) -> list[Trial]:
        """Return what ``candidates`` came to at the end of memory; those that ask for too much without one do not fit."""
        self._learn([settings for settings in candidates if not self.known.tells(settings)], way)
        possible = [settings for settings in candidates if not self.known.asks_too_much(settings, way.fixed_bytes)]
        made = iter(self._learn(possible, way, limited=True))
        return [next(made) if settings in possible else self._too_large(settings, way) for settings in candidates]

    def _too_large(self, settings: Settings, way: Way) -> Trial:
        """Return what ``settings``, whose passes ask for too much, are known to come to."""
        return Trial(fits=False, needed_bytes=way.fixed_bytes + (self.known.least_held(settings) or 0))

    def _fastest(self, way: Way, ladder: list[Settings]) -> tuple[_Found | None, Failure | None]:
        """Return the fastest micro-batch and rung of ``way`` that fit; larger micro-batches are tried while they pay."""
        best: _Found | None = None
        failure: Failure | None = None
        first = 0
        for size in self.passes:
            if best is not None and not self._larger_may_pay(way.settings | size, ladder, first, best):
                break
            candidate, failed, first = self._first_fitting(way, size, ladder, first)
            failure = failure or failed
            if candidate is None or (best is not None and candidate.seconds >= best.seconds):
                break
            best = candidate
        return best, failure

    def _larger_may_pay(self, settings: Settings, ladder: list[Settings], first: int, best: _Found) -> bool:
        """Whether ``settings``, with a larger micro-batch, fit on the rung of the smaller, or are faster than ``best`` below it."""
        (trial,) = self.laboratory.trials([settings | ladder[first]])
        below = ladder[first + 1 : first + 2]
        if self._fits(trial) or self.busy or not below:
            return self._fits(trial)
        way = settings | below[0]
        (trial,) = self.laboratory.trials([way], limited=False)
        return trial.work is None or self._found(way, trial).seconds < best.seconds

    def _first_fitting(
        self, way: Way, size: Settings, ladder: list[Settings], first: int
    ) -> tuple[_Found | None, Failure | None, int]:
        """Return ``way`` with micro-batches of ``size`` and the first rung of ``ladder`` that fits, why the leanest that was tried
        does not, and the rung's number.

        No rung before ``first`` fits.
        """
        given, settings = ladder, way.settings | size
        failure: tuple[int, Failure] | None = None
        trials: dict[int, Trial] = {}
        possible = self.known.first_possible([settings | rung for rung in ladder], way.fixed_bytes)
        low, high = max(first, possible) - 1, len(ladder)
        while high - low > 1:
            whole = [settings | rung for rung in ladder]
            probes = [first]
            if not first or low >= first:
                probes = self.known.probes(whole, way.fixed_bytes, low, high, self.laboratory.processes)
            made = self._tried([whole[index] for index in probes], way)
            refused = [
                index for index, trial in zip(probes, made, strict=True) if self._cannot_apply(trial, ladder[index])
            ]
            if refused:
                self.refused = self.refused or made[probes.index(refused[0])].refused
                ladder = [rung for index, rung in enumerate(ladder) if index not in refused]
                low, high, first = -1, len(ladder), 0
                continue
            for index, trial in zip(probes, made, strict=True):
                if trial.fits and not self._fits(trial):
                    return None, self._failure(trial, way), first  # a lean rung asks no less of the host
                trials[index] = trial
                if self._fits(trial) and settings | ladder[index] not in self.disproved:
                    high = min(high, index)
                else:
                    low = max(low, index)
                    if failure is None or index >= failure[0]:
                        failure = (index, self._failure(trial, way))
        if not ladder:
            return None, Failure(needed_bytes=0, reason=self.refused or ""), first
        if high == len(ladder):
            return None, failure[1] if failure else None, first
        found = self._found(settings | ladder[high], trials[high])
        return found, None, given.index(ladder[high])

    def _fits(self, trial: Trial) -> bool:
        host = self.target.host_bytes
        return trial.fits and (host is None or trial.host_bytes <= host)

    def _cannot_apply(self, trial: Trial, rung: Settings) -> bool:
        """Whether this rung is none for this model, or asks too much of the host for what it saves on the GPU."""
        return trial.refused is not None or (trial.fits and not self._fits(trial) and "offload_activations" in rung)

    def _failure(self, trial: Trial, way: Way) -> Failure:
        if trial.fits:
            reason = self.ways.of_the_host(trial.host_bytes)
            return Failure(needed_bytes=trial.needed_bytes, reason=reason, host_bytes=trial.host_bytes)
        if (stopped := trial.stopped_at) is None:
            activations = format_bytes(trial.needed_bytes - way.fixed_bytes)
            reason = trial.refused or too_much(trial.needed_bytes, f"{way.fixed}, activations {activations}")
            return Failure(needed_bytes=trial.needed_bytes, reason=reason)
        where = f"{stopped['phase']}" + (f" of {stopped['module']}" if stopped["module"] else "")
        more = trial.needed_bytes + stopped["segment_bytes"]
        return Failure(
            needed_bytes=more,
            reason=f"runs out in {where}, asking for {format_bytes(stopped['size_bytes'])} beside {listed(trial.held_bytes)}",
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


def is_tied(spec: ModelSpec) -> bool:
    """Return whether the model's ``embed_tokens`` and ``lm_head`` are one matrix."""
    return ties(spec.config)
