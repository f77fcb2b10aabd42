"""Frozen experts of a mixture in 4 or 8 bits, or in pinned host memory, or both.

An architecture's experts are stacks, one tensor for all experts of a layer. A frozen stack is stored here as a row of bytes for
each expert, in the form that ``quantization`` says, on the device or (``experts_on_host``, ``stream_frozen``) on the host.

Saves: the bits as for linear layers, but of nine tenths of the model; on the host, all of it but two rows. Costs: the
rounding, which no training undoes; unpacking one expert at a time, in forward and in backward; on the host, as much pinned
memory, and the bus, which carries the experts to which tokens go. Rows are made while loading, one expert at a time. On the
host, the next expert comes while one is used: which is next is known, for the router has chosen.

Of several GPUs each keeps a part (``peers.py``): on the device of the stack, on the host of every row. Then all experts come to all.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops import mxfp4
from oomless.ops.frozen_linear import Quantization, RowLayout
from oomless.ops.grouped_linear import MatrixOf
from oomless.techniques.peers import Peers

STACKS = ("gate_up_proj", "up_proj", "down_proj", "weight")


def expert_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules of ``model``, with their names, that hold stacks of experts behind transformers' interface."""
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "num_experts"):
            yield name, module


def routing_layers(model: Any) -> set[str]:
    """Return the names of what lies where experts do, linear layers among it: routers, and gates of shared experts."""
    places = {name.rpartition(".")[0] for name, _ in expert_modules(model)}
    return {
        f"{place}.{name}"
        for place in places
        for name, _ in model.get_submodule(place).named_modules()
        if "." not in name or name.startswith(("router.", "gate."))
    }


def stacks_on_device(model: Any) -> Iterator[Tensor]:
    """Yield what the stacks of experts of ``model`` hold on the device."""
    for _, module in expert_modules(model):
        for name in STACKS:
            stack = getattr(module, name, None)
            held = stack.rows if isinstance(stack, FrozenExperts) else stack
            if held is not None:
                yield held


class FrozenExperts(nn.Module):
    """One stack of frozen experts: ``stack``, which is on the meta device, without its tensor.

    Args:
        stack: [E, rows, columns] of each matrix as it lies.
        kind: how the matrices are stored; ``None``: in the stack's dtype.
        host: the device beside whose host memory they are to lie; ``None``: they lie on the device.
        peers: of whom each keeps a part; ``None``: all of it is here.
    """

    def __init__(
        self, stack: nn.Parameter, kind: Quantization | None, host: Device | None, peers: Peers | None = None
    ) -> None:
        super().__init__()
        experts, rows, columns = stack.shape
        self.shape: tuple[int, int, int] = (experts, rows, columns)
        self.kind: Quantization | None = kind
        self.on_host, self.peers = host, peers
        self.code = torch.empty(0)
        self.layout = RowLayout((rows, columns), kind, stack.dtype)
        (self.row_bytes,) = self.layout.sizes
        self.host_rows = torch.empty(0)
        self.register_buffer("rows", None)
        if host is None:
            size = (experts, self.row_bytes) if peers is None else peers.part(*self.whole_sizes)
            self.rows = torch.empty(size, dtype=torch.uint8, device="meta")
        self._is_hf_initialized = True

    @property
    def form(self) -> str:
        """How the matrices are stored, in words."""
        return f"{self.layout.form} on the host" if self.on_host is not None else self.layout.form

    @property
    def pieces(self) -> Sequence[int]:
        """The experts, which ``fill`` takes one by one."""
        return range(self.shape[0])

    def allocate(self) -> None:
        """Set aside what lies on the host."""
        if self.on_host is not None:
            kept = self.row_bytes if self.peers is None else self.peers.part(self.row_bytes)
            with self.on_host.host():
                like = torch.empty(self.shape[0], kept, dtype=torch.uint8, device="meta")
            self.host_rows = self.on_host.pinned_like(like)

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, expert: int) -> None:
        """Store ``host``, the matrix of ``expert`` as the file has it; ``None`` rehearses it, of no particular values."""
        if self.kind is None:
            with device.host():
                matrix = torch.empty(self.shape[1:], dtype=dtype) if host is None else host
                if self.peers is None:
                    self.layout.write(matrix, [self.host_rows[expert]], self.code)
                else:
                    self.peers.keep(matrix.to(dtype).flatten().view(torch.uint8), self.host_rows[expert])
            return
        if host is None:
            weight = torch.empty(self.shape[1:], dtype=dtype, device=device.torch_device)
        else:
            weight = device.put(host, dtype)
        if self.on_host is None and self.peers is None:
            self.layout.write(weight, [self.rows[expert]], self.code)
            return
        row = torch.empty(self.row_bytes, dtype=torch.uint8, device=device.torch_device)
        self.layout.write(weight, [row], self.code)
        if self.peers is None:
            self.host_rows[expert].copy_(device.fetch(row))
        elif self.on_host is None:
            self.peers.keep(row, self.rows, expert * self.row_bytes)
        else:
            self.peers.keep(device.fetch(row), self.host_rows[expert])

    @property
    def own_rows(self) -> list[Tensor]:
        """What this process keeps, one row of all experts, where each of several keeps a part."""
        return [self.rows]

    @property
    def whole_sizes(self) -> list[int]:
        """The bytes of the whole row."""
        return [self.shape[0] * self.row_bytes]

    def matrices(self, experts: Sequence[int]) -> MatrixOf:
        """Return what gives the matrix of each of ``experts``, which are asked for in this order."""
        if self.on_host is not None:
            return _Fetching(self, self.on_host, experts).matrix
        # Which experts have tokens differs from process to process, so all of them are gathered.
        rows = self.rows if self.peers is None else self.peers.whole(self)[0].view(self.shape[0], -1)
        return lambda expert, dtype: self.layout.unpack([rows[expert]], dtype, self.code)


class _Fetching:
    """Brings the rows of ``experts`` to the device in their order, the next one while one is used."""

    def __init__(self, stack: FrozenExperts, device: Device, experts: Sequence[int]) -> None:
        self.stack, self.device = stack, device
        # Which experts have tokens differs from process to process, so all of them are gathered.
        self.order = experts if stack.peers is None else range(stack.shape[0])
        self.places = {expert: place for place, expert in enumerate(self.order)}
        own = [self.places[expert] for expert in experts]
        self.before = dict(zip(own, [-1, *own], strict=False))
        self.last = own[-1] if own else -1
        size = stack.row_bytes if stack.peers is None else stack.peers.whole_size(stack.row_bytes)
        self.slots = torch.empty(2, size, dtype=torch.uint8, device=device.torch_device)
        device.label([self.slots], "weights")
        self.arrived: Callable[[], None] = lambda: None
        self._fetch(0, 0)
        if not own:
            self._pass_by(0, len(self.order), 0)

    def _fetch(self, place: int, slot: int) -> None:
        if place >= len(self.order):
            self.arrived = lambda: None
            return
        bring = self.device.start_copy if self.stack.peers is None else self.stack.peers.bring_from_host
        self.arrived = bring(self.stack.host_rows[self.order[place]], self.slots[slot])

    def _pass_by(self, place: int, end: int, slot: int) -> None:
        """Gather those from ``place``, which is coming, to ``end`` for the processes that use them, in one ``slot``."""
        for following in range(place + 1, end + 1):
            self.arrived()
            self._fetch(following, slot)

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        place = self.places[expert]
        slot = place % 2
        self._pass_by(self.before[place] + 1, place, slot)
        self.arrived()
        self._fetch(place + 1, 1 - slot)
        if place == self.last:
            self._pass_by(place + 1, len(self.order), 1 - slot)
        return self.stack.layout.unpack([self.slots[slot]], dtype, self.stack.code)


def move_to_host(
    model: Any, kind: Quantization | None, device: Device, trained: list[nn.Module], peers: Peers | None = None
) -> None:
    """Have the frozen experts of ``model`` on the host beside ``device``.

    Args:
        model: on the meta device.
        kind: how they are stored; ``None``: in the model's dtype.
        device: where the rest of the model is.
        trained: the modules that train, each with everything inside it.
        peers: of whom each keeps a part of them; by default all are here.

    Raises:
        ConfigError: the device is the plain CPU, or no experts are frozen.
    """
    if device.capacity_bytes is None:
        raise ConfigError("experts_on_host has no effect on a CPU, whose memory is the host's; remove it")
    replace(model, kind, device, {child for module in trained for child in module.modules()}, peers)
    if not any(isinstance(module, FrozenExperts) for module in model.modules()):
        raise ConfigError("experts_on_host has no effect: this model has no frozen experts; remove it")


def replace(
    model: Any, kind: Quantization | None, host: Device | None, kept: set[nn.Module], peers: Peers | None = None
) -> None:
    """Put frozen experts, still empty and on the meta device, in the place of the stacks of ``model`` outside of ``kept``.

    Raises:
        ConfigError: their matrices cannot be in the form ``kind``.
    """
    for _, module in expert_modules(model):
        if module in kept:
            continue
        for name in STACKS:
            stack = getattr(module, name, None)
            if isinstance(stack, nn.Parameter):
                if kind == "mxfp4" and (not module.is_transposed or stack.shape[1] % mxfp4.GROUP):
                    raise ConfigError(
                        "quantization mxfp4 keeps the experts of gpt-oss checkpoints as they are; this model's lie otherwise: use nf4"
                    )
                delattr(module, name)
                setattr(module, name, FrozenExperts(stack, kind, host, peers))
        module._is_hf_initialized = True


def allocate(model: Any) -> None:
    """Set aside what of the experts of ``model`` lies on the host."""
    for module in model.modules():
        if isinstance(module, FrozenExperts):
            module.allocate()
