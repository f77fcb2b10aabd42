"""The shapes of bitsandbytes' operators, for a rehearsal where it is not installed: a plan does not depend on what is.

They compute nothing. Where bitsandbytes is there its own are taken (``frozen_linear``); a test compares the two.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor


@cache
def define() -> None:
    """Define the operators, under the names that bitsandbytes would give them; it must not be there."""
    for name, (schema, shapes) in _OPERATORS.items():
        torch.library.define(f"bitsandbytes::{name}", schema)
        torch.library.register_fake(f"bitsandbytes::{name}", shapes)


def _quantize_4bit(matrix: Tensor, block: int, kind: str, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    values = matrix.new_empty(((matrix.numel() + 1) // (2 * dtype.itemsize), 1), dtype=dtype)
    return values, _scales(matrix, block)


def _dequantize_4bit(
    values: Tensor, scales: Tensor, block: int, kind: str, shape: Sequence[int], dtype: torch.dtype
) -> Tensor:
    return values.new_empty(shape, dtype=dtype)


def _quantize_blockwise(matrix: Tensor, code: Tensor, block: int) -> tuple[Tensor, Tensor]:
    scales = _scales(matrix, block)
    return torch.empty_like(matrix, dtype=torch.uint8), scales


def _dequantize_blockwise(values: Tensor, scales: Tensor, code: Tensor, block: int, dtype: torch.dtype) -> Tensor:
    return torch.empty_like(values, dtype=dtype)


def _scales(matrix: Tensor, block: int) -> Tensor:
    return matrix.new_empty(-(-matrix.numel() // block), dtype=torch.float32)


_OPERATORS: dict[str, tuple[str, Callable[..., Any]]] = {
    "quantize_4bit": (
        "(Tensor A, int blocksize, str quant_type, ScalarType quant_storage) -> (Tensor, Tensor)",
        _quantize_4bit,
    ),
    "dequantize_4bit": (
        "(Tensor A, Tensor absmax, int blocksize, str quant_type, int[] shape, ScalarType dtype) -> Tensor",
        _dequantize_4bit,
    ),
    "quantize_blockwise": (
        "(Tensor A, Tensor code, int blocksize) -> (Tensor, Tensor)",
        _quantize_blockwise,
    ),
    "dequantize_blockwise": (
        "(Tensor A, Tensor absmax, Tensor code, int blocksize, ScalarType dtype) -> Tensor",
        _dequantize_blockwise,
    ),
}
