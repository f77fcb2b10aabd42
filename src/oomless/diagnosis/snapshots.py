"""A memory snapshot of PyTorch (``torch.cuda.memory._dump_snapshot``): what was held, by whom, and what grew.

Such a file is a pickle, and a pickle can name any function to be called. This reader admits plain containers, numbers
and text; the first name of a class or function ends the reading, before anything of it is imported or called.

A dump shows the process when it was written, usually after the exception of an out-of-memory error had unwound and most
tensors were gone. So the history is walked back: to the last ``oom`` event, or, where there is none, to the peak.
"""

from __future__ import annotations

import pickle
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NoReturn

from oomless.diagnosis.frames import Frame, Place, place_of_frames
from oomless.diagnosis.messages import OutOfMemory
from oomless.diagnosis.sizes import ByteRange
from oomless.errors import DataError
from oomless.memory.recorded import RecordedMemory, highest, last_failure
from oomless.units import format_bytes

Moment = Literal["out of memory", "peak", "end"]
LARGEST_FILE_BYTES = 4 << 30
SHARES = 4
"""A leak shows in every one of so many equal shares of the history."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Holder:
    """Blocks that were asked for at one place of the code."""

    where: str
    blocks: int
    size_bytes: int


@dataclass(frozen=True, kw_only=True, slots=True)
class SnapshotReading:
    """What a snapshot says of the GPU that ran out of memory, or of the fullest in it."""

    gpu: int
    moment: Moment
    """When: at the last failed allocation, else at the peak of the history, else (without one) when it was written."""

    allocated_bytes: int
    reserved_bytes: int
    largest_cached_bytes: int
    """The largest piece that is reserved and free."""

    holders: tuple[Holder, ...]
    """Who holds the allocated memory, the largest first."""

    growing: tuple[Holder, ...]
    """Who took memory in every part of the history and never gave it back."""

    out_of_memory: OutOfMemory | None
    """The last failed allocation of the history."""

    place: Place
    """Where that allocation was asked for."""

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {
            "gpu": self.gpu,
            "moment": self.moment,
            "allocated_bytes": self.allocated_bytes,
            "reserved_bytes": self.reserved_bytes,
            "largest_cached_bytes": self.largest_cached_bytes,
            "holders": [{"where": h.where, "blocks": h.blocks, "bytes": h.size_bytes} for h in self.holders],
            "growing": [{"where": h.where, "blocks": h.blocks, "bytes": h.size_bytes} for h in self.growing],
        }


class _PlainUnpickler(pickle.Unpickler):
    """Reads dicts, lists, tuples, text, numbers, and nothing that has to be looked up by name."""

    def find_class(self, module: str, name: str) -> NoReturn:
        raise DataError(
            f"a memory snapshot holds plain containers; this file asks for {module}.{name}, which could run code: refused, "
            "and nothing was run. Make it with torch.cuda.memory._dump_snapshot."
        )

    def persistent_load(self, pid: Any) -> NoReturn:
        raise DataError(
            "a memory snapshot holds plain containers; this file asks for an object from elsewhere: refused"
        )


def load_snapshot(path: Path) -> Mapping[str, Any]:
    """Return the containers in the snapshot ``path``; nothing in the file is run.

    Raises:
        DataError: it cannot be read, is no pickle of plain containers, or is no snapshot.
    """
    try:
        if path.stat().st_size > LARGEST_FILE_BYTES:
            raise DataError(
                f"a snapshot is at most {format_bytes(LARGEST_FILE_BYTES)}; {path} is larger: record less history"
            )
        with path.open("rb") as file:
            content = _PlainUnpickler(file).load()
    except DataError:
        raise
    except OSError as error:
        raise DataError(f"the snapshot {path} cannot be read: {error}") from error
    except Exception as error:  # damaged pickles raise errors of every kind
        raise DataError(f"{path} is not a memory snapshot: {error!r}") from error
    if not isinstance(content, dict) or not isinstance(content.get("segments"), list):
        raise DataError(f"a memory snapshot is a dict with segments; {path} holds something else")
    return content


def read_snapshot(path: Path) -> SnapshotReading:
    """Return what the snapshot ``path`` says.

    Raises:
        DataError: as ``load_snapshot``, or its entries are not those of a snapshot.
    """
    content = load_snapshot(path)
    try:
        return _reading(content)
    except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
        raise DataError(f"{path} is a snapshot with entries that are not understood: {error!r}") from error


def _reading(content: Mapping[str, Any]) -> SnapshotReading:
    traces = content.get("device_traces") or []
    failures = [(gpu, entry) for gpu, trace in enumerate(traces) for entry in trace if entry["action"] == "oom"]
    reserved: Counter[int] = Counter()
    for segment in content["segments"]:
        reserved[int(segment.get("device", 0))] += int(segment["total_size"])
    gpu = failures[-1][0] if failures else max(reserved, key=lambda g: reserved[g], default=0)
    trace = traces[gpu] if gpu < len(traces) else []
    memory = RecordedMemory([s for s in content["segments"] if int(s.get("device", 0)) == gpu])
    failure = last_failure(trace)
    moment: Moment = "out of memory" if failure is not None else "peak" if trace else "end"
    memory.rewind(trace, highest(trace, memory.allocated_bytes) if failure is None else failure)
    message, place = None, Place()
    if failures:
        entry = failures[-1][1]
        place = place_of_frames(_frames(entry.get("frames", ())))
        message = OutOfMemory(
            kind="allocator",
            source="CUDA",
            words=f"oom event of {format_bytes(int(entry['size']))} in the snapshot",
            gpu=gpu,
            requested=_exactly(int(entry["size"])),
            exact=True,
            free=_exactly(int(entry["device_free"])) if "device_free" in entry else None,
            allocated=_exactly(memory.allocated_bytes),
            reserved=_exactly(memory.reserved_bytes),
        )
    return SnapshotReading(
        gpu=gpu,
        moment=moment,
        allocated_bytes=memory.allocated_bytes,
        reserved_bytes=memory.reserved_bytes,
        largest_cached_bytes=memory.largest_cached_bytes(),
        holders=_holders((_where(block.frames), block.size_bytes) for block in memory.blocks.values()),
        growing=_growing(trace),
        out_of_memory=message,
        place=place,
    )


def _exactly(size_bytes: int) -> ByteRange:
    return ByteRange(low=size_bytes, high=size_bytes, text=format_bytes(size_bytes))


def _holders(sizes: Iterable[tuple[str, int]]) -> tuple[Holder, ...]:
    blocks: Counter[str] = Counter()
    held: Counter[str] = Counter()
    for where, size_bytes in sizes:
        blocks[where] += 1
        held[where] += size_bytes
    return tuple(Holder(where=where, blocks=blocks[where], size_bytes=size) for where, size in held.most_common())


def _growing(trace: list[Mapping[str, Any]]) -> tuple[Holder, ...]:
    """Return the places that left memory behind in every share of the history: in the last as much as in the second."""
    alive: dict[int, tuple[int, str, int]] = {}
    for number, entry in enumerate(trace):
        if entry["action"] == "alloc":
            alive[entry["addr"]] = (number, _where(entry.get("frames", ())), int(entry["size"]))
        elif entry["action"] in ("free_requested", "free_completed"):
            alive.pop(entry["addr"], None)
    shares: dict[str, list[int]] = {}
    for number, where, size_bytes in alive.values():
        shares.setdefault(where, [0] * SHARES)[number * SHARES // max(1, len(trace))] += size_bytes
    growing = {where for where, parts in shares.items() if where and min(parts) > 0 and parts[-1] >= parts[1] // 2}
    return _holders((where, size_bytes) for _, where, size_bytes in alive.values() if where in growing)


def _frames(frames: Iterable[Mapping[str, Any]]) -> tuple[Frame, ...]:
    """Return Python's frames, outermost first, as in a traceback; a snapshot has the innermost first."""
    kept = [f for f in frames if str(f["filename"]).endswith(".py") or f["filename"] == "simulated"]
    return tuple(Frame(path=str(f["filename"]), name=str(f["name"]), code="") for f in reversed(kept))


def _where(frames: Iterable[Mapping[str, Any]]) -> str:
    """Return what asked, by its stack: the innermost Python line outside of torch, else the node of autograd or the operator.

    Blocks that autograd's own thread made have a stack of C++ alone, or none of the user's. Empty where none was recorded.
    """
    own = [f for f in frames if f.get("name")]
    python = [f for f in own if str(f["filename"]).endswith(".py") or f["filename"] == "simulated"]
    outside = [f for f in python if "/torch/" not in str(f["filename"])]
    if not outside:
        for pattern, words in _COMPILED:
            found = next((match for f in own if (match := pattern.search(str(f["name"])))), None)
            if found is not None:
                return words.format(found[1])
    for frame in outside or python or [f for f in own if not _PLUMBING.search(str(f["name"]))]:
        if frame["filename"] == "simulated":
            return str(frame["name"])
        return f"{frame['filename']}:{frame['line']} {frame['name']}"
    return ""


_COMPILED = (
    (re.compile(r"torch::autograd::(?:generated::)?(\w+)::apply\("), "{} in the backward pass"),
    (re.compile(r"at::_ops::(\w+)::(?:call|redispatch)\("), "aten::{}"),
)
"""Frames of C++ that say what was computed, and in which words; the first kind that a stack has is told."""

_PLUMBING = re.compile(r"^torch::(?:unwind|CapturedTraceback|cuda::)|^c10::")
