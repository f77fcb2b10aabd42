"""A search as a person sees it: how far it is, and what is said where nothing fits."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NoReturn

import typer
from rich.text import Text

from oomless.report.choice import print_nothing_fits
from oomless.report.screen import LiveLine, Screen, bar

BAR_WIDTH = 20
FOUND = "; so far "
"""What a search says of something that fits."""


class Saying:
    """Is told what is being tried, and what share of all is done, where that is known."""

    def __init__(self, screen: Screen) -> None:
        """Show it on ``screen``."""
        self._screen, self._began, self._live = screen, time.monotonic(), LiveLine(screen)

    def __call__(self, text: str, share: float | None = None) -> None:
        """Renew the line."""
        text += " (Ctrl-C takes it)" if FOUND in text else ""
        seconds = f"{time.monotonic() - self._began:.0f} s"
        drawn = "" if share is None else bar(share, min(BAR_WIDTH, self._screen.width // 4))
        done = "" if share is None else f", {share:.0%}"
        self._live.show(Text.assemble(drawn, f" {seconds:>5}  {text}"), f"searching, {seconds}{done}: {text}")

    def hide(self) -> None:
        """Take the line away until there is something to say again."""
        self._live.close()


@contextmanager
def searching(screen: Screen) -> Iterator[Saying]:
    """Show how far a search is and what it tries, in one line that goes away."""
    saying = Saying(screen)
    try:
        yield saying
    finally:
        saying.hide()


def explain_nothing_fits(screen: Screen, choice: Any) -> NoReturn:
    """Print what would make the training fit, each as it is found, and end with exit code 1."""
    from oomless.models.spec import resolve_for_plan
    from oomless.planning.nearby import smallest_changes
    from oomless.planning.trial import results_folder

    given = choice.given
    spec = resolve_for_plan(given["model"], trust_remote_code=given.get("trust_remote_code", False))
    print_nothing_fits(screen, choice, smallest_changes(spec, choice, results_folder()))
    raise typer.Exit(1)
