"""Keep the inputs of checkpointed layers in host memory, on their way out and back while the GPU computes.

Saves: tokens x width x 2 bytes (in 16 bits) for every checkpointed layer but two. Costs: as much pinned host memory, and
the bus: each input goes out in forward and comes back in backward, copied on a stream of its own. Two buffers are enough:
forward waits for the copy of a layer's input when the next one's begins, backward fetches the next one's when it takes a
layer's. The last layer's input stays where it is, since backward takes it first.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.techniques import in_flight

Wait = Callable[[], None]


def apply(model: Any, layers: list[nn.Module], device: Device) -> None:
    """Have the inputs of ``layers`` of ``model``, all checkpointed and in forward's order, wait for backward in host memory.

    Raises:
        ConfigError: the device is the plain CPU, or there is but one layer.
    """
    if device.capacity_bytes is None:
        raise ConfigError("offload_activations has no effect on a CPU, whose memory is the host's; remove it")
    if len(layers) < 2:
        raise ConfigError(
            "offload_activations has no effect with a single checkpointed layer, whose input backward takes first; remove it"
        )
    store = _Store(device, last=len(layers) - 1)
    in_flight.note(model, store.clear)
    _apply(layers, store)


def _apply(layers: list[Any], store: _Store) -> None:
    for number, layer in enumerate(layers):
        layer._gradient_checkpointing_func = partial(
            _checkpoint_offloaded, store, number, layer._gradient_checkpointing_func
        )


def is_offloaded(layer: Any) -> bool:
    """Return whether the inputs of ``layer`` wait in host memory."""
    function = getattr(layer, "_gradient_checkpointing_func", None)
    return isinstance(function, partial) and function.func is _checkpoint_offloaded


def goes_out(layer: Any) -> bool:
    """Return whether the inputs of ``layer`` go to the host, which the last one's do not."""
    if not is_offloaded(layer):
        return False
    store, number, _ = layer._gradient_checkpointing_func.args
    return bool(number != store.last)


class Offloading:
    """The same for a while: inside ``on``. What the layers need of the host is kept from one time to the next."""

    def __init__(self, layers: list[Any], device: Device) -> None:
        """Take two or more ``layers`` in forward's order, which are checkpointed whenever this is on."""
        self._layers, self._device = layers, device
        self._store = _Store(device, last=len(layers) - 1)

    @contextmanager
    def on(self) -> Iterator[None]:
        """Inside, the inputs of the layers wait for backward in host memory."""
        before = [layer._gradient_checkpointing_func for layer in self._layers]
        _apply(self._layers, self._store)
        try:
            yield
        finally:
            self._store.clear()
            for layer, function in zip(self._layers, before, strict=True):
                layer._gradient_checkpointing_func = function


def _checkpoint_offloaded(
    store: _Store, number: int, checkpoint: Any, function: Any, hidden: Tensor, *args: Any
) -> Any:
    """Run ``checkpoint(function, hidden, *args)``; what it saves of ``hidden`` goes to the host."""
    if not torch.is_grad_enabled():
        return checkpoint(function, hidden, *args)
    storage = hidden.untyped_storage()._cdata

    def pack(saved: Tensor) -> Any:
        saved = saved.detach()  # what is packed must not hold the operator that holds it
        return store.send(number, saved) if saved.untyped_storage()._cdata == storage else saved

    def unpack(packed: Any) -> Tensor:
        return store.take(packed) if isinstance(packed, _Sent) else packed

    with saved_tensors_hooks(pack, unpack):
        return checkpoint(function, hidden, *args)


class _Sent(NamedTuple):
    """An input that was handed to the store."""

    number: int
    here: Tensor | None
    """The input itself where it stayed on the device."""


class _Store:
    """The inputs of one model's layers, by the number of the layer; backward takes them in the reverse of forward's order."""

    def __init__(self, device: Device, last: int) -> None:
        self.device = device
        self.last = last
        self._hosts: list[Tensor] = []
        self._leaving: tuple[Tensor, Wait] | None = None
        self._coming: tuple[Tensor, Wait] | None = None

    def send(self, number: int, tensor: Tensor) -> _Sent:
        """Begin to copy ``tensor`` out, unless it is the last; the one before it may be freed from now on."""
        self._release()
        if number == self.last:
            return _Sent(number, tensor)
        if not self._hosts or self._hosts[number].shape != tensor.shape:
            self._hosts = []
            self._hosts = [self.device.pinned_like(tensor) for _ in range(self.last)]
        self._leaving = (tensor, self.device.start_copy(tensor, self._hosts[number]))
        return _Sent(number, None)

    def take(self, sent: _Sent) -> Tensor:
        """Return what was sent, on the device, and begin to fetch the one before it."""
        tensor = sent.here
        if tensor is None:
            tensor, wait = self._coming or self._fetched(sent.number)
            self._coming = None
            wait()
        if sent.number > 0:
            self._coming = self._fetched(sent.number - 1)
        return tensor

    def clear(self) -> None:
        """Let go of what is on the device, as after a step that was cut short."""
        self._release()
        if self._coming is not None:
            _, wait = self._coming
            wait()
            self._coming = None

    def _fetched(self, number: int) -> tuple[Tensor, Wait]:
        host = self._hosts[number]
        target = torch.empty(host.shape, dtype=host.dtype, device=self.device.torch_device)
        self.device.label([target], "saved activations")
        return target, self.device.start_copy(host, target)

    def _release(self) -> None:
        if self._leaving is not None:
            _, wait = self._leaving
            wait()
            self._leaving = None
