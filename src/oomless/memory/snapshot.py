"""Memory snapshots in the form of ``torch.cuda.memory._dump_snapshot``, written and replayed.

Written: a simulated run as a file that PyTorch's memory visualiser and ``torch.cuda._memory_viz`` read. Replayed: the history
of a real process through the simulated allocator, to see whether both come to the same statistics. A replay takes from the
recorded history what only the process knew: what was asked for and given back, when cached memory was given back to the
device, and the addresses that the driver chose, which decide between blocks of equal size.
"""

from __future__ import annotations

import gc
import os
import pickle
import tempfile
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from oomless.memory.allocator import CachingAllocator
from oomless.memory.allocator_growth import TraceEvent
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.allocator_state import AllocatorStatistics, Block, SegmentView
from oomless.memory.recorded import MappedRange, RecordedMemory

PICKLE_PROTOCOL = 4
"""The newest that the visualiser reads."""

DEVICE_EVENTS = ("segment_alloc", "segment_map", "segment_free", "segment_unmap")
_CONFIGURATIONS = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def snapshot(allocator: CachingAllocator) -> dict[str, Any]:
    """Return what ``torch.cuda.memory._snapshot()`` would return for GPU 0; without a history the trace is empty."""
    gc.collect()  # Cycles of tensors die now, not while the books are read.
    trace = [_entry(event) for event in allocator.history or ()]
    segments = [_segment(view) for view in allocator.segments()]
    if allocator.history is not None:
        active = sum(segment["active_size"] for segment in segments)
        time_us = allocator.history[-1].time_us if allocator.history else 0
        trace.append(_entry(TraceEvent("snapshot", 0, active, 0, time_us + 1, None, None)))
    if any("category" in entry for entry in trace):
        # The visualiser sorts entries without a category under this name, and fails if no entry has it.
        for entry in trace:
            entry.setdefault("category", "unknown")
    settings = allocator.settings
    return {
        "segments": segments,
        "device_traces": [trace],
        "allocator_settings": {
            _CONFIGURATIONS[0]: settings.to_text(),
            "max_split_size": -1 if settings.max_split_size_bytes is None else settings.max_split_size_bytes,
            "garbage_collection_threshold": settings.garbage_collection_threshold,
            "expandable_segments": settings.expandable_segments,
            "roundup_power2_divisions": {
                str(1 << power): divisions for power, divisions in enumerate(settings.roundup_power2_divisions)
            },
        },
    }


def write_snapshot(allocator: CachingAllocator, path: str | os.PathLike[str]) -> None:
    """Write the snapshot of ``allocator`` to ``path``: the whole of it, or, on any error, nothing.

    Raises:
        OSError: the folder does not exist or cannot be written, or the disk is full.
    """
    target = Path(path)
    with tempfile.NamedTemporaryFile(dir=target.parent, prefix=f".{target.name}.", delete=False) as file:
        try:
            pickle.dump(snapshot(allocator), file, protocol=PICKLE_PROTOCOL)
            file.flush()
            os.fsync(file.fileno())
            os.replace(file.name, target)
        except BaseException:
            os.unlink(file.name)
            raise


def replay(
    source: Mapping[str, Any] | Iterable[Mapping[str, Any]],
    *,
    device: int = 0,
    settings: AllocatorSettings | None = None,
    check_addresses: bool = False,
) -> AllocatorStatistics:
    """Run a recorded history through the simulated allocator and return its statistics.

    Args:
        source: a snapshot, or the trace of one device, which then begins before the first allocation. The history of a
            snapshot may begin with memory in use: what that was follows from the snapshot's end.
        device: whose trace of the snapshot.
        settings: of the recorded process; default: those that the snapshot names, else PyTorch's defaults.
        check_addresses: also require each allocation to lie where it lay in the process, and every growth to be its.

    Raises:
        ValueError: a free has no allocation, or an address differs though it should not.
    """
    if isinstance(source, Mapping):
        trace: Sequence[Mapping[str, Any]] = source["device_traces"][device]
        begin = RecordedMemory([s for s in source["segments"] if s["device"] == device])
        begin.rewind(trace, 0)
        named = source.get("allocator_settings", {})
        if settings is None:
            settings = AllocatorSettings.parse(next((named[key] for key in _CONFIGURATIONS if named.get(key)), ""))
    else:
        trace, begin = list(source), RecordedMemory([])
    allocator = _Replay(settings or AllocatorSettings(), begin)
    for index, entry in enumerate(trace):
        allocator.follow(index, entry, check_addresses)
    return allocator.statistics


class _Replay(CachingAllocator):
    """An allocator without an end of memory that is led through a recorded history."""

    def __init__(self, settings: AllocatorSettings, begin: RecordedMemory) -> None:
        super().__init__(1 << 50, settings)
        self._blocks: dict[int, Block] = {}
        self._growths: deque[int] = deque()
        self._recorded: list[tuple[str, int, int]] = []
        self._simulated: list[tuple[str, int, int]] = []
        if begin.mapped and settings.expandable_segments:
            raise ValueError(
                "a history with expandable segments must begin before the first allocation: its ranges are not in a snapshot"
            )
        for start, held in begin.mapped.items():
            self._hold(start, held, begin)

    def _hold(self, start: int, held: MappedRange, begin: RecordedMemory) -> None:
        """Hold the segment at ``start`` as the history found it."""
        pool = self._pool(held.stream, held.small)
        self.statistics.segments.increase(1)
        self.statistics.reserved.increase(held.size_bytes)
        rest: Block = Block(start, held.size_bytes, pool)
        for _, size, used in begin.pieces(start):
            block = rest
            if size < block.size_bytes:
                rest = block.cut(size)
            if used is None:
                pool.insert(block)
            else:
                self._use(block)

    def _use(self, block: Block) -> None:
        block.allocated = True
        self._active[block.address] = self._blocks[block.address] = block
        books = self.statistics
        books.allocations.increase(1)
        books.allocated.increase(block.size_bytes)
        books.active_blocks.increase(1)
        books.active.increase(block.size_bytes)

    def follow(self, index: int, entry: Mapping[str, Any], check_addresses: bool) -> None:
        """Do what ``entry``, the one at ``index`` of the history, says."""
        action = entry["action"]
        if action in DEVICE_EVENTS:
            self._recorded.append((action, entry["addr"], entry["size"]))
        if action in ("segment_alloc", "segment_map"):
            self._growths.append(entry["addr"])
        elif action == "alloc":
            block = self.allocate(entry["size"], stream=entry["stream"])
            self._growths.clear()
            if check_addresses:
                self._compare(index, entry, block)
            self._blocks[entry["addr"]] = block
        elif action in ("free_requested", "free_completed"):
            block_or_none = self._blocks.get(entry["addr"])
            if block_or_none is None:
                raise ValueError(
                    f"event {index} frees {entry['addr']:#x}, which was not allocated before; record the history from before "
                    "the first allocation, with max_entries large enough to keep all of it"
                )
            if action == "free_requested":
                self._request_free(block_or_none)
            else:
                self._complete_free(self._blocks.pop(entry["addr"]))
        elif action in ("segment_free", "segment_unmap"):
            self._give_back(entry["addr"])

    def _compare(self, index: int, entry: Mapping[str, Any], block: Block) -> None:
        """Require that ``block`` lies where the process had it, after the same growths and shrinkings."""
        if block.address != entry["addr"]:
            raise ValueError(
                f"allocation {index} of {entry['size']} bytes lay at {entry['addr']:#x}; the simulation puts it at "
                f"{block.address:#x}"
            )
        if self._simulated != self._recorded:
            raise ValueError(
                f"before event {index} the process did {self._recorded} with the device; the simulation {self._simulated}"
            )
        self._simulated.clear()
        self._recorded.clear()

    def _record(self, action: str, address: int, size_bytes: int, *about: Any) -> None:
        if action in DEVICE_EVENTS:
            self._simulated.append((action, address, size_bytes))

    def _place(self, size_bytes: int) -> int:
        return self._growths.popleft() if self._growths else super()._place(size_bytes)

    def _give_back(self, address: int) -> None:
        """Give back the cached memory that holds ``address``, unless the simulation did that by its own rules."""
        for pool in self._pools.values():
            for size, start, block in pool.free:
                if start <= address < start + size:
                    if block.range is not None:
                        self._unmap(block)
                    elif not block.is_split:
                        self._release(block)
                    return


def _entry(event: TraceEvent) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "action": event.action,
        "device_free" if event.action == "oom" else "addr": event.address,
        "size": event.size_bytes,
        "stream": event.stream,
        "time_us": event.time_us,
        "frames": _frames(event.note),
    }
    if event.category is not None:
        entry["category"] = event.category
    return entry


def _segment(view: SegmentView) -> dict[str, Any]:
    return {
        "device": 0,
        "address": view.address,
        "total_size": view.size_bytes,
        "allocated_size": view.allocated_bytes,
        "active_size": view.active_bytes,
        "requested_size": view.requested_bytes,
        "stream": view.stream,
        "segment_type": "large" if view.is_large else "small",
        "segment_pool_id": (0, 0),
        "is_expandable": view.is_expandable,
        "frames": [],
        "blocks": [
            {
                "address": block.address,
                "size": block.size_bytes,
                "requested_size": block.requested_bytes,
                "state": block.state,
                "frames": _frames(block.note),
            }
            for block in view.blocks
        ],
    }


def _frames(note: object) -> list[dict[str, Any]]:
    """Return ``note`` as the one frame of a stack: the visualiser shows stacks and nothing else."""
    return [] if note is None else [{"filename": "simulated", "line": 0, "name": str(note)}]
