"""What the kernels of updates have in common: weights in their own precision, random bits, Adam's corrections.

A value lies in fp32 (``value``), in fp32 with a copy in 16 bits (``value`` and ``rounded``), or in 16 bits with or without a
``correction`` beside it (``precision.py``). Random bits are those of ``noise.py``.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oomless.ops.triton_values import nearest_bf16, read
from oomless.optim.precision import SIGNIFICAND_BITS


@triton.jit
def _spacing(value, SMALLEST: tl.constexpr, RELATIVE: tl.constexpr):
    """Return how far the neighbours of ``value`` are apart in 16 bits."""
    power_of_two = (value.to(tl.int32, bitcast=True) & 0x7F800000).to(tl.float32, bitcast=True)
    return tl.maximum(power_of_two, SMALLEST) * RELATIVE


@triton.jit
def _mixed(bits, inner):
    bits = (bits ^ (bits >> 16)) * 0x7FEB352D
    bits = bits ^ inner
    bits = (bits ^ (bits >> 15)) * 0x846CA68B
    return bits ^ (bits >> 16)


@triton.jit
def random_bits(element, count, low, high):
    """Return 16 random bits with a sign for each element, in the step of this ``count``."""
    count = count.to(tl.int32).to(tl.uint32)
    outer = _mixed(count * 0x9E3779B1 + low.to(tl.uint32), count * 0)
    inner = _mixed(count * 0x85EBCA77 + high.to(tl.uint32), count * 0)
    bits = _mixed((element >> 1).to(tl.uint32) + outer, inner)
    return tl.where((element & 1) == 1, bits, bits << 16).to(tl.int32, bitcast=True) >> 16


@triton.jit
def read_value(
    value, correction, place, beside, here, BF16: tl.constexpr, SMALLEST: tl.constexpr, RELATIVE: tl.constexpr
):
    """Return what lies at ``place`` of ``value``, with its correction at ``beside``."""
    known = read(value, place, here, BF16)
    if correction is not None:
        code = tl.load(correction + beside, mask=here, other=0).to(tl.float32)
        known += _spacing(known, SMALLEST, RELATIVE) * (0.5 / 128) * code
    return known


@triton.jit
def rounded_by_chance(new, noise, BF16: tl.constexpr, SMALLEST: tl.constexpr, RELATIVE: tl.constexpr):
    """Return ``new`` as a number of 16 bits, up or down as the random bits ``noise`` say."""
    if BF16:
        infinite = float("inf")
        bits = tl.where(tl.abs(new) < infinite, new, infinite).to(tl.int32, bitcast=True)
        return ((bits + noise + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    apart = _spacing(new, SMALLEST, RELATIVE)
    return tl.floor(tl.div_rn(new, apart) + (noise >> 3).to(tl.float32) * 0.0001220703125 + 0.5) * apart


@triton.jit
def store_value(
    new,
    value,
    rounded,
    correction,
    place,
    beside,
    here,
    BF16: tl.constexpr,
    SMALLEST: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """Store ``new`` at ``place`` of ``value``, and its copy in 16 bits or its correction at ``beside``."""
    target, target_place = value, place
    if rounded is not None:
        tl.store(value + place, new, mask=here)
        target, target_place = rounded, beside
    if BF16:
        near = nearest_bf16(new)
        tl.store(target + target_place, near.to(tl.int16), mask=here)
        stored = (near << 16).to(tl.float32, bitcast=True)
    else:
        near = new.to(target.dtype.element_ty)
        tl.store(target + target_place, near, mask=here)
        stored = near.to(tl.float32)
    if correction is not None:
        code = tl.floor(tl.div_rn(new - stored, _spacing(stored, SMALLEST, RELATIVE) * (0.5 / 128)) + 0.5)
        tl.store(correction + beside, tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8), mask=here)


@triton.jit
def bias(exponent):
    """Return 1 - exp(``exponent``), of a number below 0 also where that is small."""
    series = 1 + exponent / 6 * (1 + exponent / 7)
    for order in tl.static_range(4):
        series = 1 + exponent / (5 - order) * series
    return tl.where(exponent > -0.25, -exponent * series, 1 - tl.exp(exponent))


def forms(value: Tensor, rounded: Tensor | None, precision: str | None) -> dict[str, Any]:
    """Return how a kernel reads, rounds and stores the weight."""
    weight = value if rounded is None else rounded
    return {
        "STOCHASTIC": precision == "stochastic",
        "VALUE_BF16": value.dtype == torch.bfloat16,
        "WEIGHT_BF16": weight.dtype == torch.bfloat16,
        "SMALLEST": torch.finfo(weight.dtype).tiny,
        "RELATIVE": 2.0 ** (1 - SIGNIFICAND_BITS.get(weight.dtype, 24)),
    }


def log_of(beta: float) -> float:
    """Return the logarithm of a number from 0 to 1."""
    return math.log(beta) if beta else -math.inf
