"""A log, a notebook's output or a pasted message, made into what happened: errors, where each arose, and the settings.

Nothing is taken from the text that it does not say. What people paste comes with colours, HTML escapes, progress bars
that overwrite themselves, and the lines of several ranks between each other: ``clean`` takes the first three away and
``streams`` parts the ranks.
"""

from __future__ import annotations

import html
import json
import re
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

from oomless.diagnosis import deaths
from oomless.diagnosis.frames import Place, place_of
from oomless.diagnosis.messages import ON_GPU, OutOfMemory, find_messages
from oomless.diagnosis.settings import LogSettings, read_settings
from oomless.diagnosis.sizes import printed_size

MAX_CHARACTERS = 2 << 20
"""Of a longer text the last so many are read: the error stands at the end."""

_HEAD_CHARACTERS = 1 << 18
_ESCAPES = re.compile(
    r"\x1b\[[0-?]*[ -/]*[@-~]|\x1b\][^\x07\x1b]*(?:\x07|\x1b\\)|\x1b[@-Z\\-_]|[\u2400-\u243f]\[[0-9;]*m"
)
_TAGS = re.compile(r"</?(?:span|pre|div|code|b|i|p|font|a|samp|html|body)\b[^<>]*>", re.IGNORECASE)
_ENTITIES = re.compile(r"&(?:lt|gt|amp|quot|#39|#x27|nbsp|apos);")
_RANK = [
    re.compile(r"\[?rank ?(\d+)\]?: ?", re.IGNORECASE),
    re.compile(r"\[default(\d+)\]: ?"),
    re.compile(r"\[\d+,(\d+)\]<std(?:err|out)>:? ?"),
    re.compile(r"\(\w+ (?:rank=(\d+)[, ]+)?pid=\d+[^)]*\) ?"),
]
_SRUN = re.compile(r"(\d+): ")
_STEP = re.compile(r"\b(?:step|iteration|iter|global_step)['\"]?\s*[:=#]?\s*(\d+)", re.IGNORECASE)
_BAR = re.compile(r"^(?P<what>[^|\n]*?)\d+%\|[^|\n]*\|\s*(\d+)/(\d+)\s*\[", re.MULTILINE)
_TRAINS = re.compile(r"^\W*$|epoch|train(?!.*split)|step|^\W*\{.*loss", re.IGNORECASE)
_QUOTED = re.compile(r"^(?:> )+|^>$", re.MULTILINE)
_IDEOGRAPH = r"[\u3040-\u30ff\u3400-\u9fff\uac00-\ud7af]"
_SCRIPTS_MEET = re.compile(rf"(?<=[A-Za-z0-9_])(?={_IDEOGRAPH})|(?<={_IDEOGRAPH})(?=[A-Za-z0-9_])")
"""Where Chinese, Japanese or Korean stands right beside a word or a number, which is a word's end all the same."""

_LINK = re.compile(r"\[([^\[\]\n]+)\]\(https?://[^()\s]*\)(?= in )")
_HELD = re.compile(
    r"(?:memory[ _/](?:allocated|used|active)|allocated[ _]memory|max_mem(?:ory)?_?active|\bMA\b|gpu[ _]mem(?:ory)?|\bmemory)"
    r"(?:\s*\((GiB|MiB|GB|MB)\))?['\"]?\s*[:=]?\s*(\d+(?:\.\d+)?)\s*(GiB|MiB|GB|MB)?",
    re.IGNORECASE,
)


@dataclass(frozen=True, kw_only=True, slots=True)
class Occurrence:
    """One error with everything that the text says around it."""

    message: OutOfMemory
    place: Place
    ranks: tuple[int, ...] = ()
    """The ranks that reported it, where the text tells them apart."""

    count: int = 1
    """How often it stands in the text."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Reading:
    """What a text says."""

    occurrences: tuple[Occurrence, ...]
    """Different errors, in the order of the text; the first is what the rest follow from."""

    settings: LogSettings
    steps_done: int | None = None
    """The last step that the text counts before the first error."""

    held: tuple[tuple[int, int], ...] = ()
    """Steps and the bytes that the text says were held after each."""

    @property
    def first(self) -> Occurrence | None:
        """The first error of the GPU that has numbers, or else the first of any kind."""
        on_gpu = [o for o in self.occurrences if o.message.kind in ON_GPU]
        with_numbers = [o for o in on_gpu if o.message.sizes()]
        engines = [o for o in self.occurrences if o.message.kind == "engine"]
        proved = [o for o in self.occurrences if o.message.kind == "killed" and o.message.source in deaths.PROVED]
        killed = proved if all(o.message.kind == "killed" for o in self.occurrences) else []
        return next(iter([*with_numbers, *engines, *on_gpu, *killed, *self.occurrences]), None)

    @property
    def failed_gpus(self) -> tuple[int, ...]:
        """The GPUs that errors name."""
        return tuple(sorted({o.message.gpu for o in self.occurrences if o.message.gpu is not None}))

    @property
    def others(self) -> tuple[Occurrence, ...]:
        """Other errors than the first, those aside that only repeat its words."""
        first = self.first
        return tuple(
            o for o in self.occurrences if o is not first and (o.message.sizes() or o.message.kind not in ON_GPU)
        )


def read(text: str) -> Reading:
    """Return what ``text`` says. Any text can be read; one that says nothing gives an empty reading."""
    if len(text) > MAX_CHARACTERS:  # settings are printed at the beginning, errors at the end
        text = text[:_HEAD_CHARACTERS] + "\n" + text[_HEAD_CHARACTERS - MAX_CHARACTERS :]
    text = clean(text)
    merged: dict[tuple[Any, ...], Occurrence] = {}
    parted = list(streams(text))
    for rank, stream in parted:
        for message in find_messages(stream):
            occurrence = Occurrence(
                message=message,
                place=place_of(stream, message.position),
                ranks=() if rank is None else (rank,),
            )
            same = merged.get(message.facts())
            if same is not None:
                richer = max(same, occurrence, key=lambda o: len(o.place.frames))
                occurrence = replace(
                    richer,
                    message=same.message,
                    ranks=tuple(sorted({*same.ranks, *occurrence.ranks})),
                    count=same.count + 1,
                )
            merged[message.facts()] = occurrence
    first = min((o.message.position for o in merged.values()), default=len(text))
    found = list(merged.values())
    if len(parted) > 1:  # each rank's lines were read by themselves: back to the order of the text
        found.sort(key=lambda o: text.find(o.message.words.split("\n")[0]))
    return Reading(
        occurrences=tuple(found),
        settings=read_settings(text),
        steps_done=_steps_done(text[:first] if len(parted) == 1 else text),
        held=_held(text),
    )


def clean(text: str) -> str:
    """Return ``text`` without colours, HTML, marks of quoting and overwritten lines; of a notebook file, its outputs."""
    text = _notebook_outputs(text)
    if _ENTITIES.search(text) or _TAGS.search(text):
        text = html.unescape(_TAGS.sub("", re.sub(r"<br\s*/?>", "\n", text)))
    if "\n" not in text.strip() and "\\n" in text:  # the inside of a JSON string
        text = text.replace("\\r\\n", "\n").replace("\\n", "\n").replace('\\"', '"').replace("\\u001b", "\x1b")
    text = _LINK.sub(r"\1", text)
    text = _ESCAPES.sub("", text).replace("\r\n", "\n").replace("\r", "\n").replace("\xa0", " ").replace("\x00", "")
    return _SCRIPTS_MEET.sub(" ", _QUOTED.sub("", text))


def _notebook_outputs(text: str) -> str:
    if not text.lstrip().startswith("{") or '"cells"' not in text:
        return text
    try:
        cells = json.loads(text)["cells"]
        parts: list[str] = []
        for cell in cells:
            parts.append("".join(cell.get("source", "")))
            for output in cell.get("outputs", []):
                parts.append("".join(output.get("text", "")) + "\n".join(output.get("traceback", [])))
        return "\n".join(parts)
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return text


def streams(text: str) -> Iterator[tuple[int | None, str]]:
    """Yield each rank with its lines; lines without a rank are those of ``None``."""
    lines = text.split("\n")
    numbered = sum(_SRUN.match(line) is not None for line in lines) >= max(2, len(lines) // 2)
    parted: dict[int | None, list[str]] = {}
    for line in lines:
        for pattern in [*_RANK, *([_SRUN] if numbered else [])]:
            match = pattern.match(line)
            if match is not None:
                rank = int(match[1]) if match[1] and len(match[1]) < 7 else None
                line = line[match.end() :]
                break
        else:
            rank = None
        parted.setdefault(rank, []).append(line)
    for rank, own in parted.items():
        yield rank, "\n".join(own)


def _steps_done(text: str) -> int | None:
    bars = [
        int(match[2])
        for match in _BAR.finditer(text)
        if len(match[2]) < 10 and len(match[3]) < 10 and _TRAINS.search(match["what"])
    ]
    counted = [int(match[1]) for match in _STEP.finditer(text) if len(match[1]) < 10]
    return max(bars[-1:] + counted[-1:], default=None)


def _held(text: str) -> tuple[tuple[int, int], ...]:
    found: list[tuple[int, int]] = []
    for number, line in enumerate(text.split("\n")):
        match = _HELD.search(line)
        unit = (match[1] or match[3]) if match is not None else None
        if match is None or unit is None or "out of memory" in line or "by PyTorch" in line:
            continue
        step = _STEP.search(line)
        size = printed_size(match[2], unit, always_binary=True)
        if size is not None and (step is None or len(step[1]) < 10):
            found.append((int(step[1]) if step else number, size.middle))
    return tuple(found)
