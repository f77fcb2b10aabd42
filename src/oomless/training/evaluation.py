"""How well the model predicts text that it does not learn from."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from oomless.data.loader import MicroBatch
from oomless.training.interruption import Abandoned
from oomless.training.life import Life
from oomless.training.run_files import BITS_PER_BYTE, EVALUATED, SAMPLES
from oomless.training.samples import write_samples


def evaluate(life: Life) -> dict[str, float]:
    """Return the mean cross-entropy by source, which is recorded; empty where the run is asked to end meanwhile."""

    def own_batches(batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Return this process's share of ``batches``, to be cut short where the run is asked to end."""
        return life.ranks.share_batches(life.interrupted.until_set(batches))

    def mean_loss(total: Tensor, tokens: int) -> float:
        both = life.ranks.sum(torch.stack([total, torch.full_like(total, tokens)]))
        return float(life.device.number(both[0]) / life.device.number(both[1], 1.0))

    losses = {}
    try:
        for name, blocks in life.data.evaluation.items():
            with life.ranks.reading():
                blocks.check_unchanged()
            found = life.guard.evaluate(blocks, life.config.per_device_eval_batch_size or 1, own_batches)
            losses[name] = life.guard.retried(mean_loss, *found)
        samples = write_samples(life)
    except Abandoned:
        return {}
    if losses:
        sizes = life.data.bytes_per_token
        bits = {f"{BITS_PER_BYTE}{name}": losses[name] / math.log(2) / size for name, size in sizes.items()}
        by_token = {f"{EVALUATED}{name}": loss for name, loss in losses.items()}
        life.keeper.record({"step": life.step, **by_token, **bits})
        life.listener.evaluated(life.step, losses)
        life.evaluated = life.step, losses
    if samples:
        life.keeper.record({"step": life.step, SAMPLES: samples})
        life.listener.sampled(life.step, samples)
    return losses
