"""The learning rate over a run."""

from __future__ import annotations

import math

from oomless.config import Scheduler

WSD_DECAY_SHARE = 0.2


def learning_rate_factor(kind: Scheduler, step: int, total_steps: int, warmup_ratio: float) -> float:
    """Return what the peak learning rate is multiplied by in ``step`` (counted from 0) of ``total_steps``.

    Warm-up rises linearly and never starts at 0, so that no step is wasted. After it ``linear`` and ``cosine`` fall to
    0, ``constant`` stays, and ``wsd`` (warm up, stay, decay) stays and falls linearly in the last fifth.
    """
    warmup_steps = math.ceil(total_steps * warmup_ratio)
    if step < warmup_steps:
        return (step + 1) / warmup_steps
    progress = (step - warmup_steps) / max(1, total_steps - warmup_steps)
    if kind == "linear":
        return 1 - progress
    if kind == "cosine":
        return 0.5 * (1 + math.cos(math.pi * progress))
    if kind == "wsd":
        return min(1.0, (1 - progress) / WSD_DECAY_SHARE)
    return 1.0
