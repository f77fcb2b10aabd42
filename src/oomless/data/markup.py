"""The text of HTML pages, notebooks, PDF and Word documents.

HTML: what a reader sees. Scripts, styles and templates are left out; white space is one space, as browsers show it, but
stays as it is in ``pre``; blocks begin on a line of their own. Notebooks: the source of their cells in order, code between
fences that name its language; outputs are left out. PDF: the text of each page, as ``pypdf`` finds it. Word: paragraphs and the
cells of tables in order, as ``python-docx`` gives them.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Iterator
from html.parser import HTMLParser
from importlib import import_module
from pathlib import Path
from typing import IO, Any

from oomless.data.read import Pieces
from oomless.errors import DataError

_HIDDEN = "script style template noscript svg"
_PARAGRAPHS = "p h1 h2 h3 h4 h5 h6 pre blockquote ul ol dl table figure section article title hr"
_LINES = (
    "address aside body br caption dd details div dt fieldset figcaption footer form header html legend li main nav option "
    "summary tbody tfoot thead tr"
)
_LEFT_OUT, _NEW_PARAGRAPH, _NEW_LINE = (frozenset(tags.split()) for tags in (_HIDDEN, _PARAGRAPHS, _LINES))
_CELL = frozenset(("td", "th"))
_SPACES = re.compile(r"[ \t\n\r\f]+")


class _PageText(HTMLParser):
    """Collects the text of a page that is fed in pieces."""

    def __init__(self) -> None:
        super().__init__(convert_charrefs=True)
        self.parts: list[str] = []
        self.hidden = self.preformatted = 0
        self.between = ""
        """What separates the next text from the last: nothing, a space, a tab or line ends."""
        self.started = False

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        self.hidden += tag in _LEFT_OUT
        self.preformatted += tag in ("pre", "textarea")
        self._separate(tag)

    def handle_endtag(self, tag: str) -> None:
        self.hidden -= tag in _LEFT_OUT and self.hidden > 0
        self.preformatted -= tag in ("pre", "textarea") and self.preformatted > 0
        self._separate(tag)

    def handle_startendtag(self, tag: str, attrs: Any) -> None:
        self._separate(tag)

    def _separate(self, tag: str) -> None:
        wanted = "\n\n" if tag in _NEW_PARAGRAPH else "\n" if tag in _NEW_LINE else "\t" if tag in _CELL else ""
        if tag == "br" and self.between.startswith("\n"):
            wanted = "\n\n"
        if (len(wanted), wanted == "\n") > (len(self.between), self.between == "\n"):
            self.between = wanted

    def handle_data(self, data: str) -> None:
        if self.hidden:
            return
        if self.preformatted:
            self._emit(data)
            return
        words = _SPACES.sub(" ", data)
        if words.startswith(" "):
            self.between = self.between or " "
        if text := words.strip(" "):
            self._emit(text)
        if text and words.endswith(" "):
            self.between = " "

    def _emit(self, text: str) -> None:
        if self.started:
            self.parts.append(self.between)
        self.parts.append(text)
        self.between, self.started = "", True

    def taken(self) -> str:
        """Return the text found since the last call."""
        text = "".join(self.parts)
        self.parts.clear()
        return text


def html_pieces(pieces: Pieces) -> Pieces:
    """Yield the text of the page that ``pieces`` are."""
    page = _PageText()
    for piece in pieces:
        page.feed(piece)
        if text := page.taken():
            yield text
    page.close()
    yield page.taken()


def notebook_pieces(path: Path, pieces: Pieces) -> Iterator[str]:
    """Yield the text of the notebook at ``path``."""
    try:
        notebook = json.loads("".join(pieces))
        cells = notebook["cells"] if "cells" in notebook else [c for w in notebook["worksheets"] for c in w["cells"]]
        described = notebook.get("metadata", {})
        language = (described.get("language_info") or described.get("kernelspec") or {}).get("name", "")
        texts = [_cell_text(cell, language) for cell in cells]
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path} is not JSON: {error}") from error
    except (KeyError, TypeError, AttributeError) as error:
        raise DataError(f"{path} is not a notebook: it lacks cells with a source ({error})") from error
    yield "\n\n".join(text for text in texts if text)


def _cell_text(cell: dict[str, Any], language: str) -> str:
    source = cell["source"] if "source" in cell else cell["input"]
    text = source if isinstance(source, str) else "".join(source)
    if cell["cell_type"] == "heading":  # of notebooks before version 4
        return f"{'#' * int(cell.get('level', 1))} {text}"
    if cell["cell_type"] == "code" and text:
        fence = max(("```", *(run + "`" for run in re.findall("`{3,}", text))), key=len)
        return f"{fence}{language}\n{text}\n{fence}"
    return text


def pdf_pieces(path: Path, opened: IO[bytes], notes: Counter[str]) -> Pieces:
    """Yield the text of the pages of the PDF ``opened``, which lies at ``path``."""
    pypdf = _module("pypdf", path)
    try:
        empty = True
        for number, page in enumerate(pypdf.PdfReader(opened).pages):
            text = page.extract_text().strip("\n")
            empty = empty and not text.strip()
            yield ("\n\n" if number else "") + text
    except Exception as error:  # a damaged or encrypted file may raise anything
        raise DataError(f"{path} cannot be read as PDF: {error}") from error
    if empty:
        notes[".pdf without text, such as scans"] += 1


def docx_pieces(path: Path, opened: IO[bytes]) -> Pieces:
    """Yield the text of the Word document ``opened``, which lies at ``path``."""
    docx = _module("docx", path)
    try:
        blocks = list(docx.Document(opened).iter_inner_content())
        texts = [_block_text(block) for block in blocks]
    except Exception as error:  # a damaged file may raise anything
        raise DataError(f"{path} cannot be read as a Word document: {error}") from error
    yield "\n\n".join(text for text in texts if text)


def _block_text(block: Any) -> str:
    if hasattr(block, "rows"):
        return "\n".join("\t".join(cell.text for cell in row.cells) for row in block.rows)
    return str(block.text)


def _module(name: str, path: Path) -> Any:
    try:
        return import_module(name)
    except ImportError as error:
        raise DataError(f"{path} needs another library to be read: pip install 'oomless[documents]'") from error
