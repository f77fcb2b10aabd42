"""What is done to one part after another, of which a rehearsal does one of each size."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import contextmanager
from functools import partial

Repeating = Callable[[Hashable, Callable[[], None]], None]


def _each(key: Hashable, function: Callable[[], None]) -> None:
    function()


_way: list[Repeating] = [_each]


def repeating(key: Hashable, function: Callable[[], None]) -> None:
    """Call ``function``; a rehearsal, in which nothing has a value, may repeat what an earlier call with ``key`` asked for.

    All that ``function`` asks for must follow from ``key``, it leaves nothing allocated, and what it changes are numbers alone.
    """
    _way[-1](key, function)


def for_each(parts: Iterable[slice], function: Callable[[slice], None], facts: Hashable) -> None:
    """Call ``function`` with each of ``parts``; what it asks for follows from ``facts`` and from a part's size."""
    for part in parts:
        repeating((function.__module__, function.__qualname__, part.stop - part.start, facts), partial(function, part))


def slices(length: int, size: int) -> list[slice]:
    """Return ``length`` places in parts of ``size``, or of one where that is less; the last may be smaller."""
    size = max(1, size)
    return [slice(start, min(start + size, length)) for start in range(0, length, size)]


@contextmanager
def repeating_by(way: Repeating) -> Iterator[None]:
    """Inside, ``repeating`` is ``way``, in whichever thread."""
    _way.append(way)
    try:
        yield
    finally:
        _way.pop()
