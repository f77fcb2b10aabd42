"""Numbers as Triton kernels read and write them: all arithmetic is fp32.

bf16 goes in and out as whole numbers of 16 bits (``storable``), because GPUs of compute capability 7.5 have no instructions for it.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor


def storable(tensor: Tensor | None) -> Tensor | None:
    """Return ``tensor`` as kernels take it."""
    return tensor.view(torch.int16) if tensor is not None and tensor.dtype == torch.bfloat16 else tensor


@triton.jit
def read(pointer, place, here, BF16: tl.constexpr):
    """Return what lies at ``place``, and 0 where nothing is ``here``."""
    stored = tl.load(pointer + place, mask=here, other=0)
    if BF16:
        return (stored.to(tl.int32) << 16).to(tl.float32, bitcast=True)
    return stored.to(tl.float32)


@triton.jit
def store(pointer, place, value, here, BF16: tl.constexpr):
    """Write ``value``, rounded to what the pointer keeps, where something is ``here``."""
    if BF16:
        tl.store(pointer + place, nearest_bf16(value).to(tl.int16), mask=here)
    else:
        tl.store(pointer + place, value.to(pointer.dtype.element_ty), mask=here)


@triton.jit
def nearest_bf16(value):
    """Return the bits of the nearest bf16, ties to even, as a signed number of 32 bits."""
    bits = value.to(tl.int32, bitcast=True)
    return tl.where(value != value, 0x7FC0, (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16)
