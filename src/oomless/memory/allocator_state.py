"""What the simulated caching allocator holds: blocks in pools, its statistics, and what it shows of them.

Statistics have the names and the meaning of ``torch.cuda.memory_stats`` (its ``all`` rows, not those of each pool).
"""

from __future__ import annotations

from bisect import bisect_left, insort
from dataclasses import dataclass
from typing import Literal

from oomless.units import GiB, KiB, MiB

BlockState = Literal["active_allocated", "active_pending_free", "inactive"]


class Stat:
    """One quantity: now, at most, and the sum of all increases."""

    __slots__ = ("allocated", "current", "peak")

    def __init__(self) -> None:
        self.current = 0
        self.peak = 0
        self.allocated = 0

    @property
    def freed(self) -> int:
        """The sum of all decreases."""
        return self.allocated - self.current

    def increase(self, amount: int) -> None:
        """Add ``amount`` and raise the peak."""
        self.allocated += amount
        self.current = current = self.current + amount
        if current > self.peak:
            self.peak = current

    def change(self, amount: int) -> None:
        """Add or take away ``amount``; a decrease counts as freed."""
        if amount > 0:
            self.increase(amount)
        else:
            self.current += amount


class AllocatorStatistics:
    """The allocator's books, kept up to date by it."""

    __slots__ = (
        "active",
        "active_blocks",
        "allocated",
        "allocations",
        "inactive_split",
        "inactive_split_blocks",
        "num_alloc_retries",
        "num_device_alloc",
        "num_device_free",
        "num_oom_rejections",
        "num_ooms",
        "num_sync_all_streams",
        "oversize_allocations",
        "oversize_segments",
        "requested",
        "reserved",
        "segments",
    )

    def __init__(self) -> None:
        self.allocated, self.reserved, self.active, self.inactive_split, self.requested = (Stat() for _ in range(5))
        self.allocations, self.segments, self.active_blocks, self.inactive_split_blocks = (Stat() for _ in range(4))
        self.oversize_allocations, self.oversize_segments = Stat(), Stat()
        self.num_alloc_retries = self.num_ooms = self.num_oom_rejections = 0
        self.num_device_alloc = self.num_device_free = self.num_sync_all_streams = 0

    @property
    def allocated_bytes(self) -> int:
        """Bytes in blocks that are in use, as rounded."""
        return self.allocated.current

    @property
    def reserved_bytes(self) -> int:
        """Bytes got from the device."""
        return self.reserved.current

    @property
    def peak_allocated_bytes(self) -> int:
        """The most that was allocated since ``reset_peak``."""
        return self.allocated.peak

    @property
    def peak_reserved_bytes(self) -> int:
        """The most that was reserved since ``reset_peak``."""
        return self.reserved.peak

    def _rows(self) -> dict[str, Stat]:
        return {
            "allocation.all": self.allocations,
            "segment.all": self.segments,
            "active.all": self.active_blocks,
            "inactive_split.all": self.inactive_split_blocks,
            "allocated_bytes.all": self.allocated,
            "reserved_bytes.all": self.reserved,
            "active_bytes.all": self.active,
            "inactive_split_bytes.all": self.inactive_split,
            "requested_bytes.all": self.requested,
            "oversize_allocations": self.oversize_allocations,
            "oversize_segments": self.oversize_segments,
        }

    def memory_stats(self) -> dict[str, int]:
        """Return the books under the keys of ``torch.cuda.memory_stats``."""
        books = {
            f"{row}.{kind}": getattr(stat, kind)
            for row, stat in self._rows().items()
            for kind in ("current", "peak", "allocated", "freed")
        }
        counters = [name for name in self.__slots__ if name.startswith("num_")]
        return books | {name: getattr(self, name) for name in counters}

    def raise_peaks(self, allocated_bytes: int, reserved_bytes: int) -> None:
        """Remember that so much was allocated and reserved at some time."""
        self.allocated.peak = max(self.allocated.peak, allocated_bytes)
        self.reserved.peak = max(self.reserved.peak, reserved_bytes)

    def reset_peak(self) -> None:
        """Set every peak to what is held now."""
        for stat in self._rows().values():
            stat.peak = stat.current


class ExpandableRange:
    """A range of addresses that is backed by memory page by page."""

    __slots__ = ("address", "page_bytes", "size_bytes")

    def __init__(self, address: int, size_bytes: int, page_bytes: int) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.page_bytes = page_bytes


class Block:
    """A part of a segment: in use, free in its pool, or (in an expandable range) not backed by memory.

    Callers of ``CachingAllocator.allocate`` may read ``address``, ``size_bytes``, ``requested_bytes`` and ``note``, until
    they free it.
    """

    __slots__ = (
        "address",
        "age_base",
        "allocated",
        "category",
        "mapped",
        "next",
        "note",
        "pending",
        "pool",
        "previous",
        "range",
        "requested_bytes",
        "size_bytes",
        "streams",
    )

    def __init__(self, address: int, size_bytes: int, pool: Pool, range: ExpandableRange | None = None) -> None:
        self.address = address
        self.size_bytes = size_bytes
        self.pool = pool
        self.range = range
        self.requested_bytes = 0
        self.allocated = False
        self.pending = False
        self.mapped = True
        self.previous: Block | None = None
        self.next: Block | None = None
        self.age_base = 0
        self.note: object = None
        self.category: str | None = None
        self.streams: set[int] | None = None

    @property
    def is_split(self) -> bool:
        """Whether the segment has other blocks."""
        return self.previous is not None or self.next is not None

    @property
    def is_free(self) -> bool:
        """Whether it may be handed out or merged, once it is mapped."""
        return not (self.allocated or self.pending)

    @property
    def growable_bytes(self) -> int:
        """Its size and that of the unmapped addresses right behind it."""
        behind = self.next
        return self.size_bytes if behind is None or behind.mapped else self.size_bytes + behind.size_bytes

    def cut(self, size_bytes: int) -> Block:
        """Cut this block to ``size_bytes`` and return the rest, linked behind it."""
        rest = Block(self.address + size_bytes, self.size_bytes - size_bytes, self.pool, self.range)
        rest.mapped = self.mapped
        rest.previous, rest.next, self.next = self, self.next, rest
        if rest.next is not None:
            rest.next.previous = rest
        self.size_bytes = size_bytes
        return rest

    def absorb(self, neighbour: Block | None) -> int:
        """Merge a free neighbour that is mapped as this block is; return its size, or 0 where it stays."""
        if neighbour is None or neighbour.allocated or neighbour.pending or neighbour.mapped != self.mapped:
            return 0
        if neighbour is self.previous:
            self.address, self.previous = neighbour.address, neighbour.previous
            if self.previous is not None:
                self.previous.next = self
        else:
            self.next = neighbour.next
            if self.next is not None:
                self.next.previous = self
        self.size_bytes += neighbour.size_bytes
        if neighbour.mapped:
            self.pool.remove(neighbour)
        else:
            self.pool.remove_unmapped(neighbour)
        return neighbour.size_bytes


class Pool:
    """The free blocks of one stream and one kind (small or large), by size and then address; unmapped ones by address."""

    __slots__ = ("free", "small", "stream", "unmapped")

    def __init__(self, stream: int, small: bool) -> None:
        self.stream = stream
        self.small = small
        self.free: list[tuple[int, int, Block]] = []
        self.unmapped: list[tuple[int, Block]] = []

    def insert(self, block: Block) -> None:
        """Put a mapped block among the free ones."""
        insort(self.free, (block.size_bytes, block.address, block))

    def remove(self, block: Block) -> None:
        """Take a mapped block out again; its size and address must be those it was put in with."""
        del self.free[bisect_left(self.free, (block.size_bytes, block.address))]

    def insert_unmapped(self, block: Block) -> None:
        """Put a block among the unmapped ones."""
        insort(self.unmapped, (block.address, block))

    def remove_unmapped(self, block: Block) -> None:
        """Take an unmapped block out again."""
        del self.unmapped[bisect_left(self.unmapped, (block.address,))]


@dataclass(frozen=True, kw_only=True, slots=True)
class BlockView:
    """A block as it was when it was looked at."""

    address: int
    size_bytes: int
    requested_bytes: int
    """0 where it is free."""
    state: BlockState
    note: object
    category: str | None


@dataclass(frozen=True, kw_only=True, slots=True)
class SegmentView:
    """A segment, or a mapped stretch of an expandable range, as it was when it was looked at."""

    address: int
    stream: int
    is_large: bool
    is_expandable: bool
    blocks: tuple[BlockView, ...]
    """In address order, without gaps."""

    @property
    def size_bytes(self) -> int:
        """What it takes of the device."""
        return sum(block.size_bytes for block in self.blocks)

    @property
    def allocated_bytes(self) -> int:
        """The size of the blocks that are in use."""
        return sum(block.size_bytes for block in self.blocks if block.state == "active_allocated")

    @property
    def active_bytes(self) -> int:
        """The size of the blocks that are in use or wait for another stream."""
        return sum(block.size_bytes for block in self.blocks if block.state != "inactive")

    @property
    def requested_bytes(self) -> int:
        """What was asked for in its active blocks."""
        return sum(block.requested_bytes for block in self.blocks)


@dataclass(frozen=True, kw_only=True, slots=True)
class OomFacts:
    """What an out-of-memory error was about, in whole bytes."""

    requested_bytes: int
    segment_bytes: int
    """The growth that failed: the "Tried to allocate" of the message."""
    capacity_bytes: int
    free_bytes: int
    allocated_bytes: int
    reserved_bytes: int
    outside_bytes: int
    note: object


def cuda_size(size_bytes: int) -> str:
    """Return ``size_bytes`` as PyTorch's messages print it: ``"20.00 MiB"``, ``"512 bytes"``."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size_bytes > unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} bytes"


def out_of_memory_message(facts: OomFacts, allowed_bytes: int | None) -> str:
    """Return the message of torch 2.11 to 2.13 for a failed allocation on GPU 0."""
    allowed = "" if allowed_bytes is None else f"{cuda_size(allowed_bytes)} allowed; "
    return (
        f"CUDA out of memory. Tried to allocate {cuda_size(facts.segment_bytes)}. GPU 0 has a total capacity of "
        f"{cuda_size(facts.capacity_bytes)} of which {cuda_size(facts.free_bytes)} is free. Including non-PyTorch memory, "
        f"this process has {cuda_size(facts.outside_bytes + facts.reserved_bytes)} memory in use. {allowed}"
        f"Of the allocated memory {cuda_size(facts.allocated_bytes)} is allocated by PyTorch, and "
        f"{cuda_size(facts.reserved_bytes - facts.allocated_bytes)} is reserved by PyTorch but unallocated. "
        "If reserved but unallocated memory is large try setting PYTORCH_CUDA_ALLOC_CONF=expandable_segments:True to avoid "
        "fragmentation.  See documentation for Memory Management  (https://docs.pytorch.org/docs/stable/notes/cuda.html"
        "#optimizing-memory-usage-with-pytorch-cuda-alloc-conf)"
    )
