"""What a screen is told, as parts of a page: the same words, with pictures where a terminal has bars or nothing."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Any

from rich.text import Text

from oomless.report.charts import table, text
from oomless.report.pictures import made_of
from oomless.report.screen import Part, Screen

DEEP = 4
"""What is indented by so many columns belongs to what stands before it."""


class Paper:
    """Takes what ``Screen`` takes, and holds it as sections of a page."""

    def __init__(self) -> None:
        """Hold nothing yet."""
        self._sections: list[str] = []
        self._open: list[str] = []

    def title(self, said: str) -> None:
        """Begin a section."""
        self._close()
        self._open.append(f"<h2>{text(said)}</h2>")

    def say(self, *parts: Part, indent: int = 0, style: str = "") -> None:
        """Add ``parts``, texts and texts with a style, as one paragraph."""
        kinds = [name for name, is_so in (("dim", "dim" in style), ("deep", indent >= DEEP)) if is_so]
        kind = f' class="{" ".join(kinds)}"' if kinds else ""
        self._open.append(f"<p{kind}>{_styled(''.join(map(_marked, parts)), style)}</p>")

    def rows(self, rows: Sequence[tuple[str, str]]) -> None:
        """Add names with their sizes."""
        self._open.append(table("sizes", ("", "size"), [(text(name), text(size)) for name, size in rows]))

    def sizes(
        self,
        name: str,
        sizes: Iterable[tuple[str, int]],
        full_bytes: int,
        *,
        limits: Sequence[tuple[str, float]] = (),
        indent: int = 0,
    ) -> None:
        """Draw ``sizes`` as one bar."""
        self.draw(lambda: made_of(name, list(sizes), limits))

    def code(self, name: str, said: str, *, indent: int = 0) -> None:
        """Add what is to be copied."""
        self._open.append(f'<pre class="copied" aria-label="{text(name)}" tabindex="0">{text(said)}</pre>')

    def draw(self, picture: Callable[[], str]) -> None:
        """Add a picture, which is a section."""
        self._close()
        self._sections.append(picture())

    def parts(self) -> list[str]:
        """Return the sections so far."""
        return [*filter(None, self._sections), *self._section()]

    def _section(self) -> list[str]:
        return [f"<section>{''.join(self._open)}</section>"] if self._open else []

    def _close(self) -> None:
        self._sections += self._section()
        self._open = []


Teller = Screen | Paper
"""Who tells a person; both have the same ways to be told."""


def _marked(part: Any) -> str:
    said, style = (part.plain, "") if isinstance(part, Text) else part if isinstance(part, tuple) else (part, "")
    return _styled(text(said.strip("\n")), style)


def _styled(said: str, style: str) -> str:
    for word, tag in (("bold", "strong"), ("cyan", "code")):
        said = f"<{tag}>{said}</{tag}>" if word in style else said
    return said
