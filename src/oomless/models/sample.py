"""Whether a model is the one that a checkpoint began with: told by some numbers of its embedding, which every form stores in many bits.

A copy in another dtype, in other shards or of 4-bit layers is the same model, and one that was trained on a little counts as it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

NAME = "_oomless_sample"
"""Where a model keeps the sample of the weights that it was loaded from."""

_COUNT = 256
_LEAST = 0.9
"""The correlation with another model's is a few hundredths; with the same in fewer bits, or trained on, 0.99 and more."""


def of(embedding: Tensor) -> list[float]:
    """Return some numbers of ``embedding``, from everywhere in it."""
    numbers = embedding.detach().reshape(-1)
    odd = max(1, len(numbers) // _COUNT) | 1  # not always of the same column
    return [float(f"{numbers[place * odd % len(numbers)].item():.4g}") for place in range(_COUNT)]


def same(one: Sequence[float], other: Sequence[float]) -> bool:
    """Return whether two samples are of one model."""
    pair = torch.tensor([one, other], dtype=torch.float64)
    if pair[0].equal(pair[1]):
        return True
    first, second = pair - pair.mean(1, keepdim=True)
    return float(first @ second) > _LEAST * float(first.norm() * second.norm())
