"""Frozen linear layers and experts in pinned host memory: each weight comes to the device when a product needs it, and goes.

Saves: all frozen weights but two. Costs: as much pinned host memory, and the bus, which carries every weight once for each
product with it: forward, backward, and the recomputation between where there is checkpointing. The last resort. While one
weight is used the next one comes (``fetched.py``).
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.techniques import frozen_layers
from oomless.techniques.fetched import Coming, Fetched
from oomless.techniques.frozen_layers import FrozenLinear


class StreamedLinear(FrozenLinear):
    """A frozen linear layer whose weight lies on the host."""

    form = "on the host"

    def __init__(self, layer: nn.Linear | Conv1D, fetched: Fetched) -> None:
        super().__init__(layer)
        self.fetched = fetched
        self.host = torch.empty(0)

    def unpack_stored(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        return self.fetched.take(self).to(dtype)

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, piece: None = None) -> None:  # noqa: D102
        with device.host():
            weight = torch.empty(self.shape, dtype=dtype) if host is None else host.to(dtype)
        self.host = device.pinned_like(weight)
        self.host.copy_(weight)


def replace(model: Any, device: Device, trained: list[nn.Module]) -> None:
    """Have the linear layers and experts of ``model`` that do not train on the host; see ``frozen_layers.replace``.

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
    frozen_layers.replace(
        model, lambda layer: StreamedLinear(layer, fetched), trained, key="stream_frozen", host=device
    )
