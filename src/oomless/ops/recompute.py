"""Keep how a tensor was made instead of the tensor, where an operator says that making it again is cheap.

Saves: inside ``recomputing()`` what autograd would keep of an offered tensor (a norm's output under three projections, a
gated product under the last one): nothing, since what it is made from is kept anyway. Costs: making it again once in
backward, for all of its users together. Gradient checkpointing, the alternative, makes everything between two points again,
matrix products too.

An operator of this room calls ``offer(output, compute)``. Whatever then saves ``output`` or a view of it for backward gets a
handle in its place. Outside of ``recomputing()`` an offer does nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.multiprocessing.reductions import StorageWeakRef


class _Offer:
    """One tensor that can be made again."""

    def __init__(self, output: Tensor, compute: Callable[[], Tensor]) -> None:
        # While the weak reference lives, no other storage can have this one's address.
        self.storage = StorageWeakRef(output.untyped_storage())  # type: ignore[no-untyped-call]
        self.dtype = output.dtype
        self.compute = compute
        self.users = 0
        self.kept: Tensor | None = None

    def take(self) -> Tensor:
        """Return the tensor, kept from the first user in backward to the last."""
        value = self.compute() if self.kept is None else self.kept
        self.users -= 1
        self.kept = value if self.users > 0 else None
        return value


_offers: ContextVar[dict[int, _Offer] | None] = ContextVar("offers", default=None)


def offer(output: Tensor, compute: Callable[[], Tensor]) -> None:
    """Let ``compute()``, which returns the contiguous ``output`` again, stand for it where it is saved for backward.

    ``compute`` must hold only what is kept for backward anyway.
    """
    offers = _offers.get()
    if offers is not None and torch.is_grad_enabled():
        offers[output.untyped_storage()._cdata] = _Offer(output, compute)


@contextmanager
def recomputing() -> Iterator[None]:
    """Keep for the backward of what runs inside, instead of offered tensors, how they are made."""
    offers: dict[int, _Offer] = {}

    def pack(saved: Tensor) -> Any:
        found = offers.get(saved.untyped_storage()._cdata)
        if found is None or found.storage.expired() or found.dtype != saved.dtype:  # type: ignore[no-untyped-call]
            return saved.detach()  # an output that came as it is would hold the operator that holds it, for ever
        found.users += 1
        return found, saved.shape, saved.stride(), saved.storage_offset()

    def unpack(packed: Any) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        found, shape, stride, offset = packed
        again: Tensor = found.take().as_strided(shape, stride, offset)
        return again

    token = _offers.set(offers)
    try:
        with torch.autograd.graph.saved_tensors_hooks(pack, unpack):
            yield
    finally:
        _offers.reset(token)
