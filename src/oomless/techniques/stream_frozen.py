"""Frozen linear layers and experts in pinned host memory: each weight comes to the device when a product needs it, and goes.

Saves: all frozen weights but two. Costs: as much pinned host memory, and the bus, which carries every weight once for each
product with it: forward, backward, and the recomputation between where there is checkpointing. The last resort. While one
weight is used the next one comes (``fetched.py``). Of several GPUs each keeps a part on the host (``peers.py``), or with
``sharding: replicate`` all of it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.frozen_linear import RowLayout
from oomless.techniques import frozen_layers
from oomless.techniques.fetched import Coming, Fetched
from oomless.techniques.frozen_layers import FrozenLinear
from oomless.techniques.peers import Peers


class StreamedLinear(FrozenLinear):
    """A frozen linear layer whose weight lies on the host, or of ``peers`` each one's part of it."""

    form = "on the host"

    def __init__(
        self, layer: nn.Linear | Conv1D, device: Device, take: Callable[[Any], list[Tensor]], peers: Peers | None
    ) -> None:
        super().__init__(layer)
        self.on_host, self.take, self.peers = device, take, peers
        self.layout = RowLayout(self.shape, None, layer.weight.dtype)
        self.host = torch.empty(0)

    @property
    def own_rows(self) -> list[Tensor]:
        """What this process keeps of the one row of bytes where each of several keeps a part."""
        return [self.host]

    @property
    def whole_sizes(self) -> list[int]:
        """The bytes of the whole row."""
        return self.layout.sizes

    def unpack_stored(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.layout.unpack(self.take(self), dtype, self.host)

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, piece: None = None) -> None:  # noqa: D102
        (size,) = self.whole_sizes
        with device.host():
            weight = torch.empty(self.shape, dtype=dtype) if host is None else host.to(dtype)
            kept = size if self.peers is None else self.peers.part(size)
            like = torch.empty(kept, dtype=torch.uint8, device="meta")
        self.host = device.pinned_like(like)
        if self.peers is None:
            self.layout.write(weight, [self.host], self.host)
        else:
            self.peers.keep(weight.flatten().view(torch.uint8), self.host)


def replace(model: Any, device: Device, trained: list[nn.Module], peers: Peers | None = None) -> None:
    """Have the linear layers and experts of ``model`` that do not train on the host; see ``frozen_layers.replace``.

    Of ``peers`` each keeps a part of them there; by default all is here.

    Raises:
        ConfigError: the device is the plain CPU, there is nothing to replace, or most of the body would stay as it is.
    """
    if device.capacity_bytes is None:
        raise ConfigError("stream_frozen has no effect on a CPU, whose memory is the host's; remove it")

    def fetch(layer: StreamedLinear) -> Coming:
        target = torch.empty(layer.host.shape, dtype=layer.host.dtype, device=device.torch_device)
        device.label([target], "weights")
        return target, device.start_copy(layer.host, target)

    fetched = Fetched(model, fetch, across_layers=True)

    def take(layer: StreamedLinear) -> list[Tensor]:
        return [fetched.take(layer)] if peers is None else peers.whole(layer)

    frozen_layers.replace(
        model,
        lambda layer: StreamedLinear(layer, device, take, peers),
        trained,
        key="stream_frozen",
        host=device,
        peers=peers,
    )
