"""What is done to one part after another, of which a rehearsal does one of each size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator
from contextlib import contextmanager

Repeating = Callable[[Hashable, Callable[[], None]], None]


def _each(key: Hashable, function: Callable[[], None]) -> None:
    function()


_way: list[Repeating] = [_each]


def repeating(key: Hashable, function: Callable[[], None]) -> None:
    """Call ``function``; a rehearsal, in which nothing has a value, may repeat what an earlier call with ``key`` asked for.

    All that ``function`` asks for must follow from ``key``, it leaves nothing allocated, and what it changes are numbers alone.
    """
    _way[-1](key, function)


@contextmanager
def repeating_by(way: Repeating) -> Iterator[None]:
    """Inside, ``repeating`` is ``way``, in whichever thread."""
    _way.append(way)
    try:
        yield
    finally:
        _way.pop()
