"""What techniques hold on the device from one call to the next, which must go when a step is cut short.

A streamed weight or a layer's input that is on its way belongs to no graph and no frame, so nothing else lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import Tensor


def note(model: Any, let_go: Callable[[], None], coming: Callable[[], Tensor | None] = lambda: None) -> None:
    """Know that ``let_go`` drops what a technique of ``model`` has in flight, and that ``coming`` is what the next layer finds of it."""
    vars(model).setdefault("in_flight", []).append(let_go)
    vars(model).setdefault("coming", []).append(coming)


def has_any(model: Any) -> bool:
    """Return whether a pass of ``model`` may find what the one before has in flight, so that it may ask for something else."""
    return bool(vars(model).get("in_flight"))


def coming(model: Any) -> list[Tensor]:
    """Return what is on its way to ``model``, or there, that no product has used yet."""
    return [tensor for find in vars(model).get("coming", ()) if (tensor := find()) is not None]


def drop(model: Any) -> None:
    """Drop all that is in flight in ``model``; the next step begins as the first did."""
    for let_go in vars(model).get("in_flight", ()):
        let_go()
