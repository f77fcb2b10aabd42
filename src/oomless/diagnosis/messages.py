"""Out-of-memory messages, in every form that PyTorch and its companions have given them since 1.3.

A message is read clause by clause from its beginning. Only white space may stand between the clauses, so text that
another process wrote into the middle ends the reading instead of lending its numbers, and a message cut short yields
what it still says.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass, fields
from typing import Any, Literal, cast

from oomless.diagnosis.deaths import OTHERS
from oomless.diagnosis.sizes import ByteRange, printed_size

Kind = Literal["allocator", "driver", "library", "kernel", "host", "killed", "engine", "placement"]
"""Who failed: PyTorch's allocator, the GPU's driver, a library on the GPU, a kernel that wants more than a multiprocessor
has, an allocation on the host, the whole process, killed by its host; an inference engine that finds no room for its cache;
or a loader that found no room for all layers on the GPU."""

ON_GPU: tuple[Kind, ...] = ("allocator", "driver", "library")

_SIZE = r"(\d+(?:\.\d{1,2})?) (bytes|KiB|MiB|GiB|TiB|KB|MB|GB)"


@dataclass(frozen=True, kw_only=True, slots=True)
class OutOfMemory:
    """One error. Sizes are ``None`` where the message does not say them."""

    kind: Kind
    source: str
    """Who says it: CUDA, HIP, cuBLAS, the operating system ..."""

    words: str
    """The words that were read."""

    gpu: int | None = None
    requested: ByteRange | None = None
    """What was asked for; of PyTorch's allocator, the segment that it wanted for it."""

    exact: bool = False
    """Whether ``requested`` is the request itself, not the segment that the allocator wanted for it."""

    capacity: ByteRange | None = None
    free: ByteRange | None = None
    allocated: ByteRange | None = None
    reserved: ByteRange | None = None
    unallocated: ByteRange | None = None
    """Reserved by PyTorch's allocator, but not allocated."""

    allowed: ByteRange | None = None
    """What a limit for the process allows."""

    private_pools: ByteRange | None = None
    in_use: ByteRange | None = None
    """What this process holds, PyTorch or not."""

    processes: tuple[tuple[int, ByteRange], ...] = ()
    """Numbers of processes on the GPU and what each holds."""

    position: int = 0
    """Where in the text it begins."""

    def sizes(self) -> dict[str, ByteRange]:
        """Return every size that is known, by name."""
        found = {f.name: getattr(self, f.name) for f in fields(self)}
        return {name: value for name, value in found.items() if isinstance(value, ByteRange)}

    @property
    def reserved_bytes(self) -> ByteRange | None:
        """What the allocator reserves: as printed, or the sum of its two parts."""
        if self.reserved is not None or self.allocated is None or self.unallocated is None:
            return self.reserved
        parts = (self.allocated, self.unallocated)
        return ByteRange(
            low=sum(p.low for p in parts), high=sum(p.high for p in parts), text=" + ".join(p.text for p in parts)
        )

    def facts(self) -> tuple[Any, ...]:
        """Return what makes two messages the same, wherever they stand."""
        return tuple(getattr(self, f.name) for f in fields(self) if f.name not in ("position", "words"))

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "kind": self.kind,
            "source": self.source,
            "words": self.words,
            "gpu": self.gpu,
            **{name: size.to_dict() for name, size in self.sizes().items()},
            "processes": [{"process": number, **size.to_dict()} for number, size in self.processes],
        }


def _spaced(pattern: str) -> re.Pattern[str]:
    """Compile ``pattern`` with each blank as any white space, as lines are wrapped anywhere."""
    return re.compile(pattern.replace(" ", r"\s+"), re.IGNORECASE)


_HEAD = _spaced(r"(?<![A-Za-z])(CUDA|HIP|XPU|MUSA|NPU) out of memory(?![A-Za-z])\.?")
_TRIED = _spaced(rf"\s*Tried to allocate {_SIZE}")
_TOO_MUCH = _spaced(r"\s*Tried to allocate more than 1EB memory")
_REFUSED = _spaced(
    rf"\s*Allocation was preemptively rejected because it would exceed per_process_memory_fraction limit\."
    rf"(?: Requested size: {_SIZE})?"
)
# Up to 2.0, in brackets: each clause may be the last that was not cut off.
_OLD = [
    ("gpu", _spaced(r"\.?\s*\((?:[GNX]PU|MUSA) ?(\d*);")),
    ("capacity", _spaced(rf"\s*{_SIZE} total capacity;?")),
    ("allocated", _spaced(rf"\s*{_SIZE} already allocated;?")),
    ("active", _spaced(rf"\s*{_SIZE} (?:current )?active;?")),
    ("free", _spaced(rf"\s*{_SIZE} free;?")),
    ("allowed", _spaced(rf"\s*{_SIZE} allowed;?")),
    ("reserved", _spaced(rf"\s*{_SIZE} (?:reserved in total by PyTorch|cached)\)?")),
]
# From 2.1 on, in sentences.
_NEW = [
    ("gpu", _spaced(r"\.?\s*[GNX]PU\s*(\d*)(?: \([^)]*\))? has(?: a total)?")),
    ("capacity", _spaced(rf"\s*(?:capac?i?ty of {_SIZE}|{_SIZE} total(?: capacity)?,?)")),
    ("free", _spaced(rf"\s*(?:of which )?{_SIZE} (?:is )?free\.?")),
    ("process", _spaced(rf"\.?\s*Process (\d+) has {_SIZE} memory in use\.?")),
    ("in_use", _spaced(rf"\s*Including non-PyTorch memory, this process has {_SIZE} memory in use\.?")),
    ("allowed", _spaced(rf"\s*{_SIZE} allowed;?")),
    ("allocated", _spaced(rf"\.?\s*Of the allocated memory {_SIZE} is allocated by PyTorch,?")),
    ("private_pools", _spaced(rf"\s*with {_SIZE} allocated in private pools \(e\.g\.,? CUDA Graphs\),?\.?")),
    ("unallocated", _spaced(rf"\s*and {_SIZE} is reserved by PyTorch but unallocated\.?")),
]
_ASYNC = _spaced(
    r"(?:OutOfMemoryError:\s*)?Allocation on device(?: (\d+))? would exceed allowed memory\.(?: \(out of memory\))?"
    r"|OutOfMemoryError:\s*Allocation on device\b(?: (\d+))?"
)
_ASYNC_CLAUSES = [
    ("allocated", _spaced(rf"\s*Currently allocated\s*:\s*{_SIZE}")),
    ("requested", _spaced(rf"\s*Requested\s*:\s*{_SIZE}")),
    ("capacity", _spaced(rf"\s*Device limit\s*:\s*{_SIZE}")),
    ("free", _spaced(rf"\s*Free \(according to CUDA\)\s*:\s*{_SIZE}")),
    ("allowed", _spaced(rf"\s*PyTorch limit \(set by user-supplied memory fraction\)\s*:\s*{_SIZE}")),
]
_MPS = _spaced(
    r"\bMPS backend out of memory \(MPS allocated: (\S+) (bytes|[KMG]i?B), other allocations: (\S+) (bytes|[KMG]i?B), "
    r"max allowed: (\S+) (bytes|[KMG]i?B)\)\.(?: Tried to allocate (\S+) (bytes|[KMG]i?B))?"
)


SHORTEST_WRAPPED = 40
"""A line with fewer characters was not wrapped by a terminal."""


def find_messages(text: str) -> list[OutOfMemory]:
    """Return every out-of-memory message in ``text``, which is clean (``logs.clean``), in order."""
    found = sorted([*_allocator_messages(text), *_other_messages(text)], key=lambda m: (m.position, -len(m.words)))
    kept: list[OutOfMemory] = []
    for message in found:  # "CUDA error: out of memory" inside a longer message is that message
        if not kept or not _belongs_to(text, message, kept[-1]):
            kept.append(message)
    return kept


def _belongs_to(text: str, message: OutOfMemory, before: OutOfMemory) -> bool:
    """Whether ``message`` is a part of the one ``before``: inside its words, or the same said again in its line."""
    end = before.position + len(before.words)
    same = message.kind == before.kind and message.kind not in ON_GPU
    return message.position < end or (same and "\n" not in text[end : message.position])


def _allocator_messages(text: str) -> Iterator[OutOfMemory]:
    for head in _HEAD.finditer(text):
        yield max(_variants(text, head), key=lambda message: len(message.sizes()))
    for head in _ASYNC.finditer(text):
        values, end = _clauses(text, head.end(), _ASYNC_CLAUSES)
        gpu = int(head[1] or head[2]) if head[1] or head[2] else None
        yield _message(text, head.start(), end, source="CUDA", exact=True, **{**values, "gpu": gpu})
    for match in _MPS.finditer(text):
        sizes = [_size(*match.group(i, i + 1), always_binary=True) for i in (1, 3, 5, 7)]
        allocated, _, allowed, requested = sizes
        values = {"allocated": allocated, "allowed": allowed, "requested": requested}
        yield _message(text, match.start(), match.end(), source="MPS", exact=True, **values)


def _variants(text: str, head: re.Match[str]) -> Iterator[OutOfMemory]:
    """Yield the message at ``head`` as it stands, and as it was before a terminal broke its lines in mid-word."""
    yield _cuda_message(text, head)
    start = text.rfind("\n", 0, head.start()) + 1
    lines = text[start : start + 4000].split("\n")
    if len(lines[0]) >= SHORTEST_WRAPPED and len(lines) > 1:
        joined, rest = lines[0], iter(lines[1:])
        for line in rest:
            joined += line
            if len(line) < SHORTEST_WRAPPED:
                break
        again = _HEAD.search(joined, head.start() - start)
        if again is not None and again.start() == head.start() - start:
            message = _cuda_message(joined, again)
            values = {f.name: getattr(message, f.name) for f in fields(message)}
            yield OutOfMemory(**{**values, "position": head.start()})


def _cuda_message(text: str, head: re.Match[str]) -> OutOfMemory:
    source, position = head[1].upper(), head.end()
    refused = _REFUSED.match(text, position)
    if refused is not None:
        requested = _size(refused[1], refused[2]) if refused[1] else None
        return _message(text, head.start(), refused.end(), source=source, exact=True, requested=requested)
    too_much = _TOO_MUCH.match(text, position)
    if too_much is not None:
        return _message(text, head.start(), too_much.end(), source=source)
    tried = _TRIED.match(text, position)
    if tried is None:
        return _message(text, head.start(), position, source=source)
    old, new = (_clauses(text, tried.end(), form) for form in (_OLD, _NEW))
    values, end = max(old, new, key=lambda outcome: outcome[1])
    return _message(text, head.start(), end, source=source, requested=_size(tried[1], tried[2]), **values)


def _clauses(text: str, position: int, form: list[tuple[str, re.Pattern[str]]]) -> tuple[dict[str, Any], int]:
    """Read the clauses of ``form`` in their order, each of which may be missing; return them and where they end."""
    values: dict[str, Any] = {}
    for name, pattern in form:
        match = pattern.match(text, position)
        if name == "gpu":
            if match is not None and match[1]:
                values[name] = int(match[1])
        elif name == "process":
            while match is not None:
                size = _size(match[2], match[3])
                values["processes"] = (*values.get("processes", ()), *([] if size is None else [(int(match[1]), size)]))
                position = match.end()
                match = pattern.match(text, position)
        elif match is not None and name != "active":
            number, unit = [group for group in match.groups() if group is not None]
            values[name] = _size(number, unit)
        position = position if match is None else match.end()
    return values, position


def _other_messages(text: str) -> Iterator[OutOfMemory]:
    for kind, source, pattern in OTHERS:
        for match in pattern.finditer(text):
            groups = match.groupdict()
            requested = capacity = None
            source = groups.get("who") or source
            if groups.get("bytes"):
                requested = _size(groups["bytes"], "bytes")
            elif groups.get("number"):
                requested = _size(groups["number"], groups["unit"])
            if groups.get("limit"):
                capacity = _size(groups["limit"], "bytes")
            yield OutOfMemory(
                kind=cast(Kind, kind),
                source=source,
                words=match[0].strip(),
                requested=requested,
                exact=True,
                capacity=capacity,
                position=match.start(),
            )


def _message(text: str, start: int, end: int, *, source: str, **values: Any) -> OutOfMemory:
    return OutOfMemory(kind="allocator", source=source, words=text[start:end], position=start, **values)


def _size(number: str, unit: str, *, always_binary: bool = False) -> ByteRange | None:
    """Return the range of a printed size; ``None`` where it is no number or one that no device has."""
    try:
        return printed_size(number, unit, always_binary=always_binary)
    except (ValueError, TypeError):
        return None
