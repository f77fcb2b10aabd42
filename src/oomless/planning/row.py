"""One strategy, as a search found it: the fastest arrangement of a quality that fits, or why none does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from oomless.planning.strategies import Prefer, Quality, Settings
from oomless.planning.throughput import Throughput

Heard = Callable[[Sequence["Row"]], None]
"""Is told of rows."""


def unheard(*_: object) -> None:
    """Hear nothing."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Row:
    """One strategy of the frontier."""

    quality: Quality
    settings: Settings
    """All that the planner chose."""

    fits: bool
    picked: bool = False
    named: tuple[Prefer, ...] = ()
    """The preferences by which it is the best."""

    needed_bytes: int
    """The most that is reserved; for one that does not fit, at least this."""

    speed: Throughput | None = None
    seconds: float = 0.0
    """For a token, expected; where the GPU's rates are not known, only in proportion to those of other rows."""

    reason: str = ""
    """Why it does not fit: what is nearest to it."""

    host_bytes: int = 0
    """The host memory that it would need, where that is what it lacks."""

    @property
    def saves_by_time(self) -> bool:
        """Whether it spends time to save memory; else the same parts are no faster with fewer bits of what is frozen."""
        return bool(set(self.settings) & _SLOWER)

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "strategy": str(self.quality),
            "settings": self.settings,
            "fits": self.fits,
            "picked": self.picked,
            "named": list(self.named),
            "needed_bytes": self.needed_bytes,
            "speed": None if self.speed is None else self.speed.to_dict(),
            "reason": self.reason,
        }


_SLOWER = {
    *("cheap_recompute", "gradient_checkpointing", "mlp_tiles", "loss_chunk_bytes", "offload_activations"),
    *("offload_optimizer", "stream_frozen", "experts_on_host", "embeddings_on_host"),
}
