"""Frozen experts of a mixture in 4 or 8 bits, or in pinned host memory, or both.

An architecture's experts are stacks, one tensor for all experts of a layer. A frozen stack is stored here as a row of bytes for
each expert, in the form that ``quantization`` says, on the device or (``experts_on_host``, ``stream_frozen``) on the host.

Saves: the bits as for linear layers, but of nine tenths of the model; on the host, all of it but two rows. Costs: the
rounding, which no training undoes; unpacking one expert at a time, in forward and in backward; on the host, as much pinned
memory, and the bus, which carries the experts to which tokens go. Rows are made while loading, one expert at a time. On the
host, the next expert comes while one is used: which is next is known, for the router has chosen.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.frozen_linear import PackedWeight, Quantization, pack, packed_shapes
from oomless.ops.grouped_linear import MatrixOf

STACKS = ("gate_up_proj", "up_proj", "down_proj")
_ALIGNED = 16


def expert_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules of ``model``, with their names, that hold stacks of experts behind transformers' interface."""
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "num_experts"):
            yield name, module


def stacks_on_device(model: Any) -> Iterator[Tensor]:
    """Yield what the stacks of experts of ``model`` hold on the device."""
    for _, module in expert_modules(model):
        for name in STACKS:
            stack = getattr(module, name, None)
            held = stack.rows if isinstance(stack, FrozenExperts) else stack
            if held is not None:
                yield held


@dataclass(frozen=True, slots=True)
class _Part:
    """Where in a row of bytes one tensor of an expert is."""

    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, row: Tensor) -> Tensor:
        return row[self.begin : self.end].view(self.dtype).view(self.shape)


class FrozenExperts(nn.Module):
    """One stack of frozen experts: ``stack``, which is on the meta device, without its tensor.

    Args:
        stack: [E, rows, columns] of each matrix as it lies.
        kind: how the matrices are stored; ``None``: in the stack's dtype.
        host: the device beside whose host memory they are to lie; ``None``: they lie on the device.
    """

    def __init__(self, stack: nn.Parameter, kind: Quantization | None, host: Device | None) -> None:
        super().__init__()
        experts, rows, columns = stack.shape
        self.shape: tuple[int, int, int] = (experts, rows, columns)
        self.kind: Quantization | None = kind
        self.on_host = host
        self.code = torch.empty(0)
        shapes = {"values": ((rows, columns), stack.dtype)} if kind is None else packed_shapes((rows, columns), kind)
        self._parts: dict[str, _Part] = {}
        size = 0
        for name, (shape, dtype) in shapes.items():
            end = size + torch.Size(shape).numel() * dtype.itemsize
            self._parts[name] = _Part(size, end, shape, dtype)
            size = end + -end % _ALIGNED
        self.row_bytes = size
        self.host_rows = torch.empty(0)
        self.register_buffer("rows", None)
        if host is None:
            self.rows = torch.empty(experts, size, dtype=torch.uint8, device="meta")
        self._is_hf_initialized = True

    @property
    def form(self) -> str:
        """How the matrices are stored, in words."""
        kind = self.kind or str(self._parts["values"].dtype).removeprefix("torch.")
        return f"{kind} on the host" if self.on_host is not None else kind

    @property
    def pieces(self) -> Sequence[int]:
        """The experts, which ``fill`` takes one by one."""
        return range(self.shape[0])

    def allocate(self) -> None:
        """Set aside what lies on the host."""
        if self.on_host is not None:
            with self.on_host.host():
                like = torch.empty(self.shape[0], self.row_bytes, dtype=torch.uint8, device="meta")
            self.host_rows = self.on_host.pinned_like(like)

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, expert: int) -> None:
        """Store ``host``, the matrix of ``expert`` as the file has it; ``None`` rehearses it, of no particular values."""
        if self.kind is None:
            with device.host():
                matrix = torch.empty(self.shape[1:], dtype=dtype) if host is None else host
                self._parts["values"].of(self.host_rows[expert]).copy_(matrix)
            return
        if host is None:
            weight = torch.empty(self.shape[1:], dtype=dtype, device=device.torch_device)
        else:
            weight = device.put(host, dtype)
        made = pack(weight, self.kind, self.code)
        if self.on_host is None:
            row = self.rows[expert]
        else:
            row = torch.empty(self.row_bytes, dtype=torch.uint8, device=device.torch_device)
        for name, part in self._parts.items():
            part.of(row).copy_(getattr(made, name))
        if self.on_host is not None:
            self.host_rows[expert].copy_(device.fetch(row))

    def matrices(self, experts: Sequence[int]) -> MatrixOf:
        """Return what gives the matrix of each of ``experts``, which are asked for in this order."""
        if self.on_host is None:
            return lambda expert, dtype: self._unpack(self.rows[expert], dtype)
        return _Fetching(self, self.on_host, experts).matrix

    def _unpack(self, row: Tensor, dtype: torch.dtype) -> Tensor:
        parts = {name: part.of(row) for name, part in self._parts.items()}
        if self.kind is None:
            return parts["values"].to(dtype)
        return PackedWeight(self.kind, self.shape[1:], self.code, **parts).unpack(dtype)


class _Fetching:
    """Brings the rows of ``experts`` to the device in their order, the next one while one is used."""

    def __init__(self, stack: FrozenExperts, device: Device, experts: Sequence[int]) -> None:
        self.stack, self.device, self.experts = stack, device, experts
        self.places = {expert: place for place, expert in enumerate(experts)}
        self.slots = torch.empty(2, stack.row_bytes, dtype=torch.uint8, device=device.torch_device)
        device.label([self.slots], "weights")
        self.arrived: Callable[[], None] = lambda: None
        self._fetch(0)

    def _fetch(self, place: int) -> None:
        if place < len(self.experts):
            source = self.stack.host_rows[self.experts[place]]
            self.arrived = self.device.start_copy(source, self.slots[place % 2])

    def matrix(self, expert: int, dtype: torch.dtype) -> Tensor:
        place = self.places[expert]
        self.arrived()
        self._fetch(place + 1)
        return self.stack._unpack(self.slots[place % 2], dtype)


def move_to_host(model: Any, kind: Quantization | None, device: Device, trained: list[nn.Module]) -> None:
    """Have the frozen experts of ``model`` on the host beside ``device``.

    Args:
        model: on the meta device.
        kind: how they are stored; ``None``: in the model's dtype.
        device: where the rest of the model is.
        trained: the modules that train, each with everything inside it.

    Raises:
        ConfigError: the device is the plain CPU, or no experts are frozen.
    """
    if device.capacity_bytes is None:
        raise ConfigError("experts_on_host has no effect on a CPU, whose memory is the host's; remove it")
    replace(model, kind, device, {child for module in trained for child in module.modules()})
    if not any(isinstance(module, FrozenExperts) for module in model.modules()):
        raise ConfigError("experts_on_host has no effect: this model has no frozen experts; remove it")


def replace(model: Any, kind: Quantization | None, host: Device | None, kept: set[nn.Module]) -> None:
    """Put frozen experts, still empty and on the meta device, in the place of the stacks of ``model`` outside of ``kept``."""
    for _, module in expert_modules(model):
        if module in kept:
            continue
        for name in STACKS:
            stack = getattr(module, name, None)
            if isinstance(stack, nn.Parameter):
                delattr(module, name)
                setattr(module, name, FrozenExperts(stack, kind, host))
        module._is_hf_initialized = True


def allocate(model: Any) -> None:
    """Set aside what of the experts of ``model`` lies on the host."""
    for module in model.modules():
        if isinstance(module, FrozenExperts):
            module.allocate()
