"""Frozen bytes of which each GPU keeps a part: what is packed in 4 or 8 bits is cut, and gathered as bytes for each product.

Saves: with n GPUs all but 1/n of the packed weights; while one is used, it and the next one are whole. Costs: the bytes of every
weight come over the links for each product with it: in forward, in backward, and in the recomputation between where there is
checkpointing. Nothing of it trains, so nothing goes back.

A weight is a row or two of bytes, and process r keeps the r-th of as many even parts of each; the last is padded. All processes must ask for the
same weights in the same order. Layers do not fetch ahead for each other: each begins as the others do, which a rehearsal relies on.
"""

from __future__ import annotations

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
    """The processes that keep parts of the frozen weights of ``model``, which lies on ``device``."""

    def __init__(self, model: nn.Module, mesh: DeviceMesh, device: Device) -> None:
        self._group, self._count, self._rank = mesh.get_group(), mesh.size(), mesh.get_local_rank()
        self._device = device
        self._fetched = Fetched(model, self._gather, across_layers=False)

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
        works = [
            all_gather(row, own, group=self._group, async_op=True)
            for row, own in zip(self._rows(gathered, layer), layer.own_rows, strict=True)
        ]

        def wait() -> None:
            for work in works:
                work.wait()

        return gathered, wait
