"""Books every tensor storage that is created and freed, in a ledger of bytes.

A ``TorchDispatchMode`` sees each operator after autograd and after composite operators were taken apart, in
forward, backward and recomputation alike, for real and for fake tensors. A storage that an operator returns
for the first time is booked; it is released by a weak reference's callback at the moment it dies, also where
only C++ kept it alive (a storage keeps its one Python object until it dies, so the weak reference is never
early). Bytes belong to storages: views and in-place operators book nothing.

What has no operator of its own:

- ``torch.tensor``, ``as_tensor``, ``from_numpy`` end in ``lift_fresh``, which is booked; ``copy.deepcopy``,
  ``torch.load`` and safetensors end in ``set_``, which books a storage not seen before. So host tensors have
  to be made inside ``Device.host()``, or outside of the mode.
- ``torch.frombuffer`` and ``from_dlpack`` never appear; a view of what was not booked is not booked.
- ``UntypedStorage.resize_`` (FSDP2 frees and refills parameters with it) is caught by an attribute on the one
  storage object, so no class of torch is changed.

Autograd sums two gradients of one tensor in place, and writes into fresh zeros in place (the backward of
indexing, ``gather``, ``max``, ``index_select``), unless a dispatch mode is active: then it works out of place,
and the books would hold one tensor more than a run without the mode. ``_works_in_place`` recognises these
operators by the reference counts that torch itself looks at (measured once on known graphs), and the old
booking is handed to the result. Only the books are touched, never the computation.

Cost (CPU time on one core, torch 2.13, least of five runs): calling a dispatch mode that does nothing takes
4 µs per operator; the tracker takes less than 2 µs more where nothing is new, and 6 to 7 µs more for a new
storage, its end included. The obvious alternative, ``torch.distributed._tools.mem_tracker``, takes 40 to 60
µs more, and patches ``UntypedStorage.resize_``.
"""

from __future__ import annotations

import functools
import threading
import weakref
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager
from enum import Enum, auto
from importlib import import_module
from typing import Any, Protocol

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode, _disable_current_modes

from oomless.memory.fake_mode import DEVICE_OF
from oomless.memory.strict import Strict, is_meta
from oomless.memory.tape import Held, Tape
from oomless.ops.operators import SCRATCH

aten = torch.ops.aten
_PLAIN_TYPES = frozenset({Tensor, torch.nn.Parameter, FakeTensor})
_BOOKED_THOUGH_ALIASING = frozenset(
    {
        aten.lift_fresh.default,
        aten.set_.source_Storage,
        aten.set_.source_Storage_storage_offset,
    }
)
_ALIASING_UNDECLARED = frozenset({aten._unsafe_view.default})
_RESIZING = frozenset({"aten::resize_", "aten::resize_as_"})
_IN_PLACE_WITHOUT_A_MODE = frozenset(
    {
        aten.add.Tensor,
        aten.index_put.default,
        aten.scatter_add.default,
        aten.scatter.src,
        aten.index_add.default,
        aten.masked_scatter.default,
    }
)
"""What autograd runs in place on a tensor of its own, but out of place while a dispatch mode is active."""

SCRATCH[aten._softmax_backward_data.default] = lambda gradient, *_: (gradient.nbytes,)


class Ledger(Protocol):
    """Where bytes are written down: a device's allocator, or a count of host memory."""

    def allocate(self, size_bytes: int, operation: object) -> Any:
        """Book ``size_bytes`` (more than none) for ``operation`` and return what ``free`` takes.

        Raises:
            torch.OutOfMemoryError: there is no room.
        """

    def free(self, allocation: Any) -> None:
        """Take back what ``allocate`` returned."""


class _Unbooked:
    """Takes no notice: for what is in the books already."""

    def allocate(self, size_bytes: int, operation: object) -> None:
        return None

    def free(self, allocation: Any) -> None: ...


class Booking(weakref.ref[torch.UntypedStorage]):
    """One storage in the books: a weak reference to it, and what its ledger knows it by."""

    __slots__ = ("allocation", "key", "ledger", "size_bytes", "tracker")
    tracker: StorageTracker
    key: int
    size_bytes: int
    ledger: Ledger
    allocation: Any

    def resize(self, size_bytes: int) -> None:
        """Stand in for ``storage.resize_``: take the new memory before giving the old back, as CUDA does."""
        storage = self()
        assert storage is not None
        self.tracker._rebook(self, size_bytes, "storage.resize_")
        torch.UntypedStorage.resize_(storage, size_bytes)


class _Rule(Enum):
    NOTHING_NEW = auto()
    NEW_STORAGES = auto()
    MAY_RESIZE = auto()


@functools.cache
def _rule(func: Any) -> _Rule:
    """Say from an operator's schema whether what it returns can be, or can lie in, new memory."""
    schema = getattr(func, "_schema", None)
    if schema is None or func in _BOOKED_THOUGH_ALIASING:
        return _Rule.NEW_STORAGES
    if schema.name in _RESIZING or any(argument.is_out for argument in schema.arguments):
        return _Rule.MAY_RESIZE
    if func in _ALIASING_UNDECLARED or all(returned.alias_info is not None for returned in schema.returns):
        return _Rule.NOTHING_NEW
    if not any("Tensor" in str(returned.type) for returned in schema.returns):
        return _Rule.NOTHING_NEW
    return _Rule.NEW_STORAGES


@functools.cache
def _is_composite(func: Any) -> bool:
    """Say whether an operator is made of others alone, and asks for memory only through them."""
    if not isinstance(func, torch._ops.OpOverload) or func.namespace == "prim":
        return False
    name = func.name()  # type: ignore[no-untyped-call]
    return torch._C._dispatch_has_kernel_for_dispatch_key(name, "CompositeImplicitAutograd")


def _tensors(result: Any) -> Iterator[Tensor]:
    """Yield the dense tensors in what an operator returned; of a sparse tensor, its parts."""
    if isinstance(result, Tensor):
        if result.layout is torch.strided:
            yield result
        elif result.layout is torch.sparse_coo:
            yield from (result._indices(), result._values())
    elif isinstance(result, (tuple, list)):
        for item in result:
            yield from _tensors(item)
    elif isinstance(result, dict):
        yield from _tensors(list(result.values()))


def storages(tensor: Tensor) -> Iterator[torch.UntypedStorage]:
    """Yield the storages that hold ``tensor``; of a wrapper such as ``DTensor``, those of its parts."""
    flatten = getattr(tensor, "__tensor_flatten__", None)
    if flatten is None:
        for part in _tensors(tensor):
            yield part.untyped_storage()
    else:
        for name in flatten()[0]:
            yield from storages(getattr(tensor, name))


class StorageTracker(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Books new storages in ``ledger``, which may be exchanged at any time, while the mode is active.

    A failed booking (``torch.OutOfMemoryError`` from the ledger) drops what the operator returned and is
    raised from the operator's call, as by CUDA. Unlike on CUDA the operator has run by then: random numbers
    are drawn.
    """

    supports_higher_order_operators = True

    def __init__(self, ledger: Ledger) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.ledger = self._device = ledger
        self.begin_phase: Callable[[Any], AbstractContextManager[None]] = self.phase
        """Begins a phase where what was asked for in it is repeated."""
        self.strict = Strict(self._on_device)
        self._bookings: dict[int, Booking] = {}
        self._dead: deque[Booking] = deque()
        self._running_tapes: list[Tape] = []
        self._tapes: dict[Any, Tape] = {}
        # A storage can die at any moment, also while this thread is inside the ledger (garbage collection).
        self._lock = threading.Lock()
        self._reference_counts = _reference_counts_in_autograd()

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # The guard that this asks for costs more per operator than the booking.

    def find(self, tensor: Tensor) -> list[Booking]:
        """Return the bookings of the storages that hold ``tensor``; none for memory that was never booked."""
        found = (self._bookings.get(id(storage)) for storage in storages(tensor))
        return [booking for booking in found if booking is not None]

    def settle(self) -> None:
        """Release what died while the ledger was busy."""
        while self._dead and self._lock.acquire(blocking=False):
            try:
                while self._dead:
                    booking = self._dead.popleft()
                    self._free(booking.ledger, booking.allocation)
            finally:
                self._lock.release()

    def _on_device(self, storage: torch.UntypedStorage) -> bool:
        booking = self._bookings.get(id(storage))
        return booking is not None and booking.ledger is self._device

    @contextmanager
    def quiet(self) -> Iterator[None]:
        """Release nothing inside, whatever dies (garbage collection can come at any moment), so that the books rest."""
        self.settle()
        with self._lock:
            yield
        self.settle()

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Run ``func`` and book what is new in its result."""
        if func is DEVICE_OF and type(args[0]) is FakeTensor:
            return args[0].fake_device  # autograd asks for it of every gradient
        if types and not _PLAIN_TYPES.issuperset(types):
            return NotImplemented  # A wrapper runs first; the operators on its parts come here.
        if torch.is_inference_mode_enabled() and _is_composite(func):
            return self._apart(func, args, kwargs or {})
        self.strict.check(func, args, kwargs)
        result = func(*args, **kwargs) if kwargs else func(*args)
        rule = _rule(func)
        if rule is _Rule.NOTHING_NEW:
            return result
        if func in _IN_PLACE_WITHOUT_A_MODE and not kwargs and self._works_in_place(func, args):
            self._hand_over(args[0], result)
            return result
        scratch = SCRATCH.get(func)
        error = self._book(result, func, rule, scratch(*args) if scratch is not None else ())
        if error is None:
            return result
        # The traceback holds this frame, which must not hold what C++ would have dropped, nor the error.
        del result, args, kwargs
        try:
            raise error
        finally:
            del error

    def _apart(self, func: Any, args: Sequence[Any], kwargs: dict[str, Any]) -> Any:
        """Run a composite operator as the others that it is made of, which autograd does outside of inference mode."""
        with self:
            return func.decompose(*args, **kwargs)

    def _book(
        self, result: Any, operation: object, rule: _Rule, scratch: Sequence[int]
    ) -> torch.OutOfMemoryError | None:
        """Book every storage in ``result`` that is new, and for a moment ``scratch``, in bytes; return the error if one does not fit."""
        try:
            if type(result) is Tensor and result.layout is torch.strided:
                self._book_tensor(result, operation, rule)
            else:
                for tensor in _tensors(result):
                    self._book_tensor(tensor, operation, rule)
            self._lend(scratch, operation)
        except torch.OutOfMemoryError as error:
            return error.with_traceback(None)
        return None

    def _lend(self, scratch: Sequence[int], operation: object) -> None:
        held = []
        try:
            for size_bytes in scratch:
                held.append(self._allocate(self.ledger, size_bytes, operation))
        finally:
            with self._lock:
                for allocation in filter(None, held):
                    self._free(self.ledger, allocation)

    def _book_tensor(self, tensor: Tensor, operation: object, rule: _Rule) -> None:
        storage = tensor.untyped_storage()
        booking = self._bookings.get(id(storage))
        if booking is not None:
            if rule is _Rule.MAY_RESIZE and storage.nbytes() != booking.size_bytes:
                self._rebook(booking, storage.nbytes(), operation)
        elif rule is _Rule.NEW_STORAGES and not is_meta(tensor):
            size_bytes = storage.nbytes()
            allocation = self._allocate(self.ledger, size_bytes, operation)
            self._enter(storage, self.ledger, size_bytes, allocation)

    def _allocate(self, ledger: Ledger, size_bytes: int, operation: object) -> Any:
        """Return the ledger's allocation, or ``None`` for an empty storage, which takes no memory."""
        if self._dead:
            self.settle()
        if not size_bytes:
            return None
        with self._lock:
            allocation = self._take(ledger, size_bytes, operation)
        if self._dead:
            self.settle()
        return allocation

    def _take(self, ledger: Ledger, size_bytes: int, operation: object) -> Any:
        allocation = ledger.allocate(size_bytes, operation)
        for tape in self._running_tapes:
            tape.allocated(ledger, size_bytes, operation, allocation)
        return allocation

    def _free(self, ledger: Ledger, allocation: Any) -> None:
        ledger.free(allocation)
        for tape in self._running_tapes:
            tape.freed(allocation)

    def start(self, tape: Tape) -> None:
        """Write down on ``tape`` what is asked for from now on, until ``stop``; several may run."""
        self.settle()
        self._running_tapes.append(tape)

    def stop(self, tape: Tape) -> None:
        """End ``start``."""
        self.settle()
        self._running_tapes.remove(tape)

    @contextmanager
    def phase(self, name: Any) -> Iterator[None]:
        """Note that what is asked for inside is of the phase ``name``."""
        for tape in self._running_tapes:
            tape.phase_changed(name)
        yield
        for tape in self._running_tapes:
            tape.phase_changed(None)

    def record(self, key: Any, function: Callable[[], None]) -> None:
        """Call ``function`` and keep what it asked for under ``key``."""
        tape = self._tapes[key] = Tape()
        self.start(tape)
        try:
            function()
        finally:
            self.stop(tape)

    def can_repeat(self, key: Any) -> bool:
        """Whether something was recorded under ``key`` that frees all that it asks for, and nothing else."""
        tape = self._tapes.get(key)
        return tape is not None and tape.repeatable and not tape.alive

    def repeated(self, key: Any) -> bool:
        """Ask again for all that was recorded under ``key``; return False where nothing was, or it cannot be repeated."""
        if not self.can_repeat(key):
            return False
        self.repeat(self._tapes[key], {})
        return True

    def repeat(self, tape: Tape, held: dict[Any, Held]) -> None:
        """Ask again for what is on ``tape``; see ``Tape.repeat``."""
        with self.quiet(), ExitStack() as phases:
            begun: list[ExitStack] = []

            def change_phase(name: Any) -> None:
                if name is None:
                    begun.pop().close()
                else:
                    begun.append(phases.enter_context(ExitStack()))
                    begun[-1].enter_context(self.begin_phase(name))

            tape.repeat(held, self._take, self._free, self._label, change_phase)

    def adopt(self, make: Callable[[], Tensor], held: Held) -> Tensor:
        """Return the tensor that ``make`` makes, its one new storage booked as the allocation that is ``held`` already."""
        before, self.ledger = self.ledger, _Unbooked()
        try:
            made = make()
        finally:
            self.ledger = before
        (booking,) = self.find(made)
        booking.ledger, booking.allocation = held
        return made

    def label(self, tensor: Tensor, category: Any, *, overwrite: bool, name: str = "") -> None:
        """Say what ``tensor`` is for and what it is called, where its ledger keeps that."""
        for booking in self.find(tensor):
            allocation = booking.allocation
            if not hasattr(allocation, "category"):
                continue
            if overwrite or allocation.category is None:
                self._label(allocation, category)
            allocation.name = name or allocation.name

    def _label(self, allocation: Any, category: Any) -> None:
        allocation.category = category
        for tape in self._running_tapes:
            tape.labelled(allocation, category)

    def _enter(self, storage: torch.UntypedStorage, ledger: Ledger, size_bytes: int, allocation: Any) -> None:
        booking = Booking(storage, self._died)
        booking.tracker = self
        booking.key = id(storage)
        booking.size_bytes = size_bytes
        booking.ledger = ledger
        booking.allocation = allocation
        self._bookings[booking.key] = booking
        storage.resize_ = booking.resize  # type: ignore[assignment, method-assign]

    def _rebook(self, booking: Booking, size_bytes: int, operation: object) -> None:
        allocation = self._allocate(booking.ledger, size_bytes, operation)
        with self._lock:
            if booking.allocation is not None:
                self._free(booking.ledger, booking.allocation)
            booking.allocation = allocation
            booking.size_bytes = size_bytes

    def _died(self, booking: Booking) -> None:
        if self._bookings.get(booking.key) is booking:
            del self._bookings[booking.key]
        if booking.allocation is not None:
            self._dead.append(booking)
            self.settle()

    def _works_in_place(self, func: Any, args: Sequence[Any]) -> bool:
        """Say whether this is autograd's own sum into a tensor that nobody else holds, in place but for the mode."""
        if torch._C._current_graph_task_id() == -1 or torch.is_grad_enabled():
            return False
        old = args[0]
        if not isinstance(old, Tensor) or _reference_counts(old) != self._reference_counts[func]:
            return False
        if func is not aten.add.Tensor:
            return True
        new = args[1]
        return (
            isinstance(new, Tensor)
            and old.shape == new.shape
            and old.dtype == new.dtype
            and torch._prims_common.is_non_overlapping_and_dense_or_false(old)
        )

    def _hand_over(self, old: Tensor, result: Tensor) -> None:
        """Let ``result`` take over the memory booked for ``old``, which dies when this operator returns."""
        booking = self._bookings.pop(id(old.untyped_storage()), None)
        if booking is not None:
            self._enter(result.untyped_storage(), booking.ledger, booking.size_bytes, booking.allocation)
            booking.allocation = None


def _reference_counts(tensor: Tensor) -> tuple[int, int]:
    """Return how many references C++ counts to ``tensor`` and to its storage."""
    return tensor._use_count(), torch._C._storage_Use_Count(tensor.untyped_storage()._cdata)  # type: ignore[attr-defined]


class _Probe(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Notes the reference counts of the first operand of what autograd runs in place without a mode."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.counts: dict[Any, tuple[int, int]] = {}

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        result = func(*args, **kwargs) if kwargs else func(*args)
        if isinstance(result, Tensor):
            result.untyped_storage()
        if func in _IN_PLACE_WITHOUT_A_MODE and torch._C._current_graph_task_id() != -1:
            self.counts[func] = _reference_counts(args[0])
        return result


@functools.cache
def _reference_counts_in_autograd() -> dict[Any, tuple[int, int]]:
    """Measure for each operator the counts of a tensor that only autograd holds, at the moment it is worked on."""
    with torch.enable_grad(), _Probe() as probe:
        x = torch.zeros(2, requires_grad=True)
        y = x * 1
        index = torch.zeros(1, dtype=torch.int64)
        for use in (
            y * y.detach() + y * y.detach(),
            x[index],
            x.gather(0, index),
            x.max(0).values,
            x.index_select(0, index),
            x.masked_select(x == 0),
        ):
            torch.autograd.backward(use.sum())
    counts: dict[Any, tuple[int, int]] = probe.counts
    assert counts.keys() == _IN_PLACE_WITHOUT_A_MODE
    return counts


def import_unbooked(name: str) -> Any:
    """Return the module ``name``, imported where it is used because that takes long; what tensors it makes are neither fake nor booked."""
    with _disable_current_modes():
        return import_module(name)
