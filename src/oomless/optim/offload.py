"""Optimizer state in pinned host memory: slices come to the device, are updated, and go back.

Saves: the state, 2 to 12 bytes a parameter, for all but three slices. Costs: as much pinned host memory, and the bus, over which
all of it goes out and back at every step; one slice comes and one leaves while another is updated.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager
from typing import Any, Protocol

import torch
from torch import Tensor

SMALLEST_OFFLOADED = 1 << 16
"""Parameters of fewer elements (norms, biases) keep their state on the device: their copies would cost more than they save."""

State = dict[str, Tensor]


class HostMemory(Protocol):
    """What offloading asks of a device; ``memory.device.Device`` is one."""

    torch_device: torch.device

    def host(self) -> AbstractContextManager[None]:
        """Tensors created inside lie on the host."""

    def put(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` of the host on the device."""

    def fetch(self, tensor: Tensor) -> Tensor:
        """Return ``tensor`` of the device on the host."""

    def pinned_like(self, tensor: Tensor) -> Tensor:
        """Return new pinned host memory of its shape and dtype."""

    def start_copy(self, source: Tensor, target: Tensor) -> Callable[[], None]:
        """Begin to copy; call what is returned before ``target`` is read or ``source`` changed."""

    def label(self, tensors: Any, category: Any) -> None:
        """Say what ``tensors`` are for."""


def to_host(state: State, names: frozenset[str], device: HostMemory) -> State:
    """Empty ``state``, which was made on the host, into one with ``names`` in pinned host memory and the rest on ``device``.

    One tensor after the other: the host holds no second state.
    """
    placed = {}
    for name in list(state):
        tensor = state.pop(name)
        if name in names:
            placed[name] = device.pinned_like(tensor)
            placed[name].copy_(tensor)
        else:
            placed[name] = device.put(tensor)
    return placed


def staged(
    pieces: Iterable[slice], cut: Callable[[slice], State], names: frozenset[str], device: HostMemory
) -> Iterator[tuple[slice, State]]:
    """Yield each piece with what ``cut`` gives of the state, ``names`` of it copied to ``device``; changes are copied back."""

    def fetch(piece: slice) -> tuple[State, State, list[Callable[[], None]]]:
        part = cut(piece)
        hosts = {name: tensor for name, tensor in part.items() if name in names}
        here = {name: torch.empty(t.shape, dtype=t.dtype, device=device.torch_device) for name, t in hosts.items()}
        device.label(here.values(), "optimizer state")
        return part | here, hosts, [device.start_copy(hosts[name], here[name]) for name in hosts]

    remaining = iter(pieces)
    piece = next(remaining, None)
    coming = None if piece is None else fetch(piece)
    leaving: tuple[State, list[Callable[[], None]]] = ({}, [])
    while piece is not None and coming is not None:
        part, hosts, waits = coming
        _finish(waits)
        following = next(remaining, None)
        coming = None if following is None else fetch(following)
        yield piece, part
        _finish(leaving[1])
        leaving = (part, [device.start_copy(part[name], hosts[name]) for name in hosts])
        piece = following
    _finish(leaving[1])


def _finish(waits: list[Callable[[], None]]) -> None:
    for wait in waits:
        wait()
