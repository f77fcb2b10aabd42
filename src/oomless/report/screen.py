"""The one way by which text reaches a person: nothing in it is markup, and nothing in it steers the terminal.

Paths, records, names and errors hold whatever their authors put there, brackets and escape codes too. So a style is never
written into a string: it stands beside it, as in ``Text.assemble(("fits", "bold green"), f" {path}")``. Everything that is
printed comes from a ``Screen``; ``tests/test_architecture.py`` finds what would go another way.
"""

from __future__ import annotations

import os
import re
import sys
import time
from collections.abc import Callable, Iterable, Sequence
from contextlib import suppress
from typing import IO, Any, cast

from rich.console import Console, ConsoleOptions, RenderableType
from rich.live import Live
from rich.padding import Padding
from rich.segment import Segment, Segments
from rich.table import Table
from rich.text import Text

from oomless.units import format_bytes

SECONDS_BETWEEN_LOG_LINES = 10.0
_STEERS = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")
"""Control codes but tab and new line, changes of direction, and halves of characters, which no file takes."""


BAR_WIDTH = 40
BESIDE_BARS = 35
"""The columns that names and sizes take."""

COLOURS = {
    "weights": "#4477aa",
    "gradients": "#ee6677",
    "optimizer state": "#228833",
    "saved activations": "#ccbb44",
    "logits and loss": "#66ccee",
    "quantisation": "#aa3377",
    "temporaries": "#888888",
}

Part = str | Text | tuple[str, str]


class Screen(Console):
    """A console for text that is not ours; ``lost`` is the error after which nothing that is written arrives."""

    def __init__(self, file: IO[str] | None = None, *, stderr: bool = False, **options: Any) -> None:
        self._stream = _Stream(file or (sys.stderr if stderr else sys.stdout))
        stream = cast(IO[str], self._stream)
        super().__init__(markup=False, emoji=False, highlight=False, stderr=stderr, file=stream, **options)

    def say(self, *parts: Part, indent: int = 0, style: str = "") -> None:
        """Print ``parts``, texts and texts with a style, in one paragraph."""
        text = Text.assemble(*parts, style=style)
        self.print(Padding.indent(text, indent) if indent else text)

    def title(self, text: str) -> None:
        """Print a heading."""
        self.say((f"\n{text}", "bold"))

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Print names with their sizes."""
        width = max(len(name) for name, _ in rows)
        for name, size in rows:
            self.say(f"{name:<{width}}  {size:>11}", indent=2)

    def sizes(
        self,
        name: str,
        sizes: Iterable[tuple[str, int]],
        full_bytes: int,
        *,
        limits: Sequence[tuple[str, float]] = (),
        indent: int = 0,
    ) -> None:
        """Print ``sizes``, those that are not 0, with bars in proportion to ``full_bytes``.

        A picture of them is called ``name`` and has ``limits`` across it.
        """
        width = max(1, min(BAR_WIDTH, self.width - BESIDE_BARS))
        table = Table(box=None, pad_edge=False, show_header=False)
        table.add_column(no_wrap=True)
        table.add_column(justify="right", no_wrap=True)
        table.add_column()
        for part, size in sizes:
            if size:
                drawn = "█" * max(1, round(width * size / full_bytes))
                table.add_row(part, format_bytes(size), Text(drawn, COLOURS.get(part, "#bbbbbb")))
        self.print(Padding.indent(table, indent) if indent else table)

    def code(self, name: str, text: str, *, indent: int = 0) -> None:
        """Print what is to be copied; ``name`` is what it is called where it can be."""
        for line in text.splitlines():
            self.say(line, indent=indent, style="cyan")

    def draw(self, picture: Callable[[], str]) -> None:
        """Draw nothing: a terminal has no room for a ``picture``, of which all that matters is printed too."""

    def stream(self, text: str) -> None:
        """Print a piece of a text, every space and line end as it is."""
        self.print(Segments([Segment(text)]), end="", crop=False)

    @property
    def lost(self) -> OSError | ValueError | None:
        """Why what is written does not arrive; ``None`` where it does."""
        return self._stream.lost

    def show_cursor(self, show: bool = True) -> bool:
        """Leave the cursor as it is: a process that is killed could not give it back."""
        return False

    def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterable[Segment]:
        """Render, with a mark in place of what would steer the terminal."""
        for text, style, control in super().render(renderable, options):
            yield Segment(text if control else visible(text), style, control)


def visible(text: str) -> str:
    """Return ``text`` with a mark for each character that would steer what shows it."""
    return _STEERS.sub("\ufffd", text)


class _Stream:
    """A stream whose reader may go away, or whose disk may fill up: the work goes on, and the first failure is kept."""

    def __init__(self, stream: Any) -> None:
        self.lost: OSError | ValueError | None = None if stream is not None else OSError("it is closed")
        self._stream = stream

    def write(self, text: str) -> int:
        encoding = self.encoding
        self._attempt("write", text.encode(encoding, "replace").decode(encoding))
        return len(text)

    def flush(self) -> None:
        self._attempt("flush")

    @property
    def encoding(self) -> str:
        return getattr(self._stream, "encoding", None) or "utf-8"

    def isatty(self) -> bool:
        return self.lost is None and bool(self._stream.isatty())

    def fileno(self) -> int:
        return int(self._stream.fileno())

    def _attempt(self, name: str, *arguments: str) -> None:
        if self.lost is not None:
            return
        try:
            getattr(self._stream, name)(*arguments)
        except (OSError, ValueError) as error:
            self.lost = error
            with suppress(OSError, ValueError):  # or the interpreter would try, and complain, at its end
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self._stream.fileno())
                os.close(nowhere)


class LiveLine:
    """One line that is renewed in place on a terminal; elsewhere, now and then, a line of a log.

    It is drawn when it is told something and never by a thread, which would be in the way of processes that fork.
    """

    def __init__(self, screen: Screen, *, silent_s: float = SECONDS_BETWEEN_LOG_LINES) -> None:
        """Live on ``screen``; a log has its first line after ``silent_s``."""
        self.screen = screen
        self.in_place = screen.is_terminal and not screen.is_dumb_terminal
        self._live: Live | None = None
        self._logged_at = time.monotonic() + silent_s - SECONDS_BETWEEN_LOG_LINES

    def show(self, line: Text, log: str, *, always: bool = False) -> None:
        """Draw ``line``; or write ``log``, if the last one is long ago or this one must ``always`` be there."""
        if self.in_place:
            line.no_wrap, line.overflow = True, "ellipsis"
            if self._live is None:
                self._live = Live(
                    line,
                    console=self.screen,
                    auto_refresh=False,
                    transient=True,
                    redirect_stdout=not self.screen.stderr,
                    redirect_stderr=True,
                )
                self._live.start()
            self._live.update(line, refresh=True)
        elif always or time.monotonic() - self._logged_at >= SECONDS_BETWEEN_LOG_LINES:
            self._logged_at = time.monotonic()
            self.screen.print(log, soft_wrap=True)

    def close(self) -> None:
        """Take the line away."""
        if self._live is not None:
            self._live.stop()
            self._live = None


def bar(share: float, width: int) -> Text:
    """Return a bar of ``width`` cells, ``share`` of it done."""
    done = max(0, min(width, round(share * width)))
    return Text.assemble(("━" * done, "cyan"), ("━" * (width - done), "dim"))


def joined(parts: Iterable[tuple[int, str]], width: int) -> str:
    """Return the texts of ``parts`` in their order, two spaces between them, without those of the highest rank that find no room."""
    kept = [part for part in parts if part[1]]
    while len(kept) > 1 and len("  ".join(text for _, text in kept)) > width:
        kept.remove(max(kept, key=lambda part: part[0]))
    return "  ".join(text for _, text in kept)
