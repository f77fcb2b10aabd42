"""The memory of one GPU of a real process, as a snapshot of PyTorch found it, walked back through its history.

A dump shows the end: its history says what led there. Undone event by event, it gives what was held at any moment
before, the beginning of the history too, which a process has usually reached with memory in use.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import zip_longest
from typing import Any

from oomless.memory.allocator import SMALLEST_BLOCK
from oomless.memory.allocator_growth import SMALL_REQUEST, SMALL_SEGMENT, round_up

Event = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True, slots=True)
class RecordedBlock:
    """A block in use."""

    size_bytes: int
    frames: Sequence[Mapping[str, Any]]
    """The stack that asked for it, innermost first; empty where it was not recorded."""

    exact: bool
    """Whether the size is the block's own, or what was asked for, rounded: such a block may have kept a remainder."""


@dataclass(frozen=True, kw_only=True, slots=True)
class MappedRange:
    """Memory that the device gave: a segment, or pages of an expandable one."""

    size_bytes: int
    stream: int
    small: bool


class RecordedMemory:
    """Blocks and mapped ranges by their addresses, at first those of ``segments``, all of one GPU."""

    def __init__(self, segments: Iterable[Mapping[str, Any]]) -> None:
        self.blocks: dict[int, RecordedBlock] = {}
        self.mapped: dict[int, MappedRange] = {}
        for segment in segments:
            address = start = int(segment.get("address", 0))
            for block in segment["blocks"]:
                address, size = int(block.get("address", address)), int(block["size"])
                if block["state"] != "inactive":
                    self.blocks[address] = RecordedBlock(size_bytes=size, frames=block.get("frames", ()), exact=True)
                address += size
            small = segment.get("segment_type") == "small"
            self.mapped[start] = MappedRange(
                size_bytes=int(segment["total_size"]), stream=int(segment.get("stream", 0)), small=small
            )

    @property
    def allocated_bytes(self) -> int:
        """The size of all blocks in use."""
        return sum(block.size_bytes for block in self.blocks.values())

    @property
    def reserved_bytes(self) -> int:
        """What the device gave."""
        return sum(held.size_bytes for held in self.mapped.values())

    def rewind(self, trace: Sequence[Event], until: int) -> None:
        """Undo the events of ``trace``, which led to what is here, from the last to the one numbered ``until``."""
        stacks = _stacks_of_freed(trace)
        for number in range(len(trace) - 1, until - 1, -1):
            self._undo(trace[number], stacks.get(number, ()))

    def _undo(self, entry: Event, stack: Sequence[Mapping[str, Any]]) -> None:
        action = entry["action"]
        if action not in ("alloc", "free_completed", "segment_alloc", "segment_map", "segment_free", "segment_unmap"):
            return
        address, size = int(entry["addr"]), int(entry["size"])
        if action == "alloc":
            self.blocks.pop(address, None)
        elif action == "free_completed":
            rounded = round_up(size, SMALLEST_BLOCK)
            self.blocks[address] = RecordedBlock(size_bytes=rounded, frames=stack, exact=False)
        elif action in ("segment_free", "segment_unmap"):
            stream = int(entry.get("stream", 0))
            self.mapped[address] = MappedRange(size_bytes=size, stream=stream, small=size == SMALL_SEGMENT)
        else:
            self._cut(address, size)

    def _cut(self, address: int, size: int) -> None:
        """Take a range out of those that hold it: pages of an expandable segment are mapped one by one."""
        end = address + size
        for start, held in list(self.mapped.items()):
            stop = start + held.size_bytes
            if start < end and address < stop:
                del self.mapped[start]
                for left, right in ((start, address), (end, stop)):
                    if left < right:
                        self.mapped[left] = MappedRange(size_bytes=right - left, stream=held.stream, small=held.small)

    def pieces(self, start: int) -> Iterator[tuple[int, int, RecordedBlock | None]]:
        """Yield address, size and block (``None``: free) of each piece of the range at ``start``, in order."""
        held = self.mapped[start]
        at, end = start, start + held.size_bytes
        within = sorted(address for address in self.blocks if start <= address < end)
        for address, following in zip_longest(within, within[1:], fillvalue=end):
            block = self.blocks[address]
            if at < address:
                yield at, address - at, None
            at = address + block.size_bytes
            if not block.exact and not held.small and following - at <= SMALL_REQUEST:
                at = following  # too little to be split off
            yield address, at - address, block
        if at < end:
            yield at, end - at, None

    def largest_cached_bytes(self) -> int:
        """Return the largest free piece of one mapped range."""
        free = (size for start in self.mapped for _, size, block in self.pieces(start) if block is None)
        return max(free, default=0)


def last_failure(trace: Sequence[Event]) -> int | None:
    """Return the number of the last ``oom`` event of ``trace``; ``None`` where there is none."""
    return max((number for number, entry in enumerate(trace) if entry["action"] == "oom"), default=None)


def highest(trace: Sequence[Event], at_end: int) -> int:
    """Return after how many events of ``trace``, at whose end ``at_end`` bytes were allocated, most were."""
    most, best, level = at_end, len(trace), at_end
    for number in range(len(trace) - 1, -1, -1):
        action, size = trace[number]["action"], int(trace[number].get("size", 0))
        level += size if action == "free_completed" else -size if action == "alloc" else 0
        if level > most:
            most, best = level, number
    return best


def _stacks_of_freed(trace: Sequence[Event]) -> dict[int, Sequence[Mapping[str, Any]]]:
    """Return for each event that frees, by its number, the stack of the allocation that it ends."""
    stacks: dict[int, Any] = {}
    last: dict[int, Any] = {}
    for number, entry in enumerate(trace):
        if entry["action"] == "alloc":
            last[entry["addr"]] = entry.get("frames", ())
        elif entry["action"] == "free_completed" and entry["addr"] in last:
            stacks[number] = last.pop(entry["addr"])
    return stacks
