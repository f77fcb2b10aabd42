"""Frozen linear layers and experts in pinned host memory: each weight comes to the device when a product needs it, and goes.

Saves: all frozen weights but two. Costs: as much pinned host memory, and the bus, which carries every weight once for each
product with it: forward, backward, and the recomputation between where there is checkpointing. The last resort. While one
weight is used the next one comes: which is next is what came next the time before.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.techniques import frozen_layers, in_flight
from oomless.techniques.frozen_layers import FrozenLinear


class StreamedLinear(FrozenLinear):
    """A frozen linear layer whose weight lies on the host."""

    form = "on the host"

    def __init__(self, layer: nn.Linear, stream: _Stream) -> None:
        super().__init__(layer)
        self.stream = stream
        self.host = torch.empty(0)

    @property
    def stored(self) -> _Streamed:  # noqa: D102
        return _Streamed(self)

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, piece: None = None) -> None:  # noqa: D102
        with device.host():
            weight = torch.empty(self.shape, dtype=dtype) if host is None else host.to(dtype)
        self.host = device.pinned_like(weight)
        self.host.copy_(weight)


@dataclass(frozen=True, slots=True)
class _Streamed:
    layer: StreamedLinear

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the weight on the device."""
        return self.layer.stream.take(self.layer).to(dtype)


class _Stream:
    """Brings weights to the device, the next one while one is used."""

    def __init__(self, device: Device) -> None:
        self.device = device
        self._after: dict[tuple[int, int], weakref.ref[StreamedLinear]] = {}
        self._last = (0, 0)
        self._coming: tuple[StreamedLinear, Tensor, Callable[[], None]] | None = None

    def take(self, layer: StreamedLinear) -> Tensor:
        """Return the weight of ``layer`` on the device, and begin to fetch the one that came after it the last time."""
        if self._coming is not None and self._coming[0] is not layer:
            self._drop()
        coming, self._coming = self._coming or self._fetch(layer), None
        _, weight, wait = coming
        wait()
        # Two layers say where in forward, recomputation or backward this is, which decides what comes next.
        self._after[self._last] = weakref.ref(layer)
        self._last = (self._last[1], id(layer))
        following = self._after.get(self._last)
        expected = None if following is None else following()
        if expected is not None:
            self._coming = self._fetch(expected)
        return weight

    def clear(self) -> None:
        """Let go of what is on the device, as after a step that was cut short; the next one comes by as the first did."""
        self._drop()
        self._last = (0, 0)

    def _drop(self) -> None:
        if self._coming is not None:
            _, _, wait = self._coming
            wait()
            self._coming = None

    def _fetch(self, layer: StreamedLinear) -> tuple[StreamedLinear, Tensor, Callable[[], None]]:
        target = torch.empty(layer.host.shape, dtype=layer.host.dtype, device=self.device.torch_device)
        self.device.label([target], "weights")
        return layer, target, self.device.start_copy(layer.host, target)


def replace(model: Any, device: Device, trained: list[nn.Module]) -> None:
    """Have the linear layers and experts of ``model`` that do not train on the host; see ``frozen_layers.replace``.

    Raises:
        ConfigError: the device is the plain CPU, there is nothing to replace, or most of the body would stay as it is.
    """
    if device.capacity_bytes is None:
        raise ConfigError("stream_frozen has no effect on a CPU, whose memory is the host's; remove it")
    stream = _Stream(device)
    in_flight.note(model, stream.clear)
    frozen_layers.replace(model, lambda layer: StreamedLinear(layer, stream), trained, key="stream_frozen", host=device)
