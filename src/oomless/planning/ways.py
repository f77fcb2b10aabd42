"""Where gradients, state and frozen weights of a quality may lie, and what each way asks of GPU and host whatever its activations are."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass

from oomless.planning.strategies import OPTIMIZER_NAMES, REPLICATED, Quality, Settings, any_run, placements
from oomless.planning.trial import Laboratory, Parts, Setting, host_bytes_of_state, state_bytes
from oomless.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class Failure:
    """Why a candidate does not fit."""

    needed_bytes: int
    """At least."""

    reason: str
    host_bytes: int = 0


@dataclass(frozen=True, kw_only=True, slots=True)
class Way:
    """A quality and where its gradients, state and frozen weights lie."""

    settings: Settings
    fixed_bytes: int
    """What is on the GPU whatever its activations are, where all of it exists together."""

    fixed: str
    """The same in words."""

    bound: Failure | None
    """Why it cannot fit whatever they are."""

    link_bytes: tuple[int, int]
    """What goes over the host's link at least: in each pass, and in the update."""


class Ways:
    """The ways of one search, whose steps are cut into ``passes`` (``strategies.micro_batches``)."""

    def __init__(self, setting: Setting, laboratory: Laboratory, passes: list[Settings]) -> None:
        self._setting, self._laboratory, self._passes = setting, laboratory, passes

    def of(self, quality: Quality, built: Parts) -> Iterator[Way]:
        """Yield those of ``quality``, of whose parts ``built`` tells, the least on the GPU last."""
        pins, gpus = self._setting.base, self._setting.target.gpus
        _, movable = state_bytes(built.trainable, quality.optimizer, quality.weight_precision)
        for placement in placements(quality, pins, movable=built.movable, gpus=gpus):
            if placement.get("offload_optimizer") and not movable and "offload_optimizer" not in pins:
                continue  # it would move nothing
            way = self._way(quality, placement, built)
            if "sharding" in placement and way.bound is None:  # what is too large in parts is too large whole
                way = self._way(quality, placement, self._whole(quality))
            yield way

    def of_the_host(self, needed_bytes: int) -> str:
        """Return that so much of the host's memory is needed, in words."""
        may = format_bytes(self._setting.target.host_bytes or 0)
        return f"{format_bytes(needed_bytes)} of host memory, of which {may} may be used"

    def _whole(self, quality: Quality) -> Parts:
        """Return what the parts of ``quality`` put on a GPU that holds the whole model."""
        parts = {name: getattr(quality, name) for name in ("trainable", "tied_weights", "quantization")}
        return self._laboratory.parts(any_run(self._setting.base, parts) | REPLICATED)

    def _way(self, quality: Quality, placement: Settings, built: Parts) -> Way:
        target = self._setting.target
        total, movable = state_bytes(built.trainable, quality.optimizer, quality.weight_precision)
        moved = movable if placement.get("offload_optimizer") else 0
        streamed = sum(size_bytes for name, size_bytes in built.movable.items() if placement.get(name))
        used_up = placement.get("optimizer_in_backward") and any(
            size["gradient_accumulation_steps"] == 1 for size in self._passes
        )
        parts = {
            "weights": built.weight_bytes - streamed,
            f"{OPTIMIZER_NAMES.get(quality.optimizer, quality.optimizer)} state": total - moved,
            "gradients": 0 if used_up else built.trainable_bytes,
        }
        needed, fixed, bound = sum(parts.values()), listed(parts), None
        hosted = moved + streamed
        if needed > target.usable_bytes - target.margin_bytes:
            bound = Failure(needed_bytes=needed, reason=too_much(needed, fixed))
        elif target.host_bytes is not None and hosted:
            if moved and hosted <= target.host_bytes:
                hosted = streamed + host_bytes_of_state(built.trainable, quality.optimizer, quality.weight_precision)
            if hosted > target.host_bytes:
                reason = f"offloaded, {self.of_the_host(hosted)}"
                bound = Failure(needed_bytes=needed, reason=reason, host_bytes=hosted)
        link = (built.movable.get("stream_frozen", 0) if placement.get("stream_frozen") else 0, 2 * moved)
        return Way(
            settings=quality.settings() | placement,
            fixed_bytes=needed,
            fixed=fixed,
            bound=bound,
            link_bytes=link,
        )


def too_much(needed_bytes: int, parts: str) -> str:
    """Return that so much is needed at least, of which ``parts`` are known, in words."""
    return f"needs at least {format_bytes(needed_bytes)}: {parts}"


def listed(sizes: Mapping[str, int]) -> str:
    """Return names with their bytes, those of none left out."""
    return ", ".join(f"{name} {format_bytes(size)}" for name, size in sizes.items() if size)
