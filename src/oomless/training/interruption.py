"""Signals that ask a run to end, and what still fits before the answer is a SIGKILL.

Schedulers that take a machine away send SIGTERM, wait, and kill; a terminal that goes away sends SIGHUP, which ``nohup`` has
ignored. The run then finishes the step that it is in, writes a
checkpoint and ends. Where the grace period is known and the step might not fit in it beside the save, the step is abandoned
instead: between two micro-batches, when no weight has been touched.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TypeVar

Item = TypeVar("Item")


class Abandoned(Exception):
    """What was in progress is dropped, because the run was asked to end."""


class Interruption:
    """Whether the run was asked to end, and whether a step may go on."""

    def __init__(self, grace_s: float | None = None, agree: Callable[[bool], bool] = bool) -> None:
        """Know that SIGKILL comes ``grace_s`` after SIGTERM; ``None``: not before the step is finished and saved.

        ``agree`` says whether any of the run's processes was asked to end, where there are several.
        """
        self.grace_s = grace_s
        self._agree = agree
        self.longest_step_s: float | None = None
        self.save_s: float | None = None
        self._asked = threading.Event()
        self._terminated_at: float | None = None
        self._step_began = 0.0

    def is_set(self) -> bool:
        """Return whether the run was asked to end."""
        return self._asked.is_set()

    def agreed(self) -> bool:
        """Return whether any process of the run was asked to end; from then on all were. All of them call this together."""
        if self._agree(self.is_set()):
            self._asked.set()
        return self.is_set()

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Let Ctrl-C, SIGTERM and SIGHUP set this; a second Ctrl-C ends the run at once, a second of the others changes nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        presses = 0

        def handle(number: int, frame: FrameType | None) -> None:
            nonlocal presses
            presses += number == signal.SIGINT
            if presses > 1:
                raise KeyboardInterrupt
            if number == signal.SIGTERM and self._terminated_at is None:
                self._terminated_at = time.monotonic()
            self._asked.set()

        heard = [signal.SIGINT, signal.SIGTERM]
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            heard.append(signal.SIGHUP)
        previous = {number: signal.signal(number, handle) for number in heard}
        try:
            yield
        finally:
            for number, handler in previous.items():
                signal.signal(number, handler)

    @contextmanager
    def timing_step(self) -> Iterator[None]:
        """Measure the step inside."""
        self._step_began = time.monotonic()
        yield
        self.longest_step_s = max(self.longest_step_s or 0.0, time.monotonic() - self._step_began)

    @contextmanager
    def timing_save(self) -> Iterator[None]:
        """Measure the save inside."""
        began = time.monotonic()
        yield
        self.save_s = time.monotonic() - began

    def check_step(self) -> None:
        """Let the step go on to its next micro-batch, or not; all of the run's processes call this together.

        Raises:
            Abandoned: its rest and the save might outlast the grace period, or are not known because none was measured.
        """
        if self.grace_s is not None and self._agree(self._lasts_too_long(self.grace_s)):
            self._asked.set()
            raise Abandoned

    def _lasts_too_long(self, grace_s: float) -> bool:
        if self._terminated_at is None:
            return False
        if self.longest_step_s is None or self.save_s is None:
            return True
        now = time.monotonic()
        left_s = self._terminated_at + grace_s - now
        return max(0.0, self._step_began + self.longest_step_s - now) + self.save_s > left_s

    def until_set(self, items: Iterable[Item]) -> Iterator[Item]:
        """Yield ``items``.

        Raises:
            Abandoned: the run was asked to end, and there is another item.
        """
        for item in items:
            if self.agreed():
                raise Abandoned
            yield item
