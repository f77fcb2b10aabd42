"""Matrices in MXFP4: 4-bit floats (E2M1), of which 32 share a power of 2 (E8M0): 4.25 bits a weight.

The format is that of the Open Compute Project (OCP Microscaling Formats 1.0, 2023): a number is a sign, two bits of exponent and one of
fraction, thus 0, 0.5, 1, 1.5, 2, 3, 4 or 6; the shared byte e stands for 2^(e - 127). A matrix [in, out] lies as in gpt-oss' files: for
each column its numbers, two in a byte, the first in the lower bits.

Whatever is in this form is packed again without loss, for scaling by powers of 2 leaves the grid of its numbers in the grid.
"""

from __future__ import annotations

import torch
from torch import Tensor

GROUP = 32
_GRID = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)
_MIDDLES = (0.25, 0.75, 1.25, 1.75, 2.5, 3.5, 5.0)


def packed_shapes(shape: tuple[int, int]) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
    """Return name, shape and dtype of the tensors that ``pack`` makes of a matrix [in, out], ``in`` a multiple of 32."""
    inner, outer = shape
    return {
        "values": ((outer, inner // 2), torch.uint8),
        "scales": ((outer, inner // GROUP), torch.uint8),
    }


def new_code() -> Tensor:
    """Return the two numbers that each byte stands for: fp32 [256, 2]."""
    grid = torch.tensor([*_GRID, *(-number for number in _GRID)])
    byte = torch.arange(256)
    return torch.stack([grid[byte & 15], grid[byte >> 4]], 1)


def pack(matrix: Tensor) -> tuple[Tensor, Tensor]:
    """Return the nearest numbers, uint8 [out, in / 2], and the powers of 2, uint8 [out, in / 32], of ``matrix`` [in, out]."""
    numbers = matrix.t().float().reshape(matrix.shape[1], -1, GROUP)
    scales = torch.frexp(numbers.abs().amax(-1)).exponent.sub_(3).clamp_(-127, 127).add_(127).to(torch.uint8)
    numbers = numbers / _powers(scales)[..., None]
    codes = (numbers < 0).to(torch.uint8).mul_(8)
    numbers.abs_()
    for middle in _MIDDLES:
        codes.add_(numbers > middle)
    codes = codes.flatten(1)
    return codes[:, ::2] | codes[:, 1::2] << 4, scales


def unpack(values: Tensor, scales: Tensor, code: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the matrix [in, out] in ``dtype``, a view of a new [out, in]; ``code`` is ``new_code()`` on its device."""
    pairs = code.to(dtype).index_select(0, values.flatten().int())
    numbers = pairs.view(*scales.shape, GROUP).mul_(_powers(scales)[..., None].to(dtype))
    return numbers.flatten(1).t()


def _powers(scales: Tensor) -> Tensor:
    """Return 2^(scales - 127), fp32, made of its bits: exact, also the smallest, which is subnormal."""
    bits: Tensor = scales.int() << 23
    return bits.clamp_(min=1 << 22).view(torch.float32)
