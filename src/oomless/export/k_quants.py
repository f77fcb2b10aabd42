"""llama.cpp's K-quants: 256 numbers of a row in one block, in parts of 16 or 32 with a scale each, and scales that are rounded as well.

The gguf package reads them and does not make them. How a block lies is ggml's; what of all that fits is written is searched here: of several
scales for each part that with the least weighted square of what is lost, each made the best for the integers that come of it.
"""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[Any]

BLOCK = 256
_BLOCKS_AT_ONCE = 512
"""What is searched at once stays in a core's cache."""

_AT_ONCE = 16
"""Threads, of which each holds some MiB."""

_ALIKE = 1e-5
"""Integers that are so much alike do not tell a scale from a minimum."""


def quantize(rows: Array, kind: str) -> Array:
    """Return the bytes of ``rows``, [N, in] in fp32 where in is a multiple of 256, stored as ``kind``."""
    blocks = rows.reshape(-1, BLOCK)
    parts = [blocks[first : first + _BLOCKS_AT_ONCE] for first in range(0, len(blocks), _BLOCKS_AT_ONCE)]
    with ThreadPoolExecutor(min(_AT_ONCE, os.cpu_count() or 1)) as pool:
        made = list(pool.map(_KINDS[kind], parts))
    return np.concatenate(made).reshape(rows.shape[0], -1)


@dataclass(frozen=True, slots=True)
class _Parts:
    """Blocks, part by part: numbers of a part lie along the first axis, so that what is done to each part is done to many at once."""

    numbers: Array
    """[numbers of a part, parts]."""

    weights: Array
    """How much a loss of each matters."""


def _parts(blocks: Array, size: int) -> _Parts:
    numbers = np.ascontiguousarray(blocks.reshape(-1, size).T)
    return _Parts(numbers, np.abs(numbers) + np.sqrt(_sum(numbers * numbers) / size))


def _sum(numbers: Array) -> Array:
    """Return the sums over the first axis, of a length that is a power of 2; each is the same whatever lies beside it."""
    while numbers.shape[0] > 1:
        half = numbers.shape[0] // 2
        numbers = numbers[:half] + numbers[half:]
    total: Array = numbers[0]
    return total


def _by_block(of_parts: Array, size: int) -> Array:
    return of_parts.reshape(-1, BLOCK // size)


def _in_order(integers: Array) -> Array:
    """Return integers of parts, [numbers of a part, parts], as those of blocks, [blocks, 256]."""
    return integers.T.reshape(-1, BLOCK).astype(np.uint8)


def _over(numbers: Array, divisor: Array) -> Array:
    """Return the quotient; 0 where the divisor is."""
    return np.divide(numbers, divisor, out=np.zeros_like(numbers), where=divisor != 0)


def _nearest(numbers: Array, least: int, most: int) -> Array:
    """Round ``numbers`` in place to integers of a range."""
    rounded: Array = np.clip(np.rint(numbers, out=numbers), least, most, out=numbers)
    return rounded


def _affine(parts: _Parts, largest: int, reaches: list[float]) -> tuple[Array, Array]:
    """Return the scale and the minimum, both of at least 0, of integers up to ``largest``: a number is scale x integer - minimum.

    Each of ``reaches`` is to how many steps the range of a part is stretched at first.
    """
    x, w = parts.numbers, parts.weights
    low = np.minimum(x.min(0), 0)
    span = x.max(0) - low
    raised, wx = x - low, w * x
    sum_w, sum_x, sum_xx = _sum(w), _sum(wx), _sum(wx * x)
    scale, minimum = span / largest, -low
    least = np.full_like(scale, np.inf)
    for reach in reaches:
        q = _nearest(raised * _over(np.full_like(span, reach), span), 0, largest)
        wq = w * q
        sum_q, sum_qx, sum_qq = _sum(wq), _sum(q * wx), _sum(wq * q)
        divisor = sum_w * sum_qq - sum_q * sum_q
        s = _over(sum_w * sum_qx - sum_x * sum_q, divisor)
        m = _over(sum_q * sum_qx - sum_qq * sum_x, divisor)
        alone = (m < 0) | (divisor < _ALIKE * sum_w * sum_qq)
        s, m = np.where(alone, _over(sum_qx, sum_qq), s), np.where(alone, 0, m)
        lost = sum_xx + s * (s * sum_qq - 2 * sum_qx) + m * (m * sum_w + 2 * sum_x - 2 * s * sum_q)
        better = (lost < least) & (s > 0)
        for best, new in ((least, lost), (scale, s), (minimum, m)):
            np.copyto(best, new, where=better)
    return scale, minimum


def _symmetric(parts: _Parts, largest: int, reaches: list[float]) -> Array:
    """Return the scale, of either sign, of integers from -``largest`` to ``largest`` - 1."""
    x, w = parts.numbers, parts.weights
    extreme: Array = np.take_along_axis(x, np.abs(x).argmax(0)[None], 0)[0]
    wx = w * x
    scale: Array = -extreme / largest
    most = np.full_like(extreme, -1)
    for reach in reaches:
        q = _nearest(x * _over(np.full_like(extreme, -reach), extreme), -largest, largest - 1)
        sum_qx, sum_qq = _sum(q * wx), _sum(w * q * q)
        s = _over(sum_qx, sum_qq)
        kept = s * sum_qx
        better = kept > most
        np.copyto(most, kept, where=better)
        np.copyto(scale, s, where=better)
    return scale


def _rounded(scales: Array, largest: int) -> tuple[Array, Array]:
    """Return scales of at least 0, [blocks, parts], as integers up to ``largest``, and what they are multiplied by, in fp16."""
    unit = (scales.max(1, keepdims=True) / largest).astype(np.float16)
    return _nearest(_over(scales, unit.astype(np.float32)), 0, largest), unit


def _rounded_signed(scales: Array, largest: int) -> tuple[Array, Array]:
    """The same of scales of either sign: integers from -``largest`` to ``largest`` - 1."""
    extreme = np.take_along_axis(scales, np.abs(scales).argmax(1)[:, None], 1)
    unit = (-extreme / largest).astype(np.float16)
    return _nearest(_over(scales, unit.astype(np.float32)), -largest, largest - 1), unit


def _bytes(numbers: Array) -> Array:
    return numbers.view(np.uint8)


def _with_minimum(blocks: Array, size: int, bits: int, scale_bits: int, reaches: list[float]) -> tuple[Array, ...]:
    """Return of ``blocks`` the integers, and the scales, the minima and the units of both."""
    parts, largest = _parts(blocks, size), 2**bits - 1
    scale, minimum = _affine(parts, largest, reaches)
    scales, unit = _rounded(_by_block(scale, size), 2**scale_bits - 1)
    scale = (scales * unit.astype(np.float32)).reshape(-1)

    def integers() -> Array:
        return _nearest(_over(parts.numbers + minimum, scale), 0, largest)

    # The best minimum for the scale that there is after rounding, and for the integers that come of both.
    lost = parts.weights * (integers() * scale - parts.numbers)
    minimum = np.maximum(_over(_sum(lost), _sum(parts.weights)), 0)
    minima, minimum_unit = _rounded(_by_block(minimum, size), 2**scale_bits - 1)
    minimum = (minima * minimum_unit.astype(np.float32)).reshape(-1)
    q = integers()
    return _in_order(q), scales.astype(np.uint8), minima.astype(np.uint8), _bytes(unit), _bytes(minimum_unit)


def _about_zero(blocks: Array, bits: int, scale_bits: int, reaches: list[float]) -> tuple[Array, Array, Array]:
    """Return of ``blocks``, in parts of 16, the integers (from 0), the scales and their unit."""
    parts, largest = _parts(blocks, 16), 2 ** (bits - 1)
    scales, unit = _rounded_signed(_by_block(_symmetric(parts, largest, reaches), 16), 2 ** (scale_bits - 1))
    scale = (scales * unit.astype(np.float32)).reshape(-1)
    q = _nearest(_over(parts.numbers, scale), -largest, largest - 1) + largest
    return _in_order(q), scales.astype(np.int8), _bytes(unit)


def _in_one_byte(integers: Array, bits: int, lies: int) -> Array:
    """Return integers of ``bits``, [blocks, 256], several in a byte: the first are ``lies`` numbers apart, the last in the upper bits."""
    in_a_byte = 8 // bits
    apart = integers.reshape(integers.shape[0], -1, in_a_byte, lies)
    shifts = np.arange(0, 8, bits, dtype=np.uint8).reshape(-1, 1)
    made: Array = np.bitwise_or.reduce(apart << shifts, 2).reshape(len(integers), -1)
    return made


def _six_bits(scales: Array, minima: Array) -> Array:
    """Return eight scales and eight minima of six bits, [blocks, 8] each, in twelve bytes."""
    first, last = slice(0, 4), slice(4, 8)
    return np.concatenate(
        [
            scales[:, first] | (scales[:, last] >> 4 << 6),
            minima[:, first] | (minima[:, last] >> 4 << 6),
            (scales[:, last] & 15) | (minima[:, last] << 4),
        ],
        1,
    )


def _steps(first: float, last: float, count: int) -> list[float]:
    return [first + (last - first) * step / (count - 1) for step in range(count)]


def _q2_k(blocks: Array) -> Array:
    q, scales, minima, unit, minimum_unit = _with_minimum(blocks, 16, 2, 4, _steps(2.0, 4.0, 9))
    return np.concatenate([scales | (minima << 4), _in_one_byte(q, 2, 32), unit, minimum_unit], 1)


def _q3_k(blocks: Array) -> Array:
    q, signed, unit = _about_zero(blocks, 3, 6, _steps(3.1, 4.9, 10))
    scales = (signed + 32).astype(np.uint8)
    low = (scales[:, :8] & 15) | (scales[:, 8:] << 4)
    return np.concatenate(
        [
            _in_one_byte(q >> 2, 1, 32),
            _in_one_byte(q & 3, 2, 32),
            low,
            _in_one_byte(scales >> 4, 2, 4),
            unit,
        ],
        1,
    )


def _q4_k(blocks: Array) -> Array:
    q, scales, minima, unit, minimum_unit = _with_minimum(blocks, 32, 4, 6, _steps(13.25, 16.0, 12))
    return np.concatenate([unit, minimum_unit, _six_bits(scales, minima), _in_one_byte(q, 4, 32)], 1)


def _q5_k(blocks: Array) -> Array:
    q, scales, minima, unit, minimum_unit = _with_minimum(blocks, 32, 5, 6, _steps(29.0, 32.0, 13))
    parts = [unit, minimum_unit, _six_bits(scales, minima), _in_one_byte(q >> 4, 1, 32), _in_one_byte(q & 15, 4, 32)]
    return np.concatenate(parts, 1)


def _q6_k(blocks: Array) -> Array:
    q, scales, unit = _about_zero(blocks, 6, 8, _steps(31.1, 32.9, 19))
    return np.concatenate([_in_one_byte(q & 15, 4, 64), _in_one_byte(q >> 4, 2, 32), _bytes(scales), unit], 1)


_KINDS = {"q2_k": _q2_k, "q3_k": _q3_k, "q4_k": _q4_k, "q5_k": _q5_k, "q6_k": _q6_k}
KINDS = tuple(_KINDS)
