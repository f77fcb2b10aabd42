"""How the simulated allocator gets memory from the device and gives it back: segments, or pages of expandable ranges.

An expandable range is one stretch of addresses for a stream and a pool, an eighth larger than the device; pages of 2 MiB
(small) or ``large_segment_bytes`` (large) are mapped into it at the lowest addresses where a request fits.
"""

from __future__ import annotations

from collections import deque
from typing import NamedTuple

from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.allocator_state import AllocatorStatistics, Block, ExpandableRange, Pool
from oomless.units import MiB

SMALL_REQUEST = MiB
SMALL_SEGMENT = 2 * MiB
LARGE_REQUEST = 10 * MiB
LARGE_ROUNDING = 2 * MiB
_FIRST_ADDRESS = 0x7F00_0000_0000


class TraceEvent(NamedTuple):
    """One entry of the history, as in a CUDA memory snapshot; of an ``oom``, ``address`` is the device's free bytes."""

    action: str
    address: int
    size_bytes: int
    stream: int
    time_us: int
    note: object
    category: str | None


class DeviceMemory:
    """The device as the allocator sees it, and what was got from it so far.

    The history, if it is kept, is in the order and the words of a CUDA memory snapshot.
    """

    def __init__(
        self, capacity_bytes: int, settings: AllocatorSettings, outside_bytes: int, history: deque[TraceEvent] | None
    ) -> None:
        self.capacity_bytes = capacity_bytes
        self.outside_bytes = outside_bytes
        self.settings = settings
        self.history = history
        self.statistics = AllocatorStatistics()
        self._usable_bytes = capacity_bytes
        self._clock_us = 0
        self._next_address = _FIRST_ADDRESS
        self._large_searches = 0

    def set_capacity(self, capacity_bytes: int) -> None:
        """Let another process take memory or give it back: what is held stays, the next growth may fail.

        The GPU's total, which messages print and of which ``memory_fraction`` is a share, only ever rises.
        """
        self._usable_bytes = capacity_bytes
        self.capacity_bytes = max(self.capacity_bytes, capacity_bytes)

    @property
    def free_bytes(self) -> int:
        """What the device has left, as ``cudaMemGetInfo`` reports it."""
        return max(0, self._usable_bytes - self.outside_bytes - self.statistics.reserved.current)

    def segment_size(self, size_bytes: int) -> int:
        """Return the size of the segment that is made for a request already rounded."""
        if size_bytes <= SMALL_REQUEST:
            return SMALL_SEGMENT
        if size_bytes < LARGE_REQUEST:
            return self.settings.large_segment_bytes
        return round_up(size_bytes, LARGE_ROUNDING)

    @property
    def allowed_bytes(self) -> int | None:
        """What ``memory_fraction`` lets the allocator hold; None: no such limit."""
        fraction = self.settings.memory_fraction
        return int(fraction * self.capacity_bytes) if fraction < 1 else None

    # Segments

    def _from_device(self, pool: Pool, size: int, note: object) -> Block | None:
        segment_bytes, allowed = self.segment_size(size), self.allowed_bytes
        if allowed is not None and self.statistics.reserved.current + segment_bytes > allowed:
            return None
        if self.settings.expandable_segments:
            return self._from_range(pool, size, note)
        if segment_bytes > self.free_bytes:
            return None
        block = Block(self._place(segment_bytes), segment_bytes, pool)
        books = self.statistics
        books.segments.increase(1)
        books.reserved.increase(segment_bytes)
        books.num_device_alloc += 1
        if self.settings.max_split_size_bytes is not None and segment_bytes >= self.settings.max_split_size_bytes:
            books.oversize_segments.increase(1)
        self._record("segment_alloc", block.address, segment_bytes, pool.stream, note)
        return block

    def _place(self, size_bytes: int) -> int:
        """Return an address for a new segment, above all before it."""
        address = self._next_address
        self._next_address += round_up(size_bytes, LARGE_ROUNDING)
        return address

    def _release(self, block: Block) -> None:
        """Give the segment that a free ``block`` fills back to the device."""
        books, size = self.statistics, block.size_bytes
        self._record("segment_free", block.address, size, block.pool.stream)
        block.pool.remove(block)
        books.num_device_free += 1
        books.segments.change(-1)
        books.reserved.change(-size)
        if self.settings.max_split_size_bytes is not None and size >= self.settings.max_split_size_bytes:
            books.oversize_segments.change(-1)

    # Expandable ranges

    def _from_range(self, pool: Pool, size: int, note: object) -> Block | None:
        """Map pages at the lowest address where ``size`` fits; None where memory runs out (pages mapped so far stay)."""
        block = self._lowest_fit(pool, size)
        if not block.mapped and not self._map(block, min(block.size_bytes, size), note):
            return None
        while block.size_bytes < size:
            behind = block.next
            assert behind is not None
            if not self._map(behind, min(size - block.size_bytes, behind.size_bytes), note):
                return None
            block = behind  # it has taken in the mapped block before it
        pool.remove(block)
        return block

    def _lowest_fit(self, pool: Pool, size: int) -> Block:
        for _, unmapped in pool.unmapped:
            before = unmapped.previous
            start = before if before is not None and before.is_free else unmapped
            room, block = 0, start
            while room < size:
                room += block.size_bytes
                following = block.next
                if following is None or not following.is_free:
                    break
                block = following
            if room >= size:
                return start
        page = SMALL_SEGMENT if pool.small else self.settings.large_segment_bytes
        # Room for an eighth more than the device has, so that pages freed at the front can be used again at the end.
        length = round_up(self.capacity_bytes + self.capacity_bytes // 8, page)
        addresses = ExpandableRange(self._place(length), length, page)
        block = Block(addresses.address, length, pool, addresses)
        block.mapped = False
        pool.insert_unmapped(block)
        return block

    def _map(self, block: Block, size: int, note: object) -> bool:
        """Back the first ``size`` bytes of an unmapped ``block`` with whole pages and merge it with mapped neighbours."""
        assert block.range is not None
        mapped = round_up(size, block.range.page_bytes)
        if mapped > self.free_bytes:
            return False
        pool = block.pool
        pool.remove_unmapped(block)
        if mapped < block.size_bytes:
            pool.insert_unmapped(block.cut(mapped))
        block.mapped = True
        self._record("segment_map", block.address, mapped, pool.stream, note)
        block.absorb(block.previous)
        block.absorb(block.next)
        block.age_base = self._large_searches
        pool.insert(block)
        self.statistics.reserved.increase(mapped)
        self.statistics.num_device_alloc += 1
        return True

    def _unmap(self, block: Block) -> None:
        """Give the whole pages of a free ``block`` back; what is left of it at either end stays mapped."""
        assert block.range is not None
        page, base, pool = block.range.page_bytes, block.range.address, block.pool
        begin = base + round_up(block.address - base, page)
        end = base + (block.address - base + block.size_bytes) // page * page
        if begin >= end:
            return
        pool.remove(block)
        if begin > block.address:
            pages = block.cut(begin - block.address)
            block.age_base = self._large_searches
            pool.insert(block)
            block = pages
        if block.size_bytes > end - begin:
            rest = block.cut(end - begin)
            rest.age_base = self._large_searches
            pool.insert(rest)
        block.mapped = False
        block.absorb(block.previous)
        block.absorb(block.next)
        if block.is_split:
            pool.insert_unmapped(block)  # a range of which nothing is mapped any more goes back altogether
        self.statistics.reserved.change(begin - end)
        self.statistics.num_device_free += 1
        self._record("segment_unmap", begin, end - begin, pool.stream)

    def _record(
        self,
        action: str,
        address: int,
        size_bytes: int,
        stream: int,
        note: object = None,
        category: str | None = None,
    ) -> None:
        if self.history is not None:
            self._clock_us += 1
            self.history.append(TraceEvent(action, address, size_bytes, stream, self._clock_us, note, category))


def round_up(size_bytes: int, step: int) -> int:
    """Return the first multiple of ``step`` that is not below ``size_bytes``."""
    return -(-size_bytes // step) * step
