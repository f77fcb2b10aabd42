"""How a command speaks: answers on standard output, what is said on the way to them beside it."""

from __future__ import annotations

import os
from functools import cache
from typing import TYPE_CHECKING

from oomless.report.screen import Screen

if TYPE_CHECKING:
    from oomless.models.spec import ModelSpec


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


def say_notes(spec: ModelSpec, quantization: str | None = None) -> None:
    """Say, beside the answers, what the name of ``spec`` was taken for, how its weights are stored, and what that is to a plan."""
    for note in spec.notes_with(quantization):
        aside().print(note, style="dim")
