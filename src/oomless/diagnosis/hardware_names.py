"""GPUs by their names in a text."""

from __future__ import annotations

import re
from functools import cache

from oomless import catalogue

_UNSLOTH = re.compile(r"GPU: (?:NVIDIA )?([^.\n]+?)\. (?:Num GPUs|Max memory)")


def named_gpus(text: str) -> tuple[str, ...]:
    """Return the catalogue's GPUs whose name stands in ``text`` as a word of its own; several where it has several sizes."""
    match = _UNSLOTH.search(text)
    for part in ([match[1]] if match else []) + [text]:
        squeezed = squeeze(part)
        found = [(len(spelling), name) for spelling, name in _spellings() if f" {spelling} " in squeezed]
        if found:
            longest = max(found)[0]
            return tuple(dict.fromkeys(name for length, name in found if length == longest))
    return ()


def squeeze(text: str) -> str:
    """Lower-case words with single blanks between them: ``Llama-3.2_1B`` is ``llama 3.2 1b``."""
    return " " + re.sub(r"[^a-z0-9.]+", " ", text.lower()).replace(". ", " ") + " "


@cache
def _spellings() -> tuple[tuple[str, str], ...]:
    spellings: dict[tuple[str, str], None] = {}
    for entry in catalogue.gpus():
        for published in (entry.name, *entry.aliases):
            for spelling in {published, re.sub(r"(?<=[A-Za-z])\s+(?=\d)", "", published)}:
                spellings[squeeze(spelling).strip(), entry.name] = None
    return tuple(s for s in spellings if not s[0].isdigit() and len(s[0]) > 1)
