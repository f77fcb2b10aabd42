"""Steps that should not count: a loss or gradient that is not finite, or far above what the run is used to.

What is used to is the median of the last hundred good steps, so that one outlier moves nothing. The limits come from
steps before, and are compared on the device before the update: a skipped step changes no weight and no optimizer state.
"""

from __future__ import annotations

import math
from collections import deque
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import nn

from oomless.config import BadLossPolicy
from oomless.techniques.sharding import local
from oomless.units import counted

MEDIAN_OF = 100
FEWEST = 20
"""No step is too large before so many were good: the loss of a run's first steps falls fast."""

MOST_IN_A_ROW = 5
"""So many bad steps without a good one between them end the run whatever is configured."""


def what_to_do(model: nn.Module, *, updated: bool) -> str:
    """Return what cures a bad loss of ``model``, of which a step of this run has ``updated`` the weights, or none has yet."""
    # A sum makes no tensor as large as the weight, and is finite where all of it is.
    sums = {
        name: local(p.detach()).sum(dtype=torch.float64)
        for name, p in model.named_parameters()
        if p.is_floating_point()
    }
    spoilt = [name for name, total in sums.items() if not math.isfinite(float(total))]
    if spoilt:
        others = f" and {counted(len(spoilt) - 1, 'other weight')} hold" if len(spoilt) > 1 else " holds"
        came = "" if updated else ", and no step has changed a weight yet: the model came with them"
        return (
            f"{spoilt[0]}{others} values that are not finite{came}. Take another copy of the model, or set on_bad_loss to skip or "
            "rewind, which pass over the steps that meet such values."
        )
    if not updated:
        return "No weight has changed yet, so learning_rate is not the cause: try another dtype, or look at the text."
    return (
        "Lower learning_rate, or set on_bad_loss to skip or rewind, and go on with --resume from the last checkpoint."
    )


class BadLoss:
    """Judges the steps of a run."""

    def __init__(self, policy: BadLossPolicy, factor: float | None, *, dynamic_scale: bool) -> None:
        """Judge by ``factor`` times the median, if given; with a ``dynamic_scale`` an infinite gradient is no bad step."""
        self.policy, self.factor, self.dynamic_scale = policy, factor, dynamic_scale
        self.losses: deque[float] = deque(maxlen=MEDIAN_OF)
        self.norms: deque[float] = deque(maxlen=MEDIAN_OF)
        self.in_a_row = 0
        self._last_bad = -1

    @property
    def reads_every_step(self) -> bool:
        """Whether the host has to know each step's loss before the next one."""
        return self.policy != "stop" or self.factor is not None

    def limits(self) -> tuple[float, float]:
        """Return what loss and gradient norm of the next step must stay below."""
        if self.factor is None or len(self.losses) < FEWEST:
            return math.inf, math.inf
        loss, norm = (float(np.float32(self.factor * median(values))) for values in (self.losses, self.norms))
        return loss, norm  # rounded as the device compares, so that both judge alike

    def judge(self, step: int, loss: float, norm: float) -> str | None:
        """Return what is bad about ``step``, or remember it as good and return ``None``."""
        limits = self.limits()
        if not math.isfinite(loss):
            reason = f"its loss is {loss}"
        elif not math.isfinite(norm):
            if self.dynamic_scale:
                return None
            reason = f"its gradient norm is {norm}"
        elif loss >= limits[0]:
            reason = f"its loss, {loss:.4g}, is {self.factor:g} times the running median or more"
        elif norm >= limits[1]:
            reason = f"its gradient norm, {norm:.4g}, is {self.factor:g} times the running median or more"
        else:
            self.losses.append(loss)
            self.norms.append(norm)
            if step >= self._last_bad:
                self.in_a_row = 0
            return None
        self.in_a_row += 1
        self._last_bad = max(step, self._last_bad)
        return reason

    def state_dict(self) -> dict[str, Any]:
        """Return what a checkpoint keeps, so that a resumed run judges as this one would have."""
        return {"losses": list(self.losses), "norms": list(self.norms)} if self.factor is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from ``state``, which is empty where the run judged by no factor then."""
        for values, saved in ((self.losses, "losses"), (self.norms, "norms")):
            values.clear()
            values.extend(state.get(saved, ()))
