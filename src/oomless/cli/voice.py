"""How a command speaks: answers on standard output, what is said on the way to them beside it."""

from __future__ import annotations

import os
from collections.abc import Iterable
from functools import cache

from oomless.report.screen import Screen


def speaks() -> bool:
    """Whether this is the one of a run's processes that writes to the terminal."""
    return os.environ.get("RANK", "0") == "0"


@cache
def out() -> Screen:
    """Return the screen of answers."""
    return Screen(quiet=not speaks())


@cache
def aside() -> Screen:
    """Return the screen of progress and errors."""
    return Screen(stderr=True)


def say_notes(notes: Iterable[str]) -> None:
    """Say, beside the answers, what a model's name was taken for and how its weights are stored: ``ModelSpec.notes_with``, ``notes_read``."""
    for note in notes:
        aside().print(note, style="dim")
