"""Frozen bytes of which each GPU keeps a part: what is packed in 4 or 8 bits, or lies on the host, is cut, and gathered for each product.

Saves: with n GPUs all but 1/n of the frozen weights, on the device or in the host's memory, which then has them once for all
GPUs; while one is used, it and the next one are whole. Costs: the bytes of every weight come over the links for each product with it:
in forward, in backward, and in the recomputation between where there is checkpointing. Nothing of it trains, so nothing goes back. From
the host each GPU brings its part over its own bus, into the place where the parts of the others then come.

A weight is a row or two of bytes, and process r keeps the r-th of as many even parts of each; the last is padded. All processes must ask for the
same weights in the same order. Layers on the device do not fetch ahead for each other: each begins as the others do, which a rehearsal relies on.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from oomless.memory.device import Device
from oomless.techniques.fetched import Coming, Fetched

_ALIGNED = 16
all_gather = getattr(dist, "all_gather_single", dist.all_gather_into_tensor)
"""The second is its name before torch 2.13."""


class Peers:
    """The processes that keep parts of the frozen weights of ``model``, which lies on ``device``.

    ``across_layers`` says whether the weight that comes next may be of another layer.
    """

    def __init__(self, model: nn.Module, mesh: DeviceMesh, device: Device, *, across_layers: bool = False) -> None:
        self._mesh, self._count, self._rank = mesh, mesh.size(), mesh.get_local_rank()
        self._device = device
        self._fetched = Fetched(model, self._gather, across_layers=across_layers)

    def whole_size(self, size: int) -> int:
        """Return how many bytes the parts of ``size`` bytes are together."""
        return self._count * self.part(size)

    def part(self, size: int) -> int:
        """Return how many of ``size`` bytes each process keeps, padding included."""
        return -(-size // (self._count * _ALIGNED)) * _ALIGNED

    def keep(self, piece: Tensor, part: Tensor, start: int = 0) -> None:
        """Copy into ``part``, this process's, what it keeps of ``piece``, bytes that begin at ``start`` of the whole."""
        begin = self._rank * part.numel()
        low, high = max(begin, start), min(begin + part.numel(), start + piece.numel())
        if low < high:
            part[low - begin : high - begin].copy_(piece[low - start : high - start])

    def whole(self, layer: Any) -> list[Tensor]:
        """Return the whole rows of the weight of ``layer``, whose ``own_rows`` are this process's; every process has to ask."""
        rows = self._rows(self._fetched.take(layer), layer)
        return [row[:size] for row, size in zip(rows, layer.whole_sizes, strict=True)]

    def _rows(self, gathered: Tensor, layer: Any) -> tuple[Tensor, ...]:
        return torch.split(gathered, [self._count * own.numel() for own in layer.own_rows])

    def _gather(self, layer: Any) -> Coming:
        size = self._count * sum(own.numel() for own in layer.own_rows)
        gathered = torch.empty(size, dtype=torch.uint8, device=self._device.torch_device)
        self._device.label([gathered], "weights")
        bring = self.bring if layer.on_host is None else self.bring_from_host
        coming = [bring(own, row) for row, own in zip(self._rows(gathered, layer), layer.own_rows, strict=True)]

        def wait() -> None:
            for arrived in coming:
                arrived()

        return gathered, wait

    def bring(self, own: Tensor, whole: Tensor) -> Callable[[], None]:
        """Begin to gather in ``whole`` what all processes keep, of which ``own`` is this one's; call what is returned before it is read."""
        arrived: Callable[[], None] = all_gather(whole, own, group=self._mesh.get_group(), async_op=True).wait
        return arrived

    def bring_from_host(self, own: Tensor, whole: Tensor) -> Callable[[], None]:
        """Do the same where what each keeps lies on the host."""
        here = whole[self._rank * own.numel() :][: own.numel()]
        copied = self._device.start_copy(own, here)
        with self._device.after_copies():
            gathered = self.bring(here, whole)

        def wait() -> None:
            copied()
            gathered()

        return wait
