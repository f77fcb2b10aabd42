"""PyTorch's CUDA caching allocator, simulated byte for byte.

The rules are those of ``c10/cuda/CUDACachingAllocator.cpp`` in torch 2.11 to 2.13; ``docs/allocator.md`` states each of them
and what is not covered. A *segment* is what the allocator gets from the device at once, a *block* is a part of it. Blocks of
a segment form a chain in address order; free ones also stand in their pool, sorted by size and then address, where best fit
finds them. With expandable segments a segment is a range of addresses larger than the device, of which whole pages are
backed by memory or not.

Cost: a few microseconds for an allocation or a free, and a tuple of history for each if that is recorded. The alternative,
a formula for the peak of reserved memory, cannot know how a run's own order of sizes fragments it.
"""

from __future__ import annotations

from bisect import bisect_left
from collections import deque
from typing import TYPE_CHECKING

from oomless.memory.allocator_growth import SMALL_REQUEST, DeviceMemory, TraceEvent, round_up
from oomless.memory.allocator_settings import INTERVALS, AllocatorSettings
from oomless.memory.allocator_state import (
    Block,
    BlockView,
    OomFacts,
    Pool,
    SegmentView,
    cuda_size,
    out_of_memory_message,
)

if TYPE_CHECKING:
    import torch

SMALLEST_BLOCK = 512
LARGEST_REQUEST = 1 << 60


class CachingAllocator(DeviceMemory):
    """The caching allocator of one GPU.

    Args:
        capacity_bytes: the GPU's total memory.
        settings: default: PyTorch's defaults.
        outside_bytes: of the capacity, what this process holds outside the allocator (context, libraries).
        record_history: keep every event in ``history``.
        history_limit: keep only this many of the latest events; None: all.
    """

    def __init__(
        self,
        capacity_bytes: int,
        settings: AllocatorSettings | None = None,
        outside_bytes: int = 0,
        *,
        record_history: bool = False,
        history_limit: int | None = None,
    ) -> None:
        history: deque[TraceEvent] | None = deque(maxlen=history_limit) if record_history else None
        settings = settings or AllocatorSettings()
        super().__init__(capacity_bytes, settings, outside_bytes, history)
        self._pools: dict[tuple[int, bool], Pool] = {}
        self._active: dict[int, Block] = {}
        self._waiting: dict[int, Block] = {}
        # What every call asks of the settings.
        self._expandable = settings.expandable_segments
        self._divisions = settings.roundup_power2_divisions if max(settings.roundup_power2_divisions) > 1 else None
        self._max_split = settings.max_split_size_bytes
        self._slack = settings.max_non_split_rounding_bytes or settings.large_segment_bytes
        self._collects_garbage = settings.garbage_collection_threshold > 0 and settings.memory_fraction < 1

    # Asking and giving back

    def allocate(self, size_bytes: int, *, stream: int = 0, note: object = None, category: str | None = None) -> Block:
        """Return a block of at least ``size_bytes``; ``note`` and ``category`` stay with it and go into the history.

        A request of 0 bytes gets a block of 0 bytes, which is booked nowhere.

        Raises:
            ValueError: ``size_bytes`` is negative.
            torch.OutOfMemoryError: the device is full, in CUDA's own words, with ``OomFacts`` as its ``oom_facts``.
        """
        if size_bytes <= 0:
            if size_bytes < 0:
                raise ValueError(f"a block has 0 bytes or more; got {size_bytes}")
            block = Block(0, 0, self._pool(stream, True))
            block.allocated = True
            return block
        if size_bytes >= LARGEST_REQUEST:
            raise _error("CUDA out of memory. Tried to allocate more than 1EB memory.")
        size = self.round_size(size_bytes)
        pool = self._pool(stream, size <= SMALL_REQUEST)
        found = self._best_fit(pool, size) or self._grow(pool, size, size_bytes, note)
        block = self._carve(found, size)
        block.allocated = True
        block.requested_bytes = size_bytes
        block.note = note
        block.category = category
        self._active[block.address] = block
        if self.history is not None:
            self._record("alloc", block.address, size_bytes, stream, note, category)
        books = self.statistics
        size = block.size_bytes
        books.allocations.increase(1)
        books.allocated.increase(size)
        books.active_blocks.increase(1)
        books.active.increase(size)
        books.requested.increase(size_bytes)
        if self._max_split is not None and size >= self._max_split:
            books.oversize_allocations.increase(1)
        return block

    def free(self, block: Block) -> None:
        """Give ``block`` back; one that ``record_stream`` marked stays active until ``synchronize``.

        Raises:
            ValueError: it is not in use.
        """
        if not block.allocated:
            raise ValueError(f"a block is freed once; the one at {block.address:#x} is not in use")
        if block.size_bytes == 0:
            block.allocated = False
            return
        self._request_free(block)
        if block.streams is None:
            self._complete_free(block)
        else:
            self._waiting[block.address] = block

    def record_stream(self, block: Block, stream: int) -> None:
        """Say that work on ``stream`` uses ``block`` too, as ``Tensor.record_stream`` does."""
        if stream != block.pool.stream and block.size_bytes:
            block.streams = (block.streams or set()) | {stream}

    def synchronize(self) -> None:
        """Let the work on all streams end, so that blocks that waited for it are free."""
        while self._waiting:
            _, block = self._waiting.popitem()
            self._complete_free(block)

    def empty_cache(self) -> None:
        """Give back every segment without a block in use; of expandable ones, every page that is free."""
        self.statistics.num_sync_all_streams += 1
        self.synchronize()
        for pool in sorted(self._pools.values(), key=lambda pool: (pool.small, pool.stream)):
            for _, _, block in list(pool.free):
                if block.range is not None:
                    self._unmap(block)
                elif not block.is_split:
                    self._release(block)

    def reset_peak(self) -> None:
        """Set the peaks of ``statistics`` to what is held now."""
        self.statistics.reset_peak()

    def segments(self) -> tuple[SegmentView, ...]:
        """Return the segments in address order; of an expandable range, each mapped stretch is one."""
        blocks = [*self._active.values(), *(block for pool in self._pools.values() for _, _, block in pool.free)]
        heads = [block for block in blocks if block.previous is None or not block.previous.mapped]
        return tuple(_view(head) for head in sorted(heads, key=lambda head: head.address))

    # Sizes

    def round_size(self, size_bytes: int) -> int:
        """Return what a request of ``size_bytes``, 1 or more, is rounded up to."""
        if self._divisions is not None:
            power = size_bytes.bit_length() - 1
            divisions = self._divisions[min(max(0, power - 20), INTERVALS - 1)]
            if divisions > 1 and size_bytes > SMALLEST_BLOCK * divisions:
                return round_up(size_bytes, (1 << power) // divisions)
        return (size_bytes + SMALLEST_BLOCK - 1) & -SMALLEST_BLOCK

    # Finding a block

    def _pool(self, stream: int, small: bool) -> Pool:
        pool = self._pools.get((stream, small))
        if pool is None:
            pool = self._pools[stream, small] = Pool(stream, small)
        return pool

    def _best_fit(self, pool: Pool, size: int) -> Block | None:
        """Take the smallest free block that is large enough out of ``pool``, at the lowest address among equals."""
        if self._collects_garbage and not pool.small:
            self._large_searches += 1
        free = pool.free
        place = bisect_left(free, (size,))
        if place == len(free):
            return None
        if self._expandable:
            # A block counts as large as it can grow, so that holes are filled before the end of the range is used.
            while place + 1 < len(free) and free[place + 1][2].growable_bytes < free[place][2].growable_bytes:
                place += 1
        block = free[place][2]
        limit = self._max_split
        if limit is not None:
            if size < limit <= block.size_bytes:
                return None
            if size >= limit and block.size_bytes >= size + self._slack:
                return None
        del free[place]
        return block

    def _carve(self, block: Block, size: int) -> Block:
        """Cut ``size`` off a block taken from its pool if the rules allow, and put the rest into the pool."""
        books, rest_bytes = self.statistics, block.size_bytes - size
        was_split = block.is_split
        if block.pool.small or self._expandable:
            cuts = rest_bytes >= SMALLEST_BLOCK
        else:
            cuts = rest_bytes > SMALL_REQUEST and (self._max_split is None or size < self._max_split)
        if cuts:
            rest = block.cut(size)
            rest.age_base = self._large_searches
            block.pool.insert(rest)
            if block.range is None:
                if was_split:
                    books.inactive_split.change(-size)
                else:
                    books.inactive_split.increase(rest_bytes)
                    books.inactive_split_blocks.increase(1)
        elif was_split and block.range is None:
            books.inactive_split.change(-block.size_bytes)
            books.inactive_split_blocks.change(-1)
        return block

    def _request_free(self, block: Block) -> None:
        block.allocated = False
        block.pending = True
        books = self.statistics
        books.allocations.current -= 1
        books.allocated.current -= block.size_bytes
        if self._max_split is not None and block.size_bytes >= self._max_split:
            books.oversize_allocations.change(-1)
        if self.history is not None:
            self._record(
                "free_requested", block.address, block.requested_bytes, block.pool.stream, block.note, block.category
            )

    def _complete_free(self, block: Block) -> None:
        """Put ``block`` into its pool, merged with free neighbours."""
        if self.history is not None:
            self._record(
                "free_completed", block.address, block.requested_bytes, block.pool.stream, block.note, block.category
            )
        books, size = self.statistics, block.size_bytes
        del self._active[block.address]
        books.active_blocks.current -= 1
        books.active.current -= size
        books.requested.current -= block.requested_bytes
        block.pending = False
        block.streams = block.note = block.category = None
        block.requested_bytes = 0
        split_blocks = split_bytes = 0
        for neighbour in (block.previous, block.next):
            if neighbour is not None and (absorbed := block.absorb(neighbour)):
                split_blocks -= 1
                split_bytes -= absorbed
        block.age_base = self._large_searches
        block.pool.insert(block)
        if block.range is None:
            if block.previous is not None or block.next is not None:
                split_blocks += 1
                split_bytes += block.size_bytes
            books.inactive_split_blocks.change(split_blocks)
            books.inactive_split.change(split_bytes)

    # Growing

    def _grow(self, pool: Pool, size: int, requested_bytes: int, note: object) -> Block:
        """Get a block from the device, freeing cached memory where that is needed."""
        if self._collects_garbage:
            self._collect_garbage()
        block = self._from_device(pool, size, note)
        segment_bytes = self.segment_size(size)
        if block is None and self.settings.refuse_early and self._refuses(segment_bytes):
            self.statistics.num_oom_rejections += 1
            raise self._out_of_memory(pool, size, requested_bytes, note, refused=True)
        if block is None and self._release_oversize(pool, size):
            block = self._from_device(pool, size, note)
        if block is None:
            self.empty_cache()
            self.statistics.num_alloc_retries += 1
            block = self._from_device(pool, size, note)
        if block is None:
            raise self._out_of_memory(pool, size, requested_bytes, note, refused=False)
        return block

    def _refuses(self, segment_bytes: int) -> bool:
        # A fraction below 1 is an ordinary limit, which is looked at first.
        return self.allowed_bytes is None and self.statistics.reserved.current + segment_bytes > self.capacity_bytes

    def _release_oversize(self, pool: Pool, size: int) -> bool:
        """Give back one cached oversize block that is large enough, or several, the largest first, until they are."""
        limit = self._max_split
        if limit is None:
            return False
        place = bisect_left(pool.free, (size,))  # whatever stands from here on is oversize, or best fit had taken it
        if place < len(pool.free) and pool.free[place][2].range is None:
            self._release(pool.free[place][2])
            return True
        released = 0
        for length, _, block in reversed(pool.free[:place]):
            if released >= size or length < limit:
                break
            if block.range is None:
                released += length
                self._release(block)
        return released >= size

    def _collect_garbage(self) -> None:
        """Give back the large blocks that searches passed over most often, until less than the threshold is held."""
        allowed = self.allowed_bytes
        assert allowed is not None
        held = self.statistics.reserved
        threshold = int(self.settings.garbage_collection_threshold * allowed)
        target = held.current - threshold
        cached = [
            block
            for _, pool in sorted(self._pools.items())
            if not pool.small
            for _, _, block in pool.free
            if not block.is_split and block.range is None
        ]
        while target > 0 and cached:
            ages = [self._large_searches - block.age_base for block in cached]
            average = sum(ages) / len(ages)
            # The oldest is never younger than the average, so each round gives something back.
            for block, age in zip(cached, ages, strict=True):
                if age >= average:
                    target -= block.size_bytes
                    self._release(block)
            cached = [block for block, age in zip(cached, ages, strict=True) if age < average]

    # Words

    def _out_of_memory(
        self, pool: Pool, size: int, requested_bytes: int, note: object, *, refused: bool
    ) -> torch.OutOfMemoryError:
        books = self.statistics
        facts = OomFacts(
            requested_bytes=requested_bytes,
            segment_bytes=self.segment_size(size),
            capacity_bytes=self.capacity_bytes,
            free_bytes=self.free_bytes,
            allocated_bytes=books.allocated.current,
            reserved_bytes=books.reserved.current,
            outside_bytes=self.outside_bytes,
            note=note,
        )
        if refused:
            message = (
                "CUDA out of memory. Allocation was preemptively rejected because it would exceed "
                f"per_process_memory_fraction limit. Requested size: {cuda_size(requested_bytes)}"
            )
        else:
            books.num_ooms += 1
            self._record("oom", facts.free_bytes, size, pool.stream, note)
            message = out_of_memory_message(facts, self.allowed_bytes)
        error = _error(message)
        error.oom_facts = facts  # type: ignore[attr-defined]
        return error


def _error(message: str) -> torch.OutOfMemoryError:
    import torch  # here, as the rules of sizes are asked where nothing else needs torch

    return torch.OutOfMemoryError(message)


def oom_facts(error: torch.OutOfMemoryError) -> OomFacts | None:
    """Return what a simulated out-of-memory error was about; None for one that CUDA raised."""
    return getattr(error, "oom_facts", None)


def _view(head: Block) -> SegmentView:
    blocks = []
    block: Block | None = head
    while block is not None and block.mapped:
        blocks.append(
            BlockView(
                address=block.address,
                size_bytes=block.size_bytes,
                requested_bytes=block.requested_bytes,
                state="active_allocated" if block.allocated else "active_pending_free" if block.pending else "inactive",
                note=block.note,
                category=block.category,
            )
        )
        block = block.next
    return SegmentView(
        address=head.address,
        stream=head.pool.stream,
        is_large=not head.pool.small,
        is_expandable=head.range is not None,
        blocks=tuple(blocks),
    )
