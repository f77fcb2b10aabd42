"""Optimizers whose state and temporaries are known; torch only."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from oomless.optim.adamw import AdamW
from oomless.optim.base import MemoryLeanOptimizer
from oomless.optim.sgd import SGD

OPTIMIZERS: dict[str, type[MemoryLeanOptimizer]] = {"adamw": AdamW, "sgd": SGD}


def build(name: str, groups: Iterable[dict[str, Any]], **settings: Any) -> MemoryLeanOptimizer:
    """Return the optimizer called ``name`` over ``groups``.

    Raises:
        KeyError: there is none of that name.
        TypeError: it has no such setting.
    """
    return OPTIMIZERS[name](groups, **settings)
