"""Which evaluation was the best so far, and for how long none was better."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(slots=True)
class Best:
    """The lowest validation loss of a run, a mean over its sources."""

    step: int | None = None
    loss: float = math.inf
    worse: int = 0
    """Evaluations since then."""

    def judge(self, step: int, losses: Mapping[str, float]) -> bool:
        """Return whether ``losses`` by source, measured after ``step``, are better than all before."""
        loss = sum(losses.values()) / len(losses)
        if loss < self.loss:
            self.step, self.loss, self.worse = step, loss, 0
            return True
        self.worse += 1
        return False

    def state_dict(self) -> dict[str, Any]:
        """Return all of this, for a checkpoint."""
        return asdict(self)

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go to where ``state_dict`` was."""
        for name, value in state.items():
            setattr(self, name, value)
