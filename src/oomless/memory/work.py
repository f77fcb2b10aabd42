"""What a rehearsal would compute and move: floating-point operations, bytes of device memory, bytes over the links.

Every operator of the step is counted as it is dispatched, so recomputation, dequantisation, chunks and offloading are counted
because they happen. Matrix products take their operations from torch's own FLOP counter. Attention is counted here, because that
counter takes every pair of tokens where a causal kernel skips half. All else counts for the memory that it reads and writes,
which the operator's schema tells: what it takes, what it changes, what it makes. Views and memory that is only set aside cost
nothing. Copies over the host's link count there and not as operators. What several GPUs gather, scatter and sum counts for what
each of them sends, which is what it receives, as in a ring.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import flop_registry

aten = torch.ops.aten
Cost = tuple[str, int, int]
"""The rate that applies (``fp32``, ``fp16``, ``bf16``), floating-point operations, bytes read and written."""

Counted = tuple[tuple[Counter[Cost], int, int], ...]
"""Costs, bytes over the link and bytes exchanged, of passes and of the update."""

_RATES = {torch.float16: "fp16", torch.bfloat16: "bf16"}
_SETTING_ASIDE = frozenset({aten.empty, aten.empty_like, aten.empty_strided, aten.new_empty, aten.new_empty_strided})
_OVERWRITING = frozenset(
    {
        *(aten.copy_, aten.zero_, aten.fill_, aten.bernoulli_, aten.normal_, aten.uniform_, aten.random_),
        *(aten.zeros_like, aten.ones_like, aten.full_like, aten.new_zeros, aten.new_ones, aten.new_full),
        *(aten.rand_like, aten.randn_like),
    }
)
"""These do not read their first argument."""

_GATHERING = frozenset({aten.embedding, aten.index_select, aten.gather, aten.index})
"""These read as much of their first argument as they return."""

_SCATTERING = frozenset({aten.scatter_, aten.scatter_add_, aten.index_add_, aten.index_copy_, aten.index_put_})
"""These change as much of their first argument as the largest other one has."""

_UNKNOWN = object()
_COLLECTIVES = "c10d::"
_OUT_OF_PLACE = {aten.addmm_: aten.addmm, aten.baddbmm_: aten.baddbmm}
"""What torch's counter does not know under the name that changes its first argument."""

_ATTENTION = frozenset(
    {
        aten._scaled_dot_product_efficient_attention,
        aten._scaled_dot_product_flash_attention,
        aten._scaled_dot_product_flash_attention_for_cpu,
    }
)
_ATTENTION_BACKWARD = frozenset(
    {
        aten._scaled_dot_product_efficient_attention_backward,
        aten._scaled_dot_product_flash_attention_backward,
        aten._scaled_dot_product_flash_attention_for_cpu_backward,
    }
)


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

    exchanged_bytes_of_passes: int = 0
    """What each of several GPUs sends to others in all these passes."""

    exchanged_bytes_of_update: int = 0
    """Once a step: gradients that every GPU holds whole; else a few numbers."""

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
        self._known: dict[Any, Any] = {}
        self._update = False
        self._begin(passes=1)
        self.on = False

    def count(self, passes: int) -> None:
        """Begin afresh, for a step of so many ``passes``; 0 leaves it at what was counted."""
        self.on = passes > 0
        if self.on:
            self._begin(passes)

    def _begin(self, passes: int) -> None:
        self._passes = passes
        self._costs: tuple[Counter[Cost], Counter[Cost]] = (Counter(), Counter())
        self._link = [0, 0]
        self._exchanged = [0, 0]

    def operator(self, key: Any, func: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, result: Any) -> None:
        """Count one call of ``func``; calls of one ``key`` cost the same."""
        if _is_collective(func):
            self._exchanged[self._update] += exchanged_bytes(args)
            return
        cost = self._known.get(key, _UNKNOWN)  # once: the key is long, and hashed anew each time
        if cost is _UNKNOWN:
            cost = self._known[key] = cost_of(func, args, kwargs or {}, result)
        if cost is not None:
            self._costs[self._update][cost] += 1

    def link(self, size_bytes: int) -> AbstractContextManager[None]:
        """Count what is done inside as ``size_bytes`` that go to or come from the host, not as operators."""
        self._link[self._update] += size_bytes * self.on
        return self.paused()

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Count nothing inside."""
        on, self.on = self.on, False
        try:
            yield
        finally:
            self.on = on

    @contextmanager
    def update(self) -> Iterator[None]:
        """What is counted inside belongs to the optimizer's update."""
        before, self._update = self._update, True
        try:
            yield
        finally:
            self._update = before

    def snapshot(self) -> Counted:
        """Return the counts so far, for ``since``."""
        return tuple(
            (Counter(costs), link, exchanged)
            for costs, link, exchanged in zip(self._costs, self._link, self._exchanged, strict=True)
        )

    def since(self, before: Counted) -> Counted:
        """Return what was counted since ``before``, for ``repeat``."""
        return tuple(
            (costs - earlier[0], link - earlier[1], exchanged - earlier[2])
            for (costs, link, exchanged), earlier in zip(self.snapshot(), before, strict=True)
        )

    def repeat(self, counted: Counted) -> None:
        """Count again what ``since`` returned, if anything is counted now."""
        for place, (costs, link, exchanged) in enumerate(counted if self.on else ()):
            self._costs[place].update(costs)
            self._link[place] += link
            self._exchanged[place] += exchanged

    def work(self) -> Work:
        """Return what was counted, of some passes and one update."""
        return Work(
            passes=self._passes,
            of_passes=tuple(self._costs[0].items()),
            of_update=tuple(self._costs[1].items()),
            link_bytes_of_passes=self._link[0],
            link_bytes_of_update=self._link[1],
            exchanged_bytes_of_passes=self._exchanged[0],
            exchanged_bytes_of_update=self._exchanged[1],
        )


def cost_of(func: Any, args: Sequence[Any], kwargs: Mapping[str, Any], result: Any) -> Cost | None:
    """Return what one call of the operator ``func`` costs; ``None`` where the GPU has nothing to do."""
    packet = getattr(func, "overloadpacket", func)
    if packet in _SETTING_ASIDE or _only_looks(func):
        return None
    schema = func._schema
    given = {
        argument.name: argument.default_value for argument in schema.arguments
    }  # what is left out is as the schema says
    given |= {argument.name: value for argument, value in zip(schema.arguments, args, strict=False)} | dict(kwargs)
    taken = [tensor for value in given.values() for tensor in _tensors([value])]
    if not taken and isinstance(result, Tensor):
        taken = [result]
    floating = next((tensor.dtype for tensor in taken if tensor.is_floating_point()), torch.float32)
    return _RATES.get(floating, "fp32"), _flops(packet, args, kwargs, given, result), _moved(func, given, result)


@cache
def _is_collective(func: Any) -> bool:
    return bool(func._schema.name.startswith(_COLLECTIVES))


def exchanged_bytes(args: Sequence[Any]) -> int:
    """Return what one process sends in a collective: gathering, scattering (of output and input), or summing what comes first."""
    first, second = _size_bytes(args[0]), _size_bytes(args[1])
    return abs(first - second) if second else 2 * first  # a sum is scattered and gathered; less where processes are few


@cache
def _only_looks(func: Any) -> bool:
    """Say whether ``func`` returns views of its arguments, or no tensors and changes none."""
    returns = [returned for returned in func._schema.returns if "Tensor" in str(returned.type)]
    if func._schema.is_mutable:
        return False
    return all(returned.alias_info is not None for returned in returns)


def _flops(packet: Any, args: Sequence[Any], kwargs: Mapping[str, Any], given: Mapping[str, Any], result: Any) -> int:
    if packet in _ATTENTION or packet in _ATTENTION_BACKWARD:
        (blocks, heads, queries, width), keys = given["query"].shape, given["key"].shape[2]
        widths = (width + given["value"].shape[3]) if packet in _ATTENTION else 3 * width + 2 * given["value"].shape[3]
        pairs = queries * (queries + 1) // 2 if given["is_causal"] and queries == keys else queries * keys
        return int(2 * blocks * heads * pairs * widths)
    counter = flop_registry.get(_OUT_OF_PLACE.get(packet, packet))
    return int(counter(*args, **kwargs, out_val=result)) if counter is not None else 0


def _moved(func: Any, given: Mapping[str, Any], result: Any) -> int:
    """Return the bytes that ``func`` reads and writes."""
    packet, schema = func.overloadpacket, func._schema
    total = 0
    for place, argument in enumerate(schema.arguments):
        size = _size_bytes(given.get(argument.name))
        if place == 0 and packet in _GATHERING:
            size = min(size, _size_bytes(result))
        if place == 0 and packet in _SCATTERING:
            others = [t for name, value in given.items() if name != argument.name for t in _tensors([value])]
            size = min(size, max(tensor.numel() for tensor in others) * given[argument.name].element_size())
        changes = argument.alias_info is not None and argument.alias_info.is_write
        reads = not argument.is_out and not (place == 0 and packet in _OVERWRITING)
        total += size * (changes + reads)
    made = result if isinstance(result, (tuple, list)) else (result,)
    new = (part for part, returned in zip(made, schema.returns, strict=False) if returned.alias_info is None)
    return total + _size_bytes(list(new))


def _size_bytes(value: Any) -> int:
    """Return the bytes of the tensors in ``value``; what is expanded lies in memory once."""
    total = 0
    for tensor in _tensors([value]):
        size = tensor.element_size()
        for length, stride in zip(tensor.shape, tensor.stride(), strict=True):
            size *= length if stride or not length else 1
        total += size
    return total


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (list, tuple)):
            yield from _tensors(value)
