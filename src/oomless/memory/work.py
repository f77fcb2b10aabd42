"""What a rehearsal would compute and move: floating-point operations, bytes of device memory, bytes over the host's link.

Every operator of the step is counted as it is dispatched, so recomputation, dequantisation, chunks and offloading are counted
because they happen. Matrix products and attention take their operations from torch's own FLOP counter; everything else counts
for the memory that it reads and writes. Views cost nothing.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop_count, sdpa_flop_count

aten = torch.ops.aten
Cost = tuple[str, int, int]
"""The rate that applies (``fp32``, ``fp16``, ``bf16``), floating-point operations, bytes read and written."""

_RATES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_ROWS_ALONE = frozenset({aten.embedding.default, aten.index_select.default, aten.gather.default, aten.index.Tensor})
"""These read as much of their first argument as they return, not all of it."""


def _cpu_flash(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    return int(sdpa_flop_count(query.shape, key.shape, value.shape))  # type: ignore[no-untyped-call]


def _cpu_flash_backward(gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
    shapes = (gradient.shape, query.shape, key.shape, value.shape)
    return int(sdpa_backward_flop_count(*shapes))  # type: ignore[no-untyped-call]


_CPU_ATTENTION: dict[Any, Any] = {
    aten._scaled_dot_product_flash_attention_for_cpu: _cpu_flash,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: _cpu_flash_backward,
}


@dataclass(frozen=True, kw_only=True, slots=True)
class Work:
    """The work of one optimizer step."""

    passes: int
    """Forward and backward passes that ``of_passes`` counts together."""

    of_passes: tuple[tuple[Cost, int], ...]
    """Costs of the operators of all these passes, and how often each occurs."""

    of_update: tuple[tuple[Cost, int], ...]
    """The same for the optimizer's update."""

    link_bytes_of_passes: int
    """What goes over the link to the host, in both directions together."""

    link_bytes_of_update: int

    def flops(self) -> dict[str, int]:
        """Return the floating-point operations of passes and update by the rate that applies."""
        total: Counter[str] = Counter()
        for (rate, flops, _), count in (*self.of_passes, *self.of_update):
            total[rate] += flops * count
        return {rate: flops for rate, flops in total.items() if flops}

    @classmethod
    def from_dict(cls, plain: Mapping[str, Any]) -> Work:
        """Return the work that ``dataclasses.asdict`` gave, also after a round trip through JSON."""
        costs = {
            name: tuple(((str(cost[0]), int(cost[1]), int(cost[2])), int(count)) for cost, count in plain[name])
            for name in ("of_passes", "of_update")
        }
        return cls(**{**plain, **costs})


class WorkCounter:
    """Counts what is dispatched while it is ``on``."""

    def __init__(self) -> None:
        self.on = False
        self._known: dict[Any, Cost] = {}
        self._update = False
        self._costs: tuple[Counter[Cost], Counter[Cost]] = (Counter(), Counter())
        self._link = [0, 0]

    def operator(self, key: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, result: Any) -> None:
        """Count one call of ``func``; calls of one ``key`` cost the same."""
        cost = self._known.get(key)
        if cost is None:
            cost = self._known[key] = cost_of(func, args, kwargs or {}, result)
        self._costs[self._update][cost] += 1

    def link(self, size_bytes: int) -> None:
        """Count bytes that go to or come from the host."""
        if self.on:
            self._link[self._update] += size_bytes

    @contextmanager
    def update(self) -> Iterator[None]:
        """What is counted inside belongs to the optimizer's update."""
        before, self._update = self._update, True
        try:
            yield
        finally:
            self._update = before

    def snapshot(self) -> tuple[Counter[Cost], int]:
        """Return the update's counts so far, for ``repeat``."""
        return Counter(self._costs[1]), self._link[1]

    def since(self, before: tuple[Counter[Cost], int]) -> tuple[Counter[Cost], int]:
        """Return what the update has counted since ``before``."""
        return self._costs[1] - before[0], self._link[1] - before[1]

    def repeat(self, counted: tuple[Counter[Cost], int]) -> None:
        """Count again what ``since`` returned."""
        self._costs[1].update(counted[0])
        self._link[1] += counted[1]

    def work(self, passes: int) -> Work:
        """Return what was counted, of ``passes`` passes and one update."""
        return Work(
            passes=passes,
            of_passes=tuple(self._costs[0].items()),
            of_update=tuple(self._costs[1].items()),
            link_bytes_of_passes=self._link[0],
            link_bytes_of_update=self._link[1],
        )


def cost_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Cost:
    """Return what one call of the operator ``func`` costs."""
    packet = getattr(func, "overloadpacket", func)
    given, made = list(_tensors([*args, *kwargs.values()])), list(_tensors([result]))
    floating = next((t.dtype for t in given or made if t.is_floating_point()), torch.float32)
    rate = _RATES.get(floating, "fp32")
    moved = sum(t.numel() * t.element_size() for t in made)
    moved += moved if func in _ROWS_ALONE else sum(t.numel() * t.element_size() for t in given)
    if packet in _CPU_ATTENTION:
        return rate, _CPU_ATTENTION[packet](*args), moved
    counter = flop_registry.get(packet)
    return rate, int(counter(*args, **kwargs, out_val=result)) if counter is not None else 0, moved


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
