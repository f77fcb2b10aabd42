"""How much time rehearsals may take."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class Clock:
    """Time for rehearsals: another is begun where one as long as the last would end in time."""

    def __init__(self, seconds: float | None, say: Callable[[str], None]) -> None:
        """Have ``seconds`` from now on, or no end of time; ``say`` is told what is begun."""
        self.say = say
        self._ends = None if seconds is None else time.monotonic() + seconds
        self._longest = 0.0

    def has_time(self) -> bool:
        """Return whether there is time for another rehearsal."""
        return self._ends is None or time.monotonic() + self._longest <= self._ends

    @contextmanager
    def timing(self, what: str) -> Iterator[None]:
        """Say ``what`` is rehearsed inside, and learn how long it takes."""
        self.say(what)
        began = time.monotonic()
        try:
            yield
        finally:
            self._longest = max(0.7 * self._longest, time.monotonic() - began)
