"""Where tokens go in a mixture of experts: how evenly its routers spread them.

How many rows each expert of a layer has is known on the host, where they are shared out (``ops.grouped_linear``), so counting them
asks the device for nothing, and experts that are frozen, in few bits or on the host are counted alike. Layers whose forward is
run again for backward count twice, which changes no share.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from oomless.techniques.experts import expert_modules

_COUNTS = "routed"


@dataclass(frozen=True, kw_only=True, slots=True)
class Routes:
    """How the choices of routers fell on the experts."""

    busiest: float
    """The share of a layer's choices that its busiest expert got; the mean over layers."""

    even: float
    """What it would be if all experts got as many."""

    unused: int
    """Experts that got none, of all layers."""

    experts: int
    """All experts of all layers that got any."""

    @property
    def metrics(self) -> dict[str, float]:
        """Return what is logged of them."""
        return {"busiest_expert_share": round(self.busiest, 5), "unused_experts": self.unused}

    def __str__(self) -> str:
        return (
            f"the busiest expert of a layer gets {self.busiest:.1%} of its choices (evenly spread {self.even:.1%}), "
            f"{self.unused:,} of {self.experts:,} experts get none"
        )


def begin(module: Any) -> None:
    """Begin to count the choices of one layer's experts."""
    setattr(module, _COUNTS, np.zeros(module.num_experts, dtype=np.int64))


def count(module: Any, bounds: Sequence[int]) -> None:
    """Count the rows of each expert of ``module``, which ``bounds`` tell as in ``Groups``; those of an evaluation are left out."""
    if module.training:
        getattr(module, _COUNTS)[:] += np.diff(bounds)


def take(model: Any, sum_up: Callable[[np.ndarray], np.ndarray] = lambda counts: counts) -> Routes | None:
    """Return where the choices since the last call went, and forget them; ``None`` without any.

    ``sum_up`` adds what other processes counted to what was counted here.
    """
    modules = [module for _, module in expert_modules(model)]
    if not modules:
        return None
    own = [getattr(module, _COUNTS) for module in modules]
    ends = np.cumsum([len(counts) for counts in own])
    layers = [counts for counts in np.split(sum_up(np.concatenate(own)), ends[:-1]) if counts.any()]
    for module in modules:
        begin(module)
    if not layers:
        return None
    return Routes(
        busiest=float(np.mean([counts.max() / counts.sum() for counts in layers])),
        even=float(np.mean([1 / len(counts) for counts in layers])),
        unused=sum(int((counts == 0).sum()) for counts in layers),
        experts=sum(len(counts) for counts in layers),
    )
