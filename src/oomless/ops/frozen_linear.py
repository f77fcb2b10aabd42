"""A linear layer whose weight is frozen and stored in 4 or 8 bits.

Replaces ``torch.nn.functional.linear`` for a weight that gets no gradient. Forward and backward each unpack the weight into
a temporary in the input's dtype and multiply with it; nothing is kept for backward, neither the input (only the weight's
gradient would want it) nor the unpacked weight.

``nf4``   4-bit NormalFloat in blocks of 64 with their largest magnitude in 8 bits (QLoRA, Dettmers et al. 2023): 4.127 bits
          a weight, 4 bytes for each matrix.
``int8``  255 even steps in blocks of 256: 8.125 bits a weight.

Both through bitsandbytes' operators, which run on the CPU as well and have shapes for fake tensors. ``mxfp4`` is in ``mxfp4.py``.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from oomless.ops import mxfp4

Quantization = Literal["nf4", "int8", "mxfp4"]

NF4_BLOCK, INT8_BLOCK, SCALE_BLOCK = 64, 256, 256
_ALIGNED = 16


class StoredWeight(Protocol):
    """A frozen matrix [out, in] that is stored in another form, or elsewhere, than products need it."""

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in ``dtype`` on the device, to be dropped after the product."""


@dataclass(frozen=True, slots=True)
class PackedWeight:
    """A matrix in few bits: [out, in], in MXFP4 [in, out].

    ``values`` are its numbers: uint8 [ceil(out x in / 2), 1] (nf4) or [out, in] (int8). ``scales`` are their blocks' largest
    magnitudes: for int8 fp32; for nf4 uint8, to be read with ``coarse_scales`` (fp32) and ``offset`` (fp32, 0-dim).
    ``code`` is what a uint8 stands for: fp32 [256], increasing. Those of MXFP4 are said in ``mxfp4.py``.
    """

    kind: Quantization
    shape: tuple[int, int]
    code: Tensor
    values: Tensor
    scales: Tensor
    coarse_scales: Tensor | None = None
    offset: Tensor | None = None

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the matrix in ``dtype``, a new tensor."""
        if self.kind == "mxfp4":
            return mxfp4.unpack(self.values, self.scales, self.code, dtype)
        operators = torch.ops.bitsandbytes
        if self.kind == "int8":
            matrix: Tensor = operators.dequantize_blockwise(self.values, self.scales, self.code, INT8_BLOCK, dtype)
            return matrix
        scales = operators.dequantize_blockwise(
            self.scales, self.coarse_scales, self.code, SCALE_BLOCK, torch.float32
        ).add_(self.offset)
        # bitsandbytes 0.50 on the CPU begins a block at every row of the shape that it is told: rows are blocks here.
        count = self.shape[0] * self.shape[1]
        blocks = (1, count) if count % NF4_BLOCK else (count // NF4_BLOCK, NF4_BLOCK)
        matrix = operators.dequantize_4bit(self.values, scales, NF4_BLOCK, "nf4", blocks, dtype)
        return matrix.view(self.shape)


def new_code(kind: Quantization) -> Tensor:
    """Return what a byte stands for: even steps for weights, and for nf4's scales, which crowd around 0, a finer middle."""
    if kind == "mxfp4":
        return mxfp4.new_code()
    steps = torch.arange(-127.0, 128.0) / 127
    if kind == "nf4":
        steps = steps.sign() * steps.square()
    return torch.cat([steps[:1], steps])


def packed_shapes(shape: tuple[int, int], kind: Quantization) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name, shape and dtype of the tensors that ``pack`` makes of a matrix of ``shape``."""
    if kind == "mxfp4":
        return mxfp4.packed_shapes(shape)
    count = shape[0] * shape[1]
    if kind == "int8":
        return {"values": (shape, torch.uint8), "scales": ((-(-count // INT8_BLOCK),), torch.float32)}
    blocks = -(-count // NF4_BLOCK)
    return {
        "values": (((count + 1) // 2, 1), torch.uint8),
        "scales": ((blocks,), torch.uint8),
        "coarse_scales": ((-(-blocks // SCALE_BLOCK),), torch.float32),
        "offset": ((), torch.float32),
    }


def pack(weight: Tensor, kind: Quantization, code: Tensor) -> PackedWeight:
    """Return ``weight``, of 16 or 32 bits, in few bits; ``code`` is ``new_code(kind)`` on its device."""
    shape = (weight.shape[0], weight.shape[1])
    if kind == "mxfp4":
        return PackedWeight(kind, shape, code, *mxfp4.pack(weight))
    operators = torch.ops.bitsandbytes
    if kind == "int8":
        return PackedWeight(kind, shape, code, *operators.quantize_blockwise(weight, code, INT8_BLOCK))
    values, scales = operators.quantize_4bit(weight, NF4_BLOCK, "nf4", torch.uint8)
    offset = scales.mean()
    scales, coarse_scales = operators.quantize_blockwise(scales.sub_(offset), code, SCALE_BLOCK)
    return PackedWeight(kind, shape, code, values, scales, coarse_scales, offset)


@dataclass(frozen=True, slots=True)
class _Part:
    """In which row of bytes, and where in it, one tensor is."""

    row: int
    begin: int
    end: int
    shape: tuple[int, ...]
    dtype: torch.dtype

    def of(self, rows: Sequence[Tensor]) -> Tensor:
        return rows[self.row][self.begin : self.end].view(self.dtype).view(self.shape)


class RowLayout:
    """How a matrix of ``shape`` lies in rows of bytes: in few bits, or where ``kind`` is ``None`` in ``dtype``.

    It is one row; or two, values and all else ``apart``: the values of most matrices are whole MiB, of which the allocator rounds
    nothing up.
    """

    def __init__(
        self, shape: tuple[int, int], kind: Quantization | None, dtype: torch.dtype, *, apart: bool = False
    ) -> None:
        self.shape, self.kind = shape, kind
        shapes = {"values": (shape, dtype)} if kind is None else packed_shapes(shape, kind)
        self._parts: dict[str, _Part] = {}
        self.sizes = [0, 0] if apart else [0]
        """The bytes of each row."""

        for name, (size, stored) in shapes.items():
            row = int(apart and name != "values")
            begin = self.sizes[row]
            end = begin + torch.Size(size).numel() * stored.itemsize
            self._parts[name] = _Part(row, begin, end, size, stored)
            self.sizes[row] = end + -end % _ALIGNED

    @property
    def form(self) -> str:
        """How the matrix is stored, in words."""
        return self.kind or str(self._parts["values"].dtype).removeprefix("torch.")

    def write(self, weight: Tensor, rows: Sequence[Tensor], code: Tensor) -> None:
        """Store ``weight`` in ``rows``, on whose device it lies unless it is stored as it is."""
        made = weight if self.kind is None else pack(weight, self.kind, code)
        for name, part in self._parts.items():
            part.of(rows).copy_(made if isinstance(made, Tensor) else getattr(made, name))

    def unpack(self, rows: Sequence[Tensor], dtype: torch.dtype, code: Tensor) -> Tensor:
        """Return the matrix in ``rows``, in ``dtype``."""
        parts = {name: part.of(rows) for name, part in self._parts.items()}
        if self.kind is None:
            return parts["values"].to(dtype)
        return PackedWeight(self.kind, self.shape, code, **parts).unpack(dtype)


def frozen_linear(inputs: Tensor, weight: StoredWeight, bias: Tensor | None = None) -> Tensor:
    """Return ``inputs @ weight.T + bias``: [..., out] from [..., in], in the inputs' dtype; the weight gets no gradient."""
    outputs: Tensor = _FrozenLinear.apply(inputs, weight, bias)  # type: ignore[no-untyped-call]
    return outputs


class _FrozenLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, inputs: Tensor, weight: StoredWeight, bias: Tensor | None) -> Tensor:
        ctx.weight = weight
        return functional.linear(inputs, weight.unpack(inputs.dtype), bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, None, Tensor | None]:
        of_bias = gradient.flatten(0, -2).sum(0) if ctx.needs_input_grad[2] else None
        return gradient @ ctx.weight.unpack(gradient.dtype), None, of_bias
