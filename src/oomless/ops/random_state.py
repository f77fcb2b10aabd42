"""Random numbers that are drawn again."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor


def random_states(x: Tensor) -> list[Tensor]:
    """Return the random state of the CPU and of the GPU that ``x`` lies on."""
    return [torch.get_rng_state(), *([torch.cuda.get_rng_state(x.device)] if x.is_cuda else [])]


@contextmanager
def random_states_set(states: list[Tensor], x: Tensor) -> Iterator[None]:
    """Inside, random numbers are those that followed ``states``; without states, any."""
    if not states:
        yield
        return
    before = random_states(x)
    _set(states, x)
    try:
        yield
    finally:
        _set(before, x)


def _set(states: list[Tensor], x: Tensor) -> None:
    torch.set_rng_state(states[0])
    if x.is_cuda:
        torch.cuda.set_rng_state(states[1], x.device)
