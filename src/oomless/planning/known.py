"""What the trials of a search tell about strategies that were not tried.

Forward and backward passes ask for the same and compute the same whatever the optimizer is and wherever its state lies; an update
is the same for every rung and micro-batch. So the work of a strategy is put together from two trials, and one whose passes alone
hold more than there is need not be tried. What also hangs on fragments is guessed, which decides what is tried first, never what fits.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from typing import Any

from oomless.memory.work import Work
from oomless.planning.strategies import REPLICATED
from oomless.planning.trial import Trial

Settings = Mapping[str, Any]
_Key = tuple[tuple[str, Any], ...]

_OF_OPTIMIZER = {"optimizer", "weight_precision", "offload_optimizer"}
_OF_PARTS = {"trainable", "tied_weights", "quantization", "sharding"}
_ON_HOST = {"embeddings_on_host", "experts_on_host", "stream_frozen", "offload_optimizer"}
_OF_PLACES = _ON_HOST - {"offload_optimizer"} | {"optimizer_in_backward"}
_SURE = 1 / 64
"""Blocks are not cut to the byte, so that the same tensors take a little more or less, by what was cached before."""


class Known:
    """What was learned; ``fixed_bytes`` is what a strategy has on the GPU beside its activations."""

    def __init__(self, usable_bytes: int, gpus: int = 1) -> None:
        self._usable_bytes, self._gpus = usable_bytes, gpus
        self._passes: dict[_Key, Work] = {}
        self._updates: dict[_Key, Work] = {}
        self._held: dict[_Key, int] = {}
        self._needed: dict[_Key, dict[str, int]] = {}

    def learn(self, settings: Settings, trial: Trial, fixed_bytes: int) -> None:
        """Remember what ``settings`` came to."""
        if trial.refused is not None:
            return
        if trial.work is not None:
            work = Work.from_dict(trial.work)
            self._passes.setdefault(_of_passes(settings), work)
            self._updates.setdefault(_of_update(settings), work)
        if trial.fits:
            self._held[_of_passes(settings)] = trial.passes_bytes - fixed_bytes
            self._needed.setdefault(_of_rung(settings), {})[_kind(settings)] = trial.needed_bytes - fixed_bytes

    def work(self, settings: Settings) -> Work | None:
        """Return the work of ``settings``, where it is known."""
        passes, update = self._passes.get(_of_passes(settings)), self._updates.get(_of_update(settings))
        if passes is None or update is None:
            return None
        return replace(
            passes,
            of_update=update.of_update,
            link_bytes_of_update=update.link_bytes_of_update,
            exchanged_bytes_of_update=update.exchanged_bytes_of_update,
        )

    def least_work(self, settings: Settings) -> Work | None:
        """Return the work of ``settings``, or what it is at least, where that is known: the same with nothing on the host or gathered."""
        return self.work(settings) or self.work(self._on_device(settings))

    def _on_device(self, settings: Settings) -> Settings:
        return {name: value for name, value in settings.items() if name not in _ON_HOST} | (
            REPLICATED if self._gpus > 1 else {}
        )

    def least_passes(self, settings: Settings) -> Work | None:
        """Return the work of ``settings`` without an update, or what it is at least, where that is known."""
        found = self.least_work(settings)
        passes = found or self._passes.get(_of_passes(settings))
        nothing: dict[str, Any] = dict.fromkeys(("link_bytes_of_update", "exchanged_bytes_of_update"), 0)
        return None if passes is None else replace(passes, of_update=(), **nothing)

    def first_possible(self, ladder: Sequence[Settings], fixed_bytes: int) -> int:
        """Return the first of ``ladder`` whose passes alone do not ask for too much; never more than the last."""
        too_much = (index for index in range(len(ladder) - 2, -1, -1) if self.asks_too_much(ladder[index], fixed_bytes))
        return next(too_much, -1) + 1

    def tells(self, settings: Settings) -> bool:
        """Whether it is known what the passes of ``settings`` hold."""
        return _of_passes(settings) in self._held

    def asks_too_much(self, settings: Settings, fixed_bytes: int) -> bool:
        """Whether the passes of ``settings`` alone surely do."""
        held = self.least_held(settings)
        return held is not None and (fixed_bytes + held) * (1 - _SURE) > self._usable_bytes

    def least_held(self, settings: Settings) -> int | None:
        """Return what the passes of ``settings`` hold beside what is fixed, at least, where that is known.

        With something on the host it is no less than without: what is fetched comes on top.
        """
        known = (self._held.get(_of_passes(one)) for one in (settings, self._on_device(settings)))
        return next((one for one in known if one is not None), None)

    def probes(self, ladder: Sequence[Settings], fixed_bytes: int, low: int, high: int, at_once: int) -> list[int]:
        """Return which of the rungs between ``low``, which does not fit, and ``high``, which does or is the end, to try now.

        Those are the last that is expected not to fit and the first that is, where something is expected of both; else so many
        as are tried ``at_once``, evenly apart.
        """
        between = range(low + 1, high)
        needs = self._needs(ladder)
        room = self._usable_bytes - fixed_bytes
        fitting = next((index for index in between if index in needs and needs[index] <= room), None)
        was_wrong = low in needs and needs[low] <= room
        if fitting is None or was_wrong:
            if needs and high == len(ladder):  # all that is known of is expected not to fit: neither are the fastest
                low = max(low, min(1, len(ladder) - 2))
            return _spread(low, high, len(ladder), at_once)
        return [index for index in (fitting - 1, fitting) if index in between]

    def _needs(self, ladder: Sequence[Settings]) -> dict[int, float]:
        """Return what is expected beyond what is fixed, from the first rung of which anything is known to the last."""
        known = {}
        for index, settings in enumerate(ladder):
            needed = self._needed.get(_of_rung(settings))
            if needed is not None:
                known[index] = needed.get(_kind(settings), max(needed.values()))
        needs: dict[int, float] = dict(known)
        places = list(known)
        for left, right in zip(places, places[1:], strict=False):
            # Between the first rung and the second lies the largest step: where two others are known, theirs goes on.
            first, last = (right, places[2]) if left == 0 and len(places) > 2 else (left, right)
            slope = (known[last] - known[first]) / (last - first)
            for index in range(left + 1, right):
                needs[index] = min(known[first] + slope * (index - first), known[left])
        return needs


def _of_passes(settings: Settings) -> _Key:
    return _key(settings, set() if settings.get("optimizer_in_backward") else _OF_OPTIMIZER)


def _of_update(settings: Settings) -> _Key:
    if settings.get("optimizer_in_backward"):
        return _key(settings)
    return _key(settings, set(settings) - _OF_PARTS - _OF_OPTIMIZER)


def _of_rung(settings: Settings) -> _Key:
    return _key(settings, _OF_PARTS | _OF_OPTIMIZER | _OF_PLACES)


def _key(settings: Settings, without: Iterable[str] = ()) -> _Key:
    return tuple(sorted((name, value) for name, value in settings.items() if name not in without))


def _kind(settings: Settings) -> str:
    return str(settings["trainable"]).split("+")[0]


def _spread(low: int, high: int, count: int, at_once: int) -> list[int]:
    """Return which of the rungs between ``low``, which does not fit, and ``high``, which does or is the end, to try at once."""
    between = range(low + 1, high)
    if high == count:
        # Nothing fits so far: the two fastest, then what suffices most often, then the leanest.
        usual = count - 4
        if low < 1:
            first = [*between[:2], usual]
        else:
            first = [usual, (low + usual) // 2] if low < usual else [count - 1, (low + count) // 2]
        return sorted({index for index in first[:at_once] if index in between} or {between[-1]})
    apart = (high - low) / (at_once + 1)
    return sorted({min(max(low + round(apart * number), low + 1), high - 1) for number in range(1, at_once + 1)})
