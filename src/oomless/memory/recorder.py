"""Writes down each allocation and free of a virtual GPU, and makes a ``MemoryProfile`` of them.

The log is one signed integer per event: ``n + 1`` for the birth of allocation ``n``, ``-(n + 1)`` for its
end, 0 for a change of phase. Sums by category are taken from it afterwards, when the category of each
allocation is known (``profile.py`` has the rules).

Which module asked: inside a module's forward, the innermost module (its hooks keep a stack). In a backward
pass, the module whose forward made the autograd node that is running: nodes carry a sequence number, and
the hooks note at which number each module began and ended.
"""

from __future__ import annotations

import weakref
from array import array
from bisect import bisect_right
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from oomless.memory.allocator_state import AllocatorStatistics, Block
from oomless.memory.device import Category, Phase
from oomless.memory.profile import CATEGORIES, Holder, MemoryProfile, PhasePeak, Request, Timeline

_CATEGORY_OF_SURVIVORS: dict[Phase, Category] = {
    "load": "weights",
    "forward": "saved activations",
    "optimizer": "optimizer state",
}
_PHASE_CHANGE = 0
HOLDERS = 12
"""So many of a category are named, the largest."""


class _Owner(NamedTuple):
    """Who runs: a module's dotted path and the phase."""

    module: str
    phase: Phase


class Allocation:
    """One allocation: its block while it lives, and what is known of it."""

    __slots__ = (
        "block",
        "category",
        "index",
        "module",
        "name",
        "operation",
        "phase",
        "requested_bytes",
        "size_bytes",
    )

    def __init__(
        self,
        index: int,
        block: Block,
        size_bytes: int,
        requested_bytes: int,
        operation: object,
        owner: _Owner,
    ) -> None:
        self.index = index
        self.block: Block | None = block
        self.size_bytes = size_bytes
        self.requested_bytes = requested_bytes
        self.operation = operation
        self.name = ""
        self.module, self.phase = owner
        self.category: Category | None = "logits and loss" if owner.phase == "loss" else None

    def called(self) -> str:
        """Return its name, or by what and where it was asked for."""
        return self.name or f"{self.operation}{f' in {self.module}' if self.module else ''}"


class Recorder:
    """The log of one virtual GPU; ``statistics`` are those of its allocator, kept up to date by it."""

    def __init__(self, statistics: AllocatorStatistics) -> None:
        self._statistics = statistics
        self._events = array("q")
        self._reserved = array("q")
        self._allocations: list[Allocation] = []
        self._live: dict[int, Allocation] = {}
        self._failures: list[Request] = []
        self._phases: list[tuple[int, Phase]] = [(0, "other")]
        self._running: list[_Owner] = [_Owner("", "other")]
        self._span_starts = [-1]
        self._span_owners = [self._running[0]]
        self._recomputation_start = 0

    # What the device's ledger tells.

    def allocated(self, block: Block, requested_bytes: int, operation: object) -> Allocation:
        """Note that ``block`` was taken for ``operation``."""
        index = len(self._allocations)
        allocation = Allocation(index, block, block.size_bytes, requested_bytes, operation, self._asking())
        self._allocations.append(allocation)
        self._live[index] = allocation
        self._note(index + 1)
        return allocation

    def freed(self, allocation: Allocation) -> None:
        """Note that ``allocation`` was given back."""
        allocation.block = None
        del self._live[allocation.index]
        self._note(-allocation.index - 1)

    def failed(self, requested_bytes: int, segment_bytes: int, operation: object) -> None:
        """Note that there was no room for ``operation``, for which a segment would have been made."""
        request = self._request(len(self._events), self._asking(), operation, requested_bytes, segment_bytes)
        self._failures.append(request)

    @property
    def event_count(self) -> int:
        """How many blocks were taken and given back so far."""
        return len(self._events)

    def _note(self, event: int) -> None:
        self._events.append(event)
        self._reserved.append(self._statistics.reserved_bytes)

    # What the run tells.

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """Own what is born inside as ``name``; settle what is still alive at the end."""
        start, depth = len(self._allocations), len(self._running)
        self._enter(_Owner("", name))
        self._change_phase(name)
        try:
            yield
        finally:
            del self._running[depth:]
            self._mark_span()
            self._settle(start, name, _CATEGORY_OF_SURVIVORS.get(name))
            self._change_phase(self._running[-1].phase)
            if depth == 1 and name in ("optimizer", "load"):
                # No graph outlives an optimizer step, so that its sequence numbers are not asked for again.
                del self._span_starts[1:], self._span_owners[1:]

    def module_started(self, name: str) -> None:
        """Note that the forward of the module ``name`` starts."""
        if _in_backward() and not self._running[-1].module:
            self._recomputation_start = len(self._allocations)
        self._enter(_Owner(name, self._running[-1].phase))

    def module_ended(self) -> None:
        """Note that the innermost module's forward ends, by return or by exception."""
        if len(self._running) > 1 and self._running[-1].module:
            phase = self._running.pop().phase
            self._mark_span()
            if _in_backward() and not self._running[-1].module:
                self._settle(self._recomputation_start, phase, "saved activations")

    def _change_phase(self, name: Phase) -> None:
        self._phases.append((len(self._events), name))
        self._note(_PHASE_CHANGE)

    def _enter(self, owner: _Owner) -> None:
        self._running.append(owner)
        self._mark_span()

    def _mark_span(self) -> None:
        self._span_starts.append(torch._C._autograd._get_sequence_nr())
        self._span_owners.append(self._running[-1])

    def _settle(self, start: int, phase: Phase, category: Category | None) -> None:
        if category is not None:
            for allocation in reversed(list(self._live.values())):
                if allocation.index < start:
                    break
                if allocation.category is None and allocation.phase == phase:
                    allocation.category = category

    def _asking(self) -> _Owner:
        running = self._running[-1]
        if running.module or not _in_backward():
            return running
        node: torch.autograd.graph.Node | None = torch._C._current_autograd_node()
        if node is None:
            return running
        span = bisect_right(self._span_starts, node._sequence_nr()) - 1
        made_by = self._span_owners[span]
        return made_by if made_by.phase == "loss" else _Owner(made_by.module, running.phase)

    # What comes out.

    def profile(self, *, device: str, capacity_bytes: int, outside_bytes: int, max_points: int | None) -> MemoryProfile:
        """Return the record so far; of each stretch of events the timeline has the highest."""
        allocated = self._allocated_after_each_event()
        peak_event = max(range(len(allocated)), key=allocated.__getitem__, default=None)
        chosen = _highest_of_stretches(allocated, max_points)
        levels = self._levels(sorted({*chosen, *([] if peak_event is None else [peak_event])}))
        at_peak = levels[peak_event] if peak_event is not None else dict.fromkeys(CATEGORIES, 0)
        phase_of = self._phase_of_events(len(allocated))
        asked = [self._allocations[self._events[event] - 1] if self._events[event] > 0 else None for event in chosen]
        peak = None
        if peak_event is not None and self._events[peak_event] > 0:
            born = self._allocations[self._events[peak_event] - 1]
            peak = self._request(
                peak_event, _Owner(born.module, phase_of[peak_event]), born.operation, born.requested_bytes
            )
        return MemoryProfile(
            device=device,
            capacity_bytes=capacity_bytes,
            outside_bytes=outside_bytes,
            event_count=len(allocated),
            peak_allocated_bytes=max(allocated, default=0),
            peak_reserved_bytes=max(self._reserved, default=0),
            phases=self._phase_peaks(phase_of, allocated),
            peak=peak,
            peak_bytes_by_category=at_peak,
            peak_holders={} if peak_event is None else self._holders(peak_event),
            cached_bytes=0 if peak_event is None else self._reserved[peak_event] - allocated[peak_event],
            failures=tuple(self._failures),
            timeline=Timeline(
                events=tuple(chosen),
                phases=tuple(phase_of[event] for event in chosen),
                allocated_bytes=tuple(allocated[event] for event in chosen),
                reserved_bytes=tuple(self._reserved[event] for event in chosen),
                bytes_by_category={
                    category: tuple(levels[event][category] for event in chosen) for category in CATEGORIES
                },
                operations=tuple("" if one is None else str(one.operation) for one in asked),
                modules=tuple("" if one is None else one.module for one in asked),
                tensors=tuple("" if one is None else one.name for one in asked),
            ),
        )

    def _holders(self, event: int) -> dict[Category, tuple[Holder, ...]]:
        """Return what was held after ``event``: of each category the largest by name, and the rest."""
        held: dict[int, None] = {}
        for number in self._events[: event + 1]:
            if number > 0:
                held[number - 1] = None
            elif number < 0:
                del held[-number - 1]
        found: dict[Category, dict[str, list[int]]] = {category: {} for category in CATEGORIES}
        for allocation in map(self._allocations.__getitem__, held):
            found[allocation.category or "temporaries"].setdefault(allocation.called(), []).append(
                allocation.size_bytes
            )
        named: dict[Category, tuple[Holder, ...]] = {}
        for category, sizes in found.items():
            order = sorted(sizes.items(), key=lambda item: -sum(item[1]))
            rest = [size for _, several in order[HOLDERS:] for size in several]
            rows = [*order[:HOLDERS], *([("", rest)] if rest else [])]
            if rows:
                named[category] = tuple(
                    Holder(name=name, allocations=len(several), size_bytes=sum(several)) for name, several in rows
                )
        return named

    def held_before(self, event: int) -> dict[Category, int]:
        """Return the bytes of each category that were held when the event with this number was about to happen."""
        return self._levels([event - 1])[event - 1] if event > 0 else dict.fromkeys(CATEGORIES, 0)

    def _delta(self, event: int) -> int:
        if event > 0:
            return self._allocations[event - 1].size_bytes
        return -self._allocations[-event - 1].size_bytes if event else 0

    def _allocated_after_each_event(self) -> list[int]:
        total, allocated = 0, []
        for event in self._events:
            total += self._delta(event)
            allocated.append(total)
        return allocated

    def _levels(self, wanted: list[int]) -> dict[int, dict[Category, int]]:
        """Return the bytes of each category after each of the ``wanted`` events, which are in order."""
        level: dict[Category, int] = dict.fromkeys(CATEGORIES, 0)
        levels, done = {}, 0
        for position in wanted:
            for event in self._events[done : position + 1]:
                if event:
                    category = self._allocations[abs(event) - 1].category or "temporaries"
                    level[category] += self._delta(event)
            done = position + 1
            levels[position] = dict(level)
        return levels

    def _phase_of_events(self, count: int) -> list[Phase]:
        phase_of: list[Phase] = []
        for (start, name), (end, _) in zip(self._phases, [*self._phases[1:], (count, "other")], strict=True):
            phase_of += [name] * (end - start)
        return phase_of

    def _phase_peaks(self, phase_of: list[Phase], allocated: list[int]) -> dict[Phase, PhasePeak]:
        highest: dict[Phase, tuple[int, int]] = {}
        for name, now_allocated, now_reserved in zip(phase_of, allocated, self._reserved, strict=True):
            then_allocated, then_reserved = highest.get(name, (0, 0))
            highest[name] = (max(then_allocated, now_allocated), max(then_reserved, now_reserved))
        return {
            name: PhasePeak(allocated_bytes=bytes_[0], reserved_bytes=bytes_[1]) for name, bytes_ in highest.items()
        }

    @staticmethod
    def _request(event: int, owner: _Owner, operation: object, size_bytes: int, segment_bytes: int = 0) -> Request:
        return Request(
            event=event,
            phase=owner.phase,
            operation=str(operation),
            module=owner.module,
            size_bytes=size_bytes,
            segment_bytes=segment_bytes,
        )


class Watcher:
    """Tells a recorder of a model's modules, parameters, gradients and optimizer state."""

    def __init__(
        self, recorder: Recorder, label: Any, model: nn.Module, optimizers: Iterable[torch.optim.Optimizer]
    ) -> None:
        self._recorder = recorder
        self._label = label
        # Not kept alive: whoever deletes the model wants its memory back.
        self._model = weakref.ref(model)
        self._optimizers = [weakref.ref(optimizer) for optimizer in optimizers]
        self._handles = [
            handle
            for name, module in model.named_modules()
            for handle in self._hook(name or type(model).__name__, module)
        ]
        parameters = dict(model.named_parameters())
        self._handles += [
            parameter.register_post_accumulate_grad_hook(self._gradient_accumulated)  # type: ignore[no-untyped-call]
            for parameter in parameters.values()
            if parameter.requires_grad
        ]
        self._names = {id(parameter): name for name, parameter in parameters.items()}
        named = parameters | dict(model.named_buffers())
        label(named.values(), "weights", overwrite=False, names=named)
        self.scan()

    def _hook(self, name: str, module: nn.Module) -> Iterator[Any]:
        def started(_module: nn.Module, _inputs: Any) -> None:
            self._recorder.module_started(name)

        def ended(_module: nn.Module, _inputs: Any, _output: Any) -> None:
            self._recorder.module_ended()

        yield module.register_forward_pre_hook(started, prepend=True)
        yield module.register_forward_hook(ended, always_call=True)

    def _gradient_accumulated(self, parameter: Tensor) -> None:
        if parameter.grad is not None:
            self._label([parameter.grad], "gradients", names=[self._names.get(id(parameter), "")])

    def scan(self, phase: Phase | None = None) -> None:
        """Label gradients and optimizer state that no hook has seen: those that can be new when ``phase`` ends, by default all."""
        if phase in ("forward", "loss"):
            return
        model = self._model()
        if model is not None:
            with_gradient = [p for p in model.parameters() if p.grad is not None]
            names = [self._names.get(id(p), "") for p in with_gradient]
            self._label([p.grad for p in with_gradient], "gradients", names=names)
        for reference in self._optimizers if phase != "backward" else ():
            optimizer = reference()
            for parameter, state in [] if optimizer is None else list(optimizer.state.items()):
                tensors = list(_tensors_in(state))
                name = self._names.get(id(parameter), "")
                self._label(tensors, "optimizer state", names=[name] * len(tensors))

    def remove(self) -> None:
        """Take all hooks away."""
        for handle in self._handles:
            handle.remove()


def _tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, dict):
        yield from _tensors_in(list(value.values()))
    elif isinstance(value, (list, tuple)):
        for item in value:
            yield from _tensors_in(item)


def _in_backward() -> bool:
    return torch._C._current_graph_task_id() != -1


def _highest_of_stretches(allocated: list[int], max_points: int | None) -> list[int]:
    """Return at most ``max_points`` positions in order: of each stretch, where ``allocated`` is highest."""
    count = len(allocated)
    if max_points is None or count <= max_points:
        return list(range(count))
    edges = [count * point // max_points for point in range(max_points + 1)]
    return [max(range(start, end), key=allocated.__getitem__) for start, end in pairwise(edges)]
