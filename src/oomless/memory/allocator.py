"""PyTorch's CUDA caching allocator, simulated byte for byte.

The rules are those of ``CUDACachingAllocator.cpp`` in torch 2.11 to 2.13; ``docs/allocator.md`` states each with what it
does not cover. A *segment* is what the allocator gets from the device, a *block* is a part of it. Blocks of a segment form
a chain in address order; free ones also stand in their pool, sorted by size and then address, where best fit finds them.

With expandable segments a segment is a range of addresses larger than the device. Its blocks are mapped (backed by
memory, in whole pages) or not; growing maps the pages behind the last block.
"""

from __future__ import annotations

from bisect import bisect_left, insort
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch

from oomless.memory.allocator_settings import INTERVALS, AllocatorSettings
from oomless.units import GiB, KiB, MiB

SMALLEST_BLOCK = 512
SMALL_REQUEST = MiB
SMALL_SEGMENT = 2 * MiB
LARGE_REQUEST = 10 * MiB
LARGE_ROUNDING = 2 * MiB
UNSPLIT_SLACK = 20 * MiB
_ADDRESS_STEP = 1 << 41


@dataclass(slots=True, eq=False)
class Block:
    """A part of a segment; ``allocated``, or free in its pool, or not backed by memory (``mapped`` is False)."""

    address: int
    size_bytes: int
    pool: Pool
    segment: Segment
    requested_bytes: int = 0
    allocated: bool = False
    mapped: bool = True
    previous: Block | None = None
    next: Block | None = None
    free_calls_at_insert: int = 0
    note: object = None

    @property
    def is_split(self) -> bool:
        """Whether the segment has other blocks."""
        return self.previous is not None or self.next is not None


@dataclass(slots=True, eq=False)
class Segment:
    """What was got from the device at once, or an expandable range of addresses."""

    address: int
    size_bytes: int
    first: Block | None = None
    expandable: bool = False

    def blocks(self) -> Iterator[Block]:
        """Yield the blocks in address order."""
        block = self.first
        while block is not None:
            yield block
            block = block.next


@dataclass(slots=True, eq=False)
class Pool:
    """The free blocks of one stream and one kind, small or large."""

    small: bool
    stream: int
    free: list[tuple[int, int, Block]] = field(default_factory=list)
    unmapped: list[tuple[int, Block]] = field(default_factory=list)
    free_calls: int = 0


@dataclass(slots=True)
class AllocatorStatistics:
    """What is held, in bytes, kept up to date; peaks are those since ``reset_peak``."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    requested_bytes: int = 0
    inactive_split_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0
    peak_requested_bytes: int = 0
    peak_inactive_split_bytes: int = 0
    total_allocated_bytes: int = 0
    total_freed_bytes: int = 0
    allocations: int = 0
    retries: int = 0
    out_of_memory_errors: int = 0

    def note_peaks(self) -> None:
        """Raise the peaks to what is held now."""
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        self.peak_reserved_bytes = max(self.peak_reserved_bytes, self.reserved_bytes)
        self.peak_requested_bytes = max(self.peak_requested_bytes, self.requested_bytes)
        self.peak_inactive_split_bytes = max(self.peak_inactive_split_bytes, self.inactive_split_bytes)


class CachingAllocator:
    """The allocator of one GPU with ``capacity_bytes``, of which ``outside_bytes`` are taken outside of it."""

    def __init__(self, capacity_bytes: int, settings: AllocatorSettings | None = None, outside_bytes: int = 0) -> None:
        self.capacity_bytes = capacity_bytes
        self.outside_bytes = outside_bytes
        self.settings = settings or AllocatorSettings()
        self.statistics = AllocatorStatistics()
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._segments: dict[int, Segment] = {}
        self._next_address = _ADDRESS_STEP

    # Asking and giving back

    def allocate(self, size_bytes: int, *, stream: int = 0, note: object = None) -> Block:
        """Return a block of at least ``size_bytes``; ``note`` is kept in it.

        Raises:
            torch.OutOfMemoryError: the device is full, in CUDA's own words.
        """
        size = self.round_size(size_bytes)
        pool = self._pool(stream, size <= SMALL_REQUEST)
        block = self._best_fit(pool, size)
        if block is None:
            block = self._grow(pool, size)
        if block is None:
            self.statistics.out_of_memory_errors += 1
            raise torch.OutOfMemoryError(self.out_of_memory_message(size_bytes))
        if self._should_split(block, size):
            self._split(block, size)
        block.allocated, block.requested_bytes, block.note = True, size_bytes, note
        held = self.statistics
        held.allocations += 1
        held.allocated_bytes += block.size_bytes
        held.total_allocated_bytes += block.size_bytes
        held.requested_bytes += size_bytes
        held.note_peaks()
        return block

    def free(self, block: Block) -> None:
        """Give ``block`` back to its pool, merged with free neighbours."""
        assert block.allocated, "a block is freed once"
        held = self.statistics
        held.allocated_bytes -= block.size_bytes
        held.total_freed_bytes += block.size_bytes
        held.requested_bytes -= block.requested_bytes
        block.allocated, block.requested_bytes, block.note = False, 0, None
        self._insert(self._merged(block))
        held.note_peaks()

    def empty_cache(self) -> None:
        """Give every segment without an allocated block back to the device; of expandable ones, every free page."""
        for pool in self._pools.values():
            for _, _, block in list(pool.free):
                if block.segment.expandable:
                    self._unmap(block)
                elif not block.is_split:
                    self._release(block)

    def set_capacity(self, capacity_bytes: int) -> None:
        """Change the capacity, as when another process takes memory; what is held stays, growing may fail."""
        self.capacity_bytes = capacity_bytes

    def reset_peak(self) -> None:
        """Set the peaks to what is held now."""
        held = self.statistics
        held.peak_allocated_bytes = held.peak_reserved_bytes = held.peak_requested_bytes = 0
        held.peak_inactive_split_bytes = 0
        held.note_peaks()

    def segments(self) -> list[Segment]:
        """Return the segments in address order."""
        return [self._segments[address] for address in sorted(self._segments)]

    # Sizes

    def round_size(self, size_bytes: int) -> int:
        """Return what a request of ``size_bytes`` is rounded up to."""
        if size_bytes < SMALLEST_BLOCK:
            return SMALLEST_BLOCK
        interval = min(max(0, size_bytes.bit_length() - 21), INTERVALS - 1)
        divisions = self.settings.roundup_power2_divisions[interval]
        if divisions > 1 and size_bytes > SMALLEST_BLOCK * divisions:
            floor = 1 << (size_bytes.bit_length() - 1)
            return size_bytes if size_bytes == floor else _up(size_bytes, max(1, floor // divisions))
        return _up(size_bytes, SMALLEST_BLOCK)

    def segment_size(self, size: int) -> int:
        """Return the size of the segment that is made for a rounded request."""
        if size <= SMALL_REQUEST:
            return SMALL_SEGMENT
        if size < LARGE_REQUEST:
            return self.settings.large_segment_bytes
        return _up(size, LARGE_ROUNDING)

    @property
    def _limit_bytes(self) -> int:
        limit = self.capacity_bytes - self.outside_bytes
        fraction = self.settings.memory_fraction
        return limit if fraction is None else min(limit, int(fraction * self.capacity_bytes))

    # Finding a block

    def _pool(self, stream: int, small: bool) -> Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool(small, stream)
        return pool

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        pool.free_calls += 1
        place = bisect_left(pool.free, (size, 0))
        if place == len(pool.free):
            return None
        if self.settings.expandable_segments:
            # A block that can still grow counts as large as it can become, so that small holes are used first.
            while place + 1 < len(pool.free) and _growable(pool.free[place + 1][2]) < _growable(pool.free[place][2]):
                place += 1
        block = pool.free[place][2]
        largest = self.settings.max_split_size_bytes
        if largest is not None:
            if size < largest <= block.size_bytes:
                return None
            if size >= largest and block.size_bytes >= size + UNSPLIT_SLACK:
                return None
        self._remove(block)
        return block

    def _should_split(self, block: Block, size: int) -> bool:
        remaining = block.size_bytes - size
        if block.pool.small or self.settings.expandable_segments:
            return remaining >= SMALLEST_BLOCK
        largest = self.settings.max_split_size_bytes
        return (largest is None or size < largest) and remaining > SMALL_REQUEST

    def _split(self, block: Block, size: int) -> None:
        """Cut ``block`` to ``size`` and put the rest into the pool."""
        self._insert(self._cut(block, size))

    @staticmethod
    def _cut(block: Block, size: int) -> Block:
        """Cut ``block`` to ``size`` and return the rest, linked behind it."""
        rest = Block(block.address + size, block.size_bytes - size, block.pool, block.segment, mapped=block.mapped)
        rest.previous, rest.next, block.next = block, block.next, rest
        if rest.next is not None:
            rest.next.previous = rest
        block.size_bytes = size
        return rest

    # Growing

    def _grow(self, pool: Pool, size: int) -> Block | None:
        if self.settings.garbage_collection_threshold and self.settings.memory_fraction is not None:
            self._collect_garbage()
        block = self._from_device(pool, size)
        if block is None and self._release_oversize(pool, size):
            block = self._from_device(pool, size)
        if block is None:
            self.empty_cache()
            self.statistics.retries += 1
            block = self._from_device(pool, size)
        return block

    def _from_device(self, pool: Pool, size: int) -> Block | None:
        if self.settings.expandable_segments:
            return self._from_expandable(pool, size)
        segment_bytes = self.segment_size(size)
        if self.statistics.reserved_bytes + segment_bytes > self._limit_bytes:
            return None
        segment = self._new_segment(segment_bytes, expandable=False)
        segment.first = Block(segment.address, segment_bytes, pool, segment)
        self.statistics.reserved_bytes += segment_bytes
        return segment.first

    def _new_segment(self, size_bytes: int, *, expandable: bool) -> Segment:
        segment = Segment(self._next_address, size_bytes, expandable=expandable)
        self._next_address += _up(size_bytes, LARGE_ROUNDING)
        self._segments[segment.address] = segment
        return segment

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give unsplit blocks of at least the largest splittable size back until ``size`` is; whether that was enough."""
        largest = self.settings.max_split_size_bytes
        if largest is None:
            return False
        wanted = max(size, largest)
        place = bisect_left(pool.free, (wanted, 0))
        if place < len(pool.free):
            if not pool.free[place][2].segment.expandable:
                self._release(pool.free[place][2])
            return True
        released = 0
        while released < wanted and pool.free and pool.free[-1][0] >= largest:
            block = pool.free[-1][2]
            released += block.size_bytes
            self._release(block)
        return released >= wanted

    def _release(self, block: Block) -> None:
        """Give the segment that ``block`` fills back to the device."""
        self._remove(block)
        del self._segments[block.segment.address]
        self.statistics.reserved_bytes -= block.size_bytes

    def _collect_garbage(self) -> None:
        """Give back the large blocks that were passed over longest, until the held memory is below the threshold."""
        threshold = int(self.settings.garbage_collection_threshold * self._limit_bytes)
        wanted = self.statistics.reserved_bytes - threshold
        ages = {
            block: pool.free_calls - block.free_calls_at_insert
            for pool in self._pools.values()
            if not pool.small
            for _, _, block in pool.free
            if not block.is_split and not block.segment.expandable
        }
        freed = True
        while wanted > 0 and freed and ages:
            average = sum(ages.values()) / len(ages)
            old = [block for block, age in ages.items() if age >= average]
            freed = bool(old)
            for block in old:
                wanted -= block.size_bytes
                del ages[block]
                self._release(block)

    # Expandable segments

    def _page(self, pool: Pool) -> int:
        return SMALL_SEGMENT if pool.small else self.settings.large_segment_bytes

    def _from_expandable(self, pool: Pool, size: int) -> Block | None:
        """Map pages behind the lowest free block that has addresses enough; ``None`` where memory does not reach."""
        block = self._expandable_candidate(pool, size)
        if not block.mapped and not self._map(block, min(block.size_bytes, size)):
            return None
        while block.size_bytes < size:
            behind = block.next
            assert behind is not None
            if not self._map(behind, min(size - block.size_bytes, behind.size_bytes)):
                return None
            block = behind  # which has taken in the mapped block before it
        self._remove(block)
        return block

    def _expandable_candidate(self, pool: Pool, size: int) -> Block:
        for _, block in pool.unmapped:
            before = block.previous
            start = before if before is not None and not before.allocated else block
            room, following = 0, start
            while following is not None and not following.allocated and room < size:
                room += following.size_bytes
                following = following.next  # type: ignore[assignment]
            if room >= size:
                return start
        segment = self._new_segment(_up(self.capacity_bytes * 9 // 8 + size, self._page(pool)), expandable=True)
        segment.first = Block(segment.address, segment.size_bytes, pool, segment, mapped=False)
        insort(pool.unmapped, (segment.address, segment.first), key=lambda entry: entry[0])
        return segment.first

    def _map(self, block: Block, size: int) -> bool:
        """Back the first ``size`` bytes of ``block``, in whole pages, and merge it with its mapped neighbours."""
        page, base = self._page(block.pool), block.segment.address
        mapped = base + _up(block.address - base + size, page) - block.address
        mapped = min(mapped, block.size_bytes)
        if self.statistics.reserved_bytes + mapped > self._limit_bytes:
            return False
        self.statistics.reserved_bytes += mapped
        block.pool.unmapped.remove((block.address, block))
        if mapped < block.size_bytes:
            rest = self._cut(block, mapped)
            insort(block.pool.unmapped, (rest.address, rest), key=lambda entry: entry[0])
        block.mapped = True
        self._insert(self._merged(block))
        return True

    def _unmap(self, block: Block) -> None:
        """Give the whole pages of a free ``block`` back; what is left of it at either end stays mapped."""
        page, base = self._page(block.pool), block.segment.address
        begin = base + _up(block.address - base, page)
        end = base + (block.address + block.size_bytes - base) // page * page
        if begin >= end:
            return
        self._remove(block)
        if end < block.address + block.size_bytes:
            self._insert(self._cut(block, end - block.address))
        if begin > block.address:
            rest = self._cut(block, begin - block.address)
            self._insert(block)
            block = rest
        self.statistics.reserved_bytes -= block.size_bytes
        block.mapped = False
        block = self._merged(block)
        insort(block.pool.unmapped, (block.address, block), key=lambda entry: entry[0])

    # Chains and pools

    def _merged(self, block: Block) -> Block:
        """Merge ``block`` with free neighbours that are mapped as it is; they leave their pools."""
        for neighbour in (block.previous, block.next):
            if neighbour is None or neighbour.allocated or neighbour.mapped != block.mapped:
                continue
            if neighbour.mapped:
                self._remove(neighbour)
            else:
                neighbour.pool.unmapped.remove((neighbour.address, neighbour))
            if neighbour is block.previous:
                block.address, block.previous = neighbour.address, neighbour.previous
                if block.previous is not None:
                    block.previous.next = block
                else:
                    block.segment.first = block
            else:
                block.next = neighbour.next
                if block.next is not None:
                    block.next.previous = block
            block.size_bytes += neighbour.size_bytes
        return block

    def _insert(self, block: Block) -> None:
        block.free_calls_at_insert = block.pool.free_calls
        insort(block.pool.free, (block.size_bytes, block.address, block), key=lambda entry: entry[:2])
        if block.is_split and not block.segment.expandable:
            self.statistics.inactive_split_bytes += block.size_bytes

    def _remove(self, block: Block) -> None:
        free = block.pool.free
        place = bisect_left(free, (block.size_bytes, block.address), key=lambda entry: entry[:2])
        assert free[place][2] is block
        del free[place]
        if block.is_split and not block.segment.expandable:
            self.statistics.inactive_split_bytes -= block.size_bytes

    # Words

    def out_of_memory_message(self, size_bytes: int) -> str:
        """Return CUDA's message for a failed request of ``size_bytes``, as torch 2.13 words it."""
        held = self.statistics
        size = self.round_size(size_bytes)
        asked = size if self.settings.expandable_segments else self.segment_size(size)
        free = max(0, self.capacity_bytes - self.outside_bytes - held.reserved_bytes)
        allowed = ""
        if self.settings.memory_fraction is not None:
            allowed = f"{cuda_size(int(self.settings.memory_fraction * self.capacity_bytes))} allowed; "
        return (
            f"CUDA out of memory. Tried to allocate {cuda_size(asked)}. GPU 0 has a total capacity of "
            f"{cuda_size(self.capacity_bytes)} of which {cuda_size(free)} is free. Including non-PyTorch memory, this process "
            f"has {cuda_size(self.outside_bytes + held.reserved_bytes)} memory in use. {allowed}Of the allocated memory "
            f"{cuda_size(held.allocated_bytes)} is allocated by PyTorch, and "
            f"{cuda_size(held.reserved_bytes - held.allocated_bytes)} is reserved by PyTorch but unallocated. If reserved but "
            "unallocated memory is large try setting PYTORCH_ALLOC_CONF=expandable_segments:True to avoid fragmentation.  "
            "See documentation for Memory Management  "
            "(https://pytorch.org/docs/stable/notes/cuda.html#environment-variables)"
        )


def cuda_size(size_bytes: int) -> str:
    """Return ``size_bytes`` as PyTorch's messages print it."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if size_bytes > unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} bytes"


def _up(size: int, step: int) -> int:
    return -(-size // step) * step


def _growable(block: Block) -> int:
    behind = block.next
    return block.size_bytes + (behind.size_bytes if behind is not None and not behind.mapped else 0)
