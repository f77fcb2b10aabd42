"""Moments in one byte each: blocks of 256 values share an fp32 scale, the codes are spaced by a power.

    first moment    x = s · sign(c)·(c/127)²     c = −127 … 127      s = largest |x| of the block
    second moment   x = s · (c/255)⁴             c = 0 … 255         s = largest x of the block

Adam divides by √v, so small second moments must not round to zero: with the fourth power the smallest code
stands for 2.4e-10 of the block's largest (1.5e-5 under the root), and the step between neighbours at the top
is 1.6 %. Two square roots and a multiplication make the code; there is no table to search and to keep in
memory.

Cost: 1 + 4/256 = 1.015625 bytes a value. A last block that is not full has a scale of its own.

Alternatives, compared in ``docs/optimizers.md``: the dynamic-exponent table of 8-bit Adam (Dettmers et al.,
2022, as in bitsandbytes) and FlashOptim's softsign and square root with blocks of 32.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

BLOCK = 256
_SIGNED_CODES = 127
_UNSIGNED_CODES = 255
_TINY = torch.finfo(torch.float32).tiny


def block_count(count: int) -> int:
    """Return how many blocks ``count`` values make."""
    return -(-count // BLOCK)


def decode_signed(codes: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 values of flat int8 ``codes`` with one scale a block; one temporary of their size."""
    values = codes.float()
    values.mul_(values.abs())
    for block, scale in _blocks(values, scales):
        block.mul_(scale / _SIGNED_CODES**2)
    return values


def decode_unsigned(codes: Tensor, scales: Tensor) -> Tensor:
    """Return fp32 values of uint8 ``codes`` (flat) with one scale a block."""
    values = codes.float().square_().square_()
    for block, scale in _blocks(values, scales):
        block.mul_(scale / _UNSIGNED_CODES**4)
    return values


def encode_signed(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return int8 codes and fp32 scales of flat fp32 ``values``; one temporary of their size."""
    scales = _largest(values)
    roots = values.abs()
    for block, scale in _blocks(roots, scales):
        block.div_(scale.clamp(min=_TINY)).sqrt_().mul_(_SIGNED_CODES)
    return roots.round_().copysign_(values).to(torch.int8), scales


def encode_unsigned(values: Tensor) -> tuple[Tensor, Tensor]:
    """Return uint8 codes and fp32 scales of flat, nonnegative fp32 ``values``, which are used up."""
    scales = _largest(values)
    for block, scale in _blocks(values, scales):
        block.div_(scale.clamp(min=_TINY)).sqrt_().sqrt_().mul_(_UNSIGNED_CODES)
    return values.round_().to(torch.uint8), scales


def _blocks(values: Tensor, scales: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the full blocks as rows with their scales as a column, then the last block if it is not full."""
    full = values.numel() // BLOCK
    if full:
        yield values[: full * BLOCK].view(full, BLOCK), scales[:full, None]
    if full * BLOCK < values.numel():
        yield values[full * BLOCK :].view(1, -1), scales[full:, None]


def _largest(values: Tensor) -> Tensor:
    scales = values.new_empty(block_count(values.numel()))
    for block, scale in _blocks(values, scales):
        scale.copy_(torch.linalg.vector_norm(block, float("inf"), dim=1, keepdim=True))
    return scales
