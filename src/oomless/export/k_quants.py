"""llama.cpp's K-quants: 256 numbers of a row in one block, in parts of 16 or 32 with a scale each, and scales that are rounded as well.

The gguf package reads them and does not make them. How a block lies is ggml's; what of all that fits is written is searched here: of several
scales for each part that with the least weighted square of what is lost, each made the best for the integers that come of it.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

BLOCK = 256
_BLOCKS_AT_ONCE = 512
"""What is searched at once stays in a core's cache."""

_ALIKE = 1e-5
"""Integers that are so much alike do not tell a scale from a minimum."""


def quantize(rows: Tensor, kind: str) -> Tensor:
    """Return the bytes of ``rows``, [N, in] in fp32 where in is a multiple of 256, stored as ``kind``."""
    parts = torch.split(rows.reshape(-1, BLOCK), _BLOCKS_AT_ONCE)
    made = [_KINDS[kind](blocks) for blocks in parts]
    return torch.cat(made).reshape(rows.shape[0], -1)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Blocks, part by part: numbers of a part lie along the first axis, so that what is done to each part is done to many at once."""

    numbers: Tensor
    """[numbers of a part, parts]."""

    weights: Tensor
    """How much a loss of each matters."""


def _parts(blocks: Tensor, size: int) -> _Parts:
    numbers = blocks.reshape(-1, size).t().contiguous()
    large = numbers.abs()
    return _Parts(numbers, large + (_sum(numbers.square()) / size).sqrt())


def _sum(numbers: Tensor) -> Tensor:
    """Return the sums over the first axis, of a length that is a power of 2; each is the same whatever lies beside it."""
    while numbers.shape[0] > 1:
        half = numbers.shape[0] // 2
        numbers = numbers[:half] + numbers[half:]
    return numbers[0]


def _by_block(of_parts: Tensor, size: int) -> Tensor:
    return of_parts.reshape(-1, BLOCK // size)


def _in_order(integers: Tensor) -> Tensor:
    """Return integers of parts, [numbers of a part, parts], as those of blocks, [blocks, 256]."""
    return integers.t().reshape(-1, BLOCK).to(torch.uint8)


def _over(numbers: Tensor, divisor: Tensor) -> Tensor:
    """Return the quotient; 0 where the divisor is."""
    return torch.where(divisor == 0, 0.0, numbers / divisor)


def _affine(parts: _Parts, largest: int, reaches: Tensor) -> tuple[Tensor, Tensor]:
    """Return the scale and the minimum, both of at least 0, of integers up to ``largest``: a number is scale x integer - minimum.

    Each of ``reaches`` is to how many steps the range of a part is stretched at first.
    """
    x, w = parts.numbers, parts.weights
    low = x.amin(0).clamp(max=0)
    span = x.amax(0) - low
    raised = x - low
    wx = w * x
    sum_w, sum_x, sum_xx = _sum(w), _sum(wx), _sum(wx * x)
    scale, minimum = span / largest, -low
    least = torch.full_like(scale, torch.inf)
    for reach in reaches.tolist():
        q = (raised * _over(torch.full_like(span, reach), span)).round_().clamp_(0, largest)
        wq = w * q
        sum_q, sum_qx, sum_qq = _sum(wq), _sum(q * wx), _sum(wq.mul_(q))
        divisor = sum_w * sum_qq - sum_q * sum_q
        s = _over(sum_w * sum_qx - sum_x * sum_q, divisor)
        m = _over(sum_q * sum_qx - sum_qq * sum_x, divisor)
        alone = (m < 0) | (divisor < _ALIKE * sum_w * sum_qq)
        s, m = torch.where(alone, _over(sum_qx, sum_qq), s), torch.where(alone, 0.0, m)
        lost = sum_xx + s * (s * sum_qq - 2 * sum_qx) + m * (m * sum_w + 2 * sum_x - 2 * s * sum_q)
        better = (lost < least) & (s > 0)
        least, scale, minimum = (
            torch.where(better, new, old) for new, old in ((lost, least), (s, scale), (m, minimum))
        )
    return scale, minimum


def _symmetric(parts: _Parts, largest: int, reaches: Tensor) -> Tensor:
    """Return the scale, of either sign, of integers from -``largest`` to ``largest`` - 1."""
    x, w = parts.numbers, parts.weights
    extreme = x.gather(0, x.abs().argmax(0, keepdim=True))[0]
    wx = w * x
    scale, most = -extreme / largest, torch.full_like(extreme, -1.0)
    for reach in reaches.tolist():
        q = (x * _over(torch.full_like(extreme, -reach), extreme)).round_().clamp_(-largest, largest - 1)
        sum_qx, sum_qq = _sum(q * wx), _sum((w * q).mul_(q))
        s = _over(sum_qx, sum_qq)
        kept = s * sum_qx
        better = kept > most
        most, scale = torch.where(better, kept, most), torch.where(better, s, scale)
    return scale


def _rounded(scales: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """Return scales of at least 0, [blocks, parts], as integers up to ``largest``, and what they are multiplied by, in fp16."""
    unit = (scales.amax(1, keepdim=True) / largest).half()
    return _over(scales, unit.float()).round_().clamp_(0, largest), unit


def _rounded_signed(scales: Tensor, largest: int) -> tuple[Tensor, Tensor]:
    """The same of scales of either sign: integers from -``largest`` to ``largest`` - 1."""
    extreme = scales.gather(1, scales.abs().argmax(1, keepdim=True))
    unit = (-extreme / largest).half()
    return _over(scales, unit.float()).round_().clamp_(-largest, largest - 1), unit


def _bytes(numbers: Tensor) -> Tensor:
    return numbers.contiguous().view(torch.uint8)


def _with_minimum(blocks: Tensor, size: int, bits: int, scale_bits: int, reaches: Tensor) -> tuple[Tensor, ...]:
    """Return of ``blocks`` the integers, and the scales, the minima and the units of both."""
    parts, largest = _parts(blocks, size), 2**bits - 1
    scale, minimum = _affine(parts, largest, reaches)
    scales, unit = _rounded(_by_block(scale, size), 2**scale_bits - 1)
    scale = (scales * unit.float()).reshape(-1)

    def integers() -> Tensor:
        return _over(parts.numbers + minimum, scale).round_().clamp_(0, largest)

    # The best minimum for the scale that there is after rounding, and for the integers that come of both.
    lost = parts.weights * (integers() * scale - parts.numbers)
    minimum = _over(_sum(lost), _sum(parts.weights)).clamp_(min=0)
    minima, minimum_unit = _rounded(_by_block(minimum, size), 2**scale_bits - 1)
    minimum = (minima * minimum_unit.float()).reshape(-1)
    q = integers()
    return _in_order(q), scales.to(torch.uint8), minima.to(torch.uint8), _bytes(unit), _bytes(minimum_unit)


def _about_zero(blocks: Tensor, bits: int, scale_bits: int, reaches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return of ``blocks``, in parts of 16, the integers (from 0), the scales and their unit."""
    parts, largest = _parts(blocks, 16), 2 ** (bits - 1)
    scales, unit = _rounded_signed(_by_block(_symmetric(parts, largest, reaches), 16), 2 ** (scale_bits - 1))
    q = _over(parts.numbers, (scales * unit.float()).reshape(-1)).round_().clamp_(-largest, largest - 1) + largest
    return _in_order(q), scales.to(torch.int8), _bytes(unit)


def _in_one_byte(integers: Tensor, bits: int, lies: int) -> Tensor:
    """Return integers of ``bits``, [blocks, 256], several in a byte: the first are ``lies`` numbers apart, the last in the upper bits."""
    in_a_byte = 8 // bits
    apart = integers.reshape(integers.shape[0], -1, in_a_byte, lies)
    shifts = (torch.arange(in_a_byte, dtype=torch.uint8) * bits).reshape(-1, 1)
    return torch.sum(apart << shifts, 2, dtype=torch.uint8).flatten(1)


def _six_bits(scales: Tensor, minima: Tensor) -> Tensor:
    """Return eight scales and eight minima of six bits, [blocks, 8] each, in twelve bytes."""
    first, last = slice(0, 4), slice(4, 8)
    return torch.cat(
        [
            scales[:, first] | (scales[:, last] >> 4 << 6),
            minima[:, first] | (minima[:, last] >> 4 << 6),
            (scales[:, last] & 15) | (minima[:, last] << 4),
        ],
        1,
    )


def _q2_k(blocks: Tensor) -> Tensor:
    q, scales, minima, unit, minimum_unit = _with_minimum(blocks, 16, 2, 4, torch.linspace(2.0, 4.0, 9))
    return torch.cat([scales | (minima << 4), _in_one_byte(q, 2, 32), unit, minimum_unit], 1)


def _q3_k(blocks: Tensor) -> Tensor:
    q, signed, unit = _about_zero(blocks, 3, 6, torch.linspace(3.1, 4.9, 10))
    scales = (signed + 32).to(torch.uint8)
    low = (scales[:, :8] & 15) | (scales[:, 8:] << 4)
    return torch.cat(
        [
            _in_one_byte(q >> 2, 1, 32),
            _in_one_byte(q & 3, 2, 32),
            low,
            _in_one_byte(scales >> 4, 2, 4),
            unit,
        ],
        1,
    )


def _q4_k(blocks: Tensor) -> Tensor:
    q, scales, minima, unit, minimum_unit = _with_minimum(blocks, 32, 4, 6, torch.linspace(13.25, 16.0, 12))
    return torch.cat([unit, minimum_unit, _six_bits(scales, minima), _in_one_byte(q, 4, 32)], 1)


def _q5_k(blocks: Tensor) -> Tensor:
    q, scales, minima, unit, minimum_unit = _with_minimum(blocks, 32, 5, 6, torch.linspace(29.0, 32.0, 13))
    parts = [unit, minimum_unit, _six_bits(scales, minima), _in_one_byte(q >> 4, 1, 32), _in_one_byte(q & 15, 4, 32)]
    return torch.cat(parts, 1)


def _q6_k(blocks: Tensor) -> Tensor:
    q, scales, unit = _about_zero(blocks, 6, 8, torch.linspace(31.1, 32.9, 19))
    return torch.cat([_in_one_byte(q & 15, 4, 64), _in_one_byte(q >> 4, 2, 32), _bytes(scales), unit], 1)


_KINDS = {"q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
KINDS = tuple(_KINDS)
