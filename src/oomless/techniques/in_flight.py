"""What techniques hold on the device from one call to the next, which must go when a step is cut short.

A streamed weight or a layer's input that is on its way belongs to no graph and no frame, so nothing else lets go of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any


def note(model: Any, let_go: Callable[[], None]) -> None:
    """Know that ``let_go`` drops what a technique of ``model`` has in flight."""
    vars(model).setdefault("in_flight", []).append(let_go)


def has_any(model: Any) -> bool:
    """Return whether a pass of ``model`` may find what the one before has in flight, so that it may ask for something else."""
    return bool(vars(model).get("in_flight"))


def drop(model: Any) -> None:
    """Drop all that is in flight in ``model``; the next step begins as the first did."""
    for let_go in vars(model).get("in_flight", ()):
        let_go()
