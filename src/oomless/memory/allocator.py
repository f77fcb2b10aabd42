"""A stand-in for the simulation of the CUDA caching allocator, which replaces this file when its branch is merged.

It has the interface that ``virtual_gpu.py`` uses, rounds to 512 bytes and knows a capacity; it has no pools, no
segments and no fragmentation.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from oomless.units import format_bytes


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorSettings:
    """The options of ``PYTORCH_CUDA_ALLOC_CONF``; none here."""


@dataclass(slots=True)
class Block:
    """Allocated memory, in rounded bytes."""

    size_bytes: int


@dataclass(slots=True)
class AllocatorStatistics:
    """What is held, in bytes; the object is kept up to date."""

    allocated_bytes: int = 0
    reserved_bytes: int = 0
    peak_allocated_bytes: int = 0
    peak_reserved_bytes: int = 0


class CachingAllocator:
    """Hands out bytes until ``capacity_bytes`` less ``outside_bytes`` are gone."""

    def __init__(self, capacity_bytes: int, settings: AllocatorSettings, outside_bytes: int = 0) -> None:
        self.capacity_bytes = capacity_bytes
        self.settings = settings
        self.outside_bytes = outside_bytes
        self.statistics = AllocatorStatistics()

    def allocate(self, size_bytes: int, *, stream: int = 0, note: object = None) -> Block:
        """Return a block of at least ``size_bytes``.

        Raises:
            torch.OutOfMemoryError: there is no room.
        """
        rounded_bytes = -(-size_bytes // 512) * 512
        held = self.statistics
        if held.allocated_bytes + rounded_bytes > self.capacity_bytes - self.outside_bytes:
            raise torch.OutOfMemoryError(f"CUDA out of memory. Tried to allocate {format_bytes(rounded_bytes)}.")
        held.allocated_bytes += rounded_bytes
        held.peak_allocated_bytes = max(held.peak_allocated_bytes, held.allocated_bytes)
        held.reserved_bytes = max(held.reserved_bytes, held.allocated_bytes)
        held.peak_reserved_bytes = max(held.peak_reserved_bytes, held.reserved_bytes)
        return Block(rounded_bytes)

    def free(self, block: Block) -> None:
        """Take ``block`` back."""
        self.statistics.allocated_bytes -= block.size_bytes

    def empty_cache(self) -> None:
        """Give back what is reserved but not allocated."""
        self.statistics.reserved_bytes = self.statistics.allocated_bytes

    def set_capacity(self, capacity_bytes: int) -> None:
        """Change the capacity."""
        self.capacity_bytes = capacity_bytes

    def reset_peak(self) -> None:
        """Forget the peaks."""
        self.statistics.peak_allocated_bytes = self.statistics.allocated_bytes
        self.statistics.peak_reserved_bytes = self.statistics.reserved_bytes
