"""``VirtualGPU``: a device of N bytes on which the real build and training code runs, without a GPU.

Tensors are plain CPU tensors or, with ``fake=True``, fake ones that hold nothing, so that a model of any
size fits. The tracker books their storages in a simulation of CUDA's caching allocator, which rounds,
caches, splits and fragments as the real one does and raises ``torch.OutOfMemoryError`` when the capacity is
reached. Host and device are both CPU memory here; only the books tell them apart, so everything that moves
between them has to go through ``put`` and ``fetch``, and what is made for the host has to be made inside
``host()``.

What it does not see: memory that a kernel takes for itself while it runs (the simulation books what operators
return, and of a few what ``ops.operators.SCRATCH`` says), and what lies outside the allocator, which is one number, ``outside_bytes``.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from itertools import chain, repeat
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import _get_current_dispatch_mode_stack

from oomless.memory.allocator import CachingAllocator
from oomless.memory.allocator_settings import AllocatorSettings
from oomless.memory.allocator_state import Block
from oomless.memory.device import Category, Device, MemoryUsage, Phase
from oomless.memory.fake_mode import QuickFakeMode
from oomless.memory.profile import MemoryProfile
from oomless.memory.recorder import Allocation, Recorder, Watcher
from oomless.memory.tracker import Ledger, StorageTracker
from oomless.memory.work import Work
from oomless.units import format_bytes


class _HostLedger:
    """Counts host memory, which has no end."""

    def __init__(self) -> None:
        self.allocated_bytes = 0
        self.peak_allocated_bytes = 0

    def allocate(self, size_bytes: int, operation: object) -> list[int]:
        self.allocated_bytes += size_bytes
        self.peak_allocated_bytes = max(self.peak_allocated_bytes, self.allocated_bytes)
        return [size_bytes]

    def free(self, allocation: list[int]) -> None:
        self.allocated_bytes -= allocation[0]


class _DeviceLedger:
    """Books in the simulated allocator, fails when told to, and keeps a record when there is a recorder."""

    def __init__(self, allocator: CachingAllocator, recorder: Recorder | None) -> None:
        self.allocator = allocator
        self.recorder = recorder
        self.allocation_count = 0
        self.failing_index: int | None = None

    def allocate(self, size_bytes: int, operation: object) -> Block | Allocation:
        index = self.allocation_count
        self.allocation_count += 1
        try:
            if index == self.failing_index:
                raise torch.OutOfMemoryError(
                    f"CUDA out of memory. Tried to allocate {format_bytes(size_bytes)}. "
                    f"(Allocation {index}, which VirtualGPU.fail_at was told to fail.)"
                )
            note = str(operation) if self.allocator.history is not None else None
            block = self.allocator.allocate(size_bytes, note=note)
        except torch.OutOfMemoryError:
            if self.recorder is not None:
                segment_bytes = self.allocator.segment_size(self.allocator.round_size(size_bytes))
                self.recorder.failed(size_bytes, segment_bytes, operation)
            raise
        return block if self.recorder is None else self.recorder.allocated(block, size_bytes, operation)

    def free(self, allocation: Block | Allocation) -> None:
        if isinstance(allocation, Allocation):
            assert self.recorder is not None
            assert allocation.block is not None
            self.allocator.free(allocation.block)
            self.recorder.freed(allocation)
        else:
            self.allocator.free(allocation)


Moment = tuple[int, int, int]


class _Row:
    """Stretches that were asked for one right after the other, with nothing between."""

    def __init__(self) -> None:
        self._calls: Counter[Any] = Counter()
        self._settled: set[Any] = set()
        self._end: Moment | None = None

    def leaves_out(self, key: Any, moment: Moment) -> bool:
        """Whether the stretch of ``key`` was asked for twice in this row, and has found all in the cache since it last grew."""
        return moment == self._end and self._calls[key] > 1 and key in self._settled

    def asked(self, key: Any, began: Moment, ended: Moment) -> None:
        """Note that the stretch of ``key``, which leaves nothing, was asked for."""
        if began != self._end:
            self._calls.clear()
            self._settled.clear()
        if began[1:] != ended[1:]:
            self._settled.clear()
        else:
            self._settled.add(key)
        self._calls[key] += 1
        self._end = ended


class VirtualGPU(Device):
    """A simulated GPU.

    Args:
        capacity_bytes: what the GPU has, ``outside_bytes`` included.
        name: shown in reports.
        settings: those of ``PYTORCH_CUDA_ALLOC_CONF``; default: PyTorch's defaults.
        outside_bytes: taken outside the caching allocator (CUDA context, libraries).
        compute_capability: of the GPU that is simulated, for those who choose kernels.
        record_history: keep every event, for ``profile``; about 200 bytes of host memory for each.
        snapshot_history: keep the allocator's own history as well, for ``snapshot.write_snapshot``.
        fake: run under ``FakeTensorMode``: sizes are true, values do not exist, nothing is allocated.
    """

    def __init__(
        self,
        capacity_bytes: int,
        *,
        name: str = "virtual GPU",
        settings: AllocatorSettings | None = None,
        outside_bytes: int = 0,
        compute_capability: tuple[int, int] = (8, 0),
        record_history: bool = False,
        snapshot_history: bool = False,
        fake: bool = False,
    ) -> None:
        self.name = name
        self.capacity_bytes: int = capacity_bytes
        self.outside_bytes = outside_bytes
        self.compute_capability = compute_capability
        self.allocator = CachingAllocator(
            capacity_bytes, settings or AllocatorSettings(), outside_bytes, record_history=snapshot_history
        )
        self._recorder = Recorder(self.allocator.statistics) if record_history else None
        self._ledger = self.ledger = _DeviceLedger(self.allocator, self._recorder)
        self._host_ledger = self.host_ledger = _HostLedger()
        self._tracker = StorageTracker(self._ledger)
        self.track_with(self._tracker)
        self._fake_mode = QuickFakeMode() if fake else None
        self._watcher: Watcher | None = None
        self._work_of: dict[Any, Any] = {}
        self._row = _Row()
        self.skim = False
        """Whether ``repeating`` may leave out what changes no peak."""

        self._workspaces: list[Tensor] = []

    def track_with(self, tracker: StorageTracker) -> None:
        """Let ``tracker`` do the books, before anything is in them."""
        self._tracker = tracker
        tracker.begin_phase = self._noted_phase

    @property
    def fake(self) -> bool:  # noqa: D102
        return self._fake_mode is not None

    # Where tensors lie.

    @contextmanager
    def active(self) -> Iterator[None]:
        """Book what is created inside, and enter the fake mode if this device has one; may be nested."""
        if self._is_active():
            yield
            return
        with ExitStack() as modes:
            if self._fake_mode is not None:
                modes.enter_context(self._fake_mode)
            modes.enter_context(self._tracker)
            yield

    @contextmanager
    def host(self) -> Iterator[None]:  # noqa: D102
        with self._booking_in(self._host_ledger):
            yield

    def put(self, tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
        """Return a copy of ``tensor`` in new device memory, whichever memory it lies in.

        Raises:
            RuntimeError: outside of ``active()``.
            torch.OutOfMemoryError: it does not fit.
        """
        self._require_active("put")
        with self._over_link(tensor), self._booking_in(self._ledger):
            return tensor.to(dtype or tensor.dtype, copy=True)

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return a detached copy of ``tensor`` in new host memory.

        Raises:
            RuntimeError: outside of ``active()``.
        """
        self._require_active("fetch")
        self._tracker.strict.host_waits()
        with self._over_link(tensor), self._booking_in(self._host_ledger):
            return tensor.detach().to(tensor.dtype, copy=True)

    def numbers(self, tensor: Tensor, rehearsed: list[Any]) -> list[Any]:  # noqa: D102
        self._tracker.strict.host_waits()
        return rehearsed if self.fake else super().numbers(tensor, rehearsed)

    def start_copy(self, source: Tensor, target: Tensor) -> Callable[[], None]:  # noqa: D102
        with self._over_link(source), self._tracker.strict.copying(source, target) as waited:
            super().start_copy(source, target)
        return waited

    def after_copies(self) -> AbstractContextManager[None]:  # noqa: D102
        return self._tracker.strict.asleep()

    def wait(self) -> None:  # noqa: D102
        self._tracker.strict.host_waits()

    def _over_link(self, tensor: Tensor) -> AbstractContextManager[None]:
        return nullcontext() if self._fake_mode is None else self._fake_mode.work.link(tensor.nbytes)

    @contextmanager
    def _booking_in(self, ledger: Ledger) -> Iterator[None]:
        before, self._tracker.ledger = self._tracker.ledger, ledger
        try:
            yield
        finally:
            self._tracker.ledger = before

    def _is_active(self) -> bool:
        return any(mode is self._tracker for mode in _get_current_dispatch_mode_stack())

    def _require_active(self, method: str) -> None:
        if not self._is_active():
            raise RuntimeError(f"VirtualGPU.{method} books memory and works only inside active(); enter it first")

    # What the device holds.

    def usage(self) -> MemoryUsage:  # noqa: D102
        self._tracker.settle()
        statistics = self.allocator.statistics
        return MemoryUsage(
            allocated_bytes=statistics.allocated_bytes,
            reserved_bytes=statistics.reserved_bytes,
            peak_allocated_bytes=statistics.peak_allocated_bytes,
            peak_reserved_bytes=statistics.peak_reserved_bytes,
        )

    @property
    def host_allocated_bytes(self) -> int:
        """Bytes of the tensors that lie in host memory and were booked there."""
        self._tracker.settle()
        return self._host_ledger.allocated_bytes

    @property
    def host_peak_allocated_bytes(self) -> int:
        """The most that ``host_allocated_bytes`` was since ``reset_peak``."""
        return self._host_ledger.peak_allocated_bytes

    @property
    def allocation_count(self) -> int:
        """How many allocations were asked of the device so far; the index of the next."""
        return self._ledger.allocation_count

    def reset_peak(self) -> None:  # noqa: D102
        self._tracker.settle()
        self.allocator.reset_peak()
        self._host_ledger.peak_allocated_bytes = self._host_ledger.allocated_bytes

    def _remember_peaks(self, earlier: MemoryUsage) -> None:
        self.allocator.statistics.raise_peaks(earlier.peak_allocated_bytes, earlier.peak_reserved_bytes)

    def empty_cache(self) -> None:  # noqa: D102
        self._tracker.settle()
        self.allocator.empty_cache()

    def set_capacity(self, capacity_bytes: int) -> None:
        """Change the capacity, as if another process took memory or gave it back."""
        self.allocator.set_capacity(capacity_bytes)
        self.capacity_bytes = capacity_bytes

    def fail_at(self, allocation_index: int | None) -> None:
        """Let the allocation with this index (see ``allocation_count``) fail once as if there were no room.

        ``None`` takes it back.

        Raises:
            ValueError: that allocation was made already.
        """
        if allocation_index is not None and allocation_index < self.allocation_count:
            raise ValueError(
                "only an allocation to come can fail: allocation_index must be at least "
                f"{self.allocation_count}; got {allocation_index}"
            )
        self._ledger.failing_index = allocation_index

    # What it is for.

    def book_workspaces(self, size_bytes: int) -> None:
        """Hold what cuBLAS takes for each thread that multiplies: so much now, and again when autograd's first does, in backward."""
        if size_bytes:
            self._add_workspace(size_bytes)

    def _add_workspace(self, size_bytes: int) -> None:
        self._workspaces.append(torch.empty(size_bytes, dtype=torch.uint8))
        self.label(self._workspaces, "temporaries")

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:  # noqa: D102
        if name == "backward" and len(self._workspaces) == 1:
            self._add_workspace(self._workspaces[0].nbytes)
        with self.counting_update() if name == "optimizer" else nullcontext():
            if self._recorder is None:
                yield
                return
            with self._noted_phase(name):
                try:
                    yield
                finally:
                    if self._watcher is not None:
                        self._watcher.scan(name)

    @contextmanager
    def _noted_phase(self, name: Phase) -> Iterator[None]:
        assert self._recorder is not None
        with self._recorder.phase(name), self._tracker.phase(name):
            yield

    def count_work(self, passes: int) -> None:  # noqa: D102
        if self._fake_mode is not None:
            self._fake_mode.work.count(passes)

    @contextmanager
    def counting_update(self) -> Iterator[None]:
        """Count what is done inside as the optimizer's, whatever the phase."""
        with self._fake_mode.work.update() if self._fake_mode is not None else nullcontext():
            yield

    def work(self) -> Work | None:
        """Return what was counted of a step; ``None`` on real tensors."""
        return None if self._fake_mode is None else self._fake_mode.work.work()

    def label(
        self, tensors: Iterable[Tensor], category: Category, *, overwrite: bool = True, names: Iterable[str] = ()
    ) -> None:
        """Say what ``tensors`` are for, with ``overwrite=False`` of those not labelled so far; and what they are called, where they have ``names``."""
        if self._recorder is not None:
            for tensor, name in zip(tensors, chain(names, repeat("")), strict=False):
                self._tracker.label(tensor, category, overwrite=overwrite, name=name)

    def repeating(self, key: Any, function: Callable[[], None]) -> None:
        """Call ``function``; on fake tensors, only once for each ``key``, and then ask again for what it asked for.

        All that ``function`` asks for must follow from ``key``, and only real tensors may notice what it changes.

        With ``skim`` what would be asked a third time in a row is left out, where the second found all that it asked for in the
        cache: it left the allocator as it was, and so would the third. Every peak is the same; the history is shorter.
        """
        if self._fake_mode is None or not self._is_active():  # what is computed beside a rehearsal has values
            function()
            return
        work, began = self._fake_mode.work, self._moment()
        uncounted = work.on and self._work_of.get(key) is None
        left_out = self.skim and self._row.leaves_out(key, began)
        if uncounted or not (left_out or self._tracker.repeated(key)):
            before = work.snapshot()
            self._tracker.record(key, function)
            self._work_of[key] = work.since(before) if work.on else None
        elif work.on:
            work.repeat(self._work_of[key])
        if self._tracker.can_repeat(key):
            self._row.asked(key, began, self._moment())

    def _moment(self) -> Moment:
        """Return what changes with every event, and what changes with every segment."""
        assert self._recorder is not None
        reserved = self.allocator.statistics.reserved
        return self._recorder.event_count, reserved.allocated, reserved.current

    def watch(self, model: nn.Module, *optimizers: torch.optim.Optimizer) -> None:
        """Know ``model``'s modules, gradients and ``optimizers``' state from now on, instead of any before.

        Call it when it is settled which parameters train.
        """
        if self._recorder is not None:
            if self._watcher is not None:
                self._watcher.remove()
            self._watcher = Watcher(self._recorder, self.label, model, optimizers)

    def profile(self, max_points: int | None = 1000) -> MemoryProfile:
        """Return the record so far.

        Args:
            max_points: how many events the timeline may have; ``None``: all.

        Raises:
            RuntimeError: this device keeps no history.
        """
        if self._recorder is None:
            raise RuntimeError("a profile needs the history: make the VirtualGPU with record_history=True")
        with self._tracker.quiet():
            return self._recorder.profile(
                device=self.name,
                capacity_bytes=self.capacity_bytes,
                outside_bytes=self.outside_bytes,
                max_points=max_points,
            )

    def held_before(self, event: int) -> dict[Category, int]:
        """Return the bytes of each category when the event of this number (``Request.event``) was about to happen.

        Raises:
            RuntimeError: this device keeps no history.
        """
        if self._recorder is None:
            raise RuntimeError("what was held needs the history: make the VirtualGPU with record_history=True")
        with self._tracker.quiet():
            return self._recorder.held_before(event)
