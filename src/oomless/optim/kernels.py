"""The updates as Triton kernels: one launch over a slice, in which every number is read once and written once.

``fused.py`` says which operator each of them is, and what its plain form is. Scales are those of ``blockwise.py``, random bits those
of ``noise.py``. Where ``found_inf`` is 1 nothing is read and nothing stored.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from oomless.ops.triton_values import nearest_bf16, read, storable
from oomless.optim.blockwise import BLOCK, block_count
from oomless.optim.fused import TILE
from oomless.optim.precision import SIGNIFICAND_BITS

ROWS = 4
"""Blocks of one program."""


# -- values in 16 bits -------------------------------------------------------------------------------------------------


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
def _noise(element, step, low, high):
    """Return 16 random bits with a sign for each element."""
    count = tl.load(step).to(tl.int32).to(tl.uint32)
    outer = _mixed(count * 0x9E3779B1 + low.to(tl.uint32), count * 0)
    inner = _mixed(count * 0x85EBCA77 + high.to(tl.uint32), count * 0)
    bits = _mixed((element >> 1).to(tl.uint32) + outer, inner)
    return tl.where((element & 1) == 1, bits, bits << 16).to(tl.int32, bitcast=True) >> 16


@triton.jit
def _value(value, correction, place, here, BF16: tl.constexpr, SMALLEST: tl.constexpr, RELATIVE: tl.constexpr):
    known = read(value, place, here, BF16)
    if correction is not None:
        code = tl.load(correction + place, mask=here, other=0).to(tl.float32)
        known += _spacing(known, SMALLEST, RELATIVE) * (0.5 / 128) * code
    return known


@triton.jit
def _rounded_by_chance(new, noise, BF16: tl.constexpr, SMALLEST: tl.constexpr, RELATIVE: tl.constexpr):
    if BF16:
        infinite = float("inf")
        bits = tl.where(tl.abs(new) < infinite, new, infinite).to(tl.int32, bitcast=True)
        return ((bits + noise + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    apart = _spacing(new, SMALLEST, RELATIVE)
    return tl.floor(tl.div_rn(new, apart) + (noise >> 3).to(tl.float32) * 0.0001220703125 + 0.5) * apart


@triton.jit
def _store(
    new,
    value,
    rounded,
    correction,
    place,
    here,
    BF16: tl.constexpr,
    SMALLEST: tl.constexpr,
    RELATIVE: tl.constexpr,
):
    """Store ``new`` in what keeps it: fp32, fp32 and its copy in 16 bits, or 16 bits with or without a correction."""
    target = value
    if rounded is not None:
        tl.store(value + place, new, mask=here)
        target = rounded
    if BF16:
        near = nearest_bf16(new)
        tl.store(target + place, near.to(tl.int16), mask=here)
        stored = (near << 16).to(tl.float32, bitcast=True)
    else:
        near = new.to(target.dtype.element_ty)
        tl.store(target + place, near, mask=here)
        stored = near.to(tl.float32)
    if correction is not None:
        code = tl.floor(tl.div_rn(new - stored, _spacing(stored, SMALLEST, RELATIVE) * (0.5 / 128)) + 0.5)
        tl.store(correction + place, tl.minimum(tl.maximum(code, -127.0), 127.0).to(tl.int8), mask=here)


# -- the updates -------------------------------------------------------------------------------------------------------


@triton.jit
def _bias(exponent):
    """Return 1 - exp(``exponent``), of a number below 0 also where that is small."""
    series = 1 + exponent / 6 * (1 + exponent / 7)
    for order in tl.static_range(4):
        series = 1 + exponent / (5 - order) * series
    return tl.where(exponent > -0.25, -exponent * series, 1 - tl.exp(exponent))


@triton.jit(
    do_not_specialize=["start", "noise_low", "noise_high"],
    do_not_specialize_on_alignment=["first_scale", "second_scale"],
)
def _adamw(
    value,
    rounded,
    gradient,
    first,
    second,
    first_scale,
    second_scale,
    correction,
    step,
    scale,
    found_inf,
    count,
    start,
    noise_low,
    noise_high,
    lr,
    keep,
    fresh1,
    fresh2,
    log_beta1,
    log_beta2,
    eps,
    STOCHASTIC: tl.constexpr,
    VALUE_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr,
    GRADIENT_BF16: tl.constexpr,
    SMALLEST: tl.constexpr,
    RELATIVE: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    place = row[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    here, row_here = place < count, row * BLOCK < count
    g = read(gradient, place, here, GRADIENT_BF16)
    if scale is not None:
        g *= tl.load(scale)
    m = tl.load(first + place, mask=here, other=0).to(tl.float32)
    v = tl.load(second + place, mask=here, other=0).to(tl.float32)
    if first_scale is not None:
        m *= tl.abs(m) * (tl.load(first_scale + row, mask=row_here, other=0) / 16129.0)[:, None]
        v *= v
        v *= v * (tl.load(second_scale + row, mask=row_here, other=0) / 4228250625.0)[:, None]
    m += fresh1 * (g - m)
    v += fresh2 * (g * g - v)
    taken = tl.load(step)
    root = tl.sqrt(v) / tl.sqrt(_bias(taken * log_beta2)) + eps
    old = _value(value, correction, place, here, VALUE_BF16, SMALLEST, RELATIVE)
    new = old * keep - lr / _bias(taken * log_beta1) * m / root
    if first_scale is not None:
        tiny: tl.constexpr = 1.1754943508222875e-38
        largest = tl.max(tl.abs(m), axis=1)
        tl.store(first_scale + row, largest, mask=row_here)
        code = tl.floor(tl.sqrt(tl.abs(m) / tl.maximum(largest, tiny)[:, None]) * 127 + 0.5)
        tl.store(first + place, tl.where(m < 0, -code, code).to(tl.int8), mask=here)
        largest = tl.max(v, axis=1)
        tl.store(second_scale + row, largest, mask=row_here)
        code = tl.floor(tl.sqrt(tl.sqrt(v / tl.maximum(largest, tiny)[:, None])) * 255 + 0.5)
        tl.store(second + place, code.to(tl.uint8), mask=here)
    else:
        tl.store(first + place, m, mask=here)
        tl.store(second + place, v, mask=here)
    if STOCHASTIC:
        noise = _noise(place + start, step, noise_low, noise_high)
        new = _rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    _store(new, value, rounded, correction, place, here, WEIGHT_BF16, SMALLEST, RELATIVE)


@triton.jit(do_not_specialize=["start", "noise_low", "noise_high"])
def _sgd(
    value,
    rounded,
    gradient,
    momentum,
    correction,
    step,
    scale,
    found_inf,
    count,
    start,
    noise_low,
    noise_high,
    lr,
    kept,
    weight_decay,
    NESTEROV: tl.constexpr,
    STOCHASTIC: tl.constexpr,
    VALUE_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr,
    GRADIENT_BF16: tl.constexpr,
    SMALLEST: tl.constexpr,
    RELATIVE: tl.constexpr,
    SIZE: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64) * SIZE + tl.arange(0, SIZE)
    if found_inf is not None:
        count = tl.where(tl.load(found_inf) == 0, count, 0)
    here = place < count
    g = read(gradient, place, here, GRADIENT_BF16)
    if scale is not None:
        g *= tl.load(scale)
    old = _value(value, correction, place, here, VALUE_BF16, SMALLEST, RELATIVE)
    g += weight_decay * old
    if momentum is not None:
        speed = tl.load(momentum + place, mask=here, other=0) * kept + g
        tl.store(momentum + place, speed, mask=here)
        g = g + kept * speed if NESTEROV else speed
    new = old - lr * g
    if STOCHASTIC:
        noise = _noise(place + start, step, noise_low, noise_high)
        new = _rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    _store(new, value, rounded, correction, place, here, WEIGHT_BF16, SMALLEST, RELATIVE)


@triton.jit
def _tile(first, rows, columns, TILE: tl.constexpr, PART: tl.constexpr):
    """Return ``PART`` rows from ``first`` on, this program's columns, where they lie, and which of them exist."""
    row = first + tl.arange(0, PART)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    here = (row < rows)[:, None] & (column < columns)[None, :]
    return row, column, row[:, None] * columns + column[None, :], here


@triton.jit
def _adafactor_squares(
    gradient,
    row_sums,
    column_sums,
    rows,
    columns,
    GRADIENT_BF16: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    across = tl.zeros((TILE,), tl.float32)
    column = tl.program_id(1) * TILE + tl.arange(0, TILE)
    for number in tl.static_range(TILE // PART):
        row, _, place, here = _tile(tl.program_id(0).to(tl.int64) * TILE + number * PART, rows, columns, TILE, PART)
        g = read(gradient, place, here, GRADIENT_BF16)
        tl.store(row_sums + row * tl.num_programs(1) + tl.program_id(1), tl.sum(g * g, axis=1), mask=row < rows)
        across += tl.sum(g * g, axis=0)
    tl.store(column_sums + tl.program_id(0).to(tl.int64) * columns + column, across, mask=column < columns)


@triton.jit
def _adafactor_length(
    gradient,
    row_factor,
    column_factor,
    sums,
    rows,
    columns,
    GRADIENT_BF16: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    across = tl.zeros((TILE,), tl.float32)
    for number in tl.static_range(TILE // PART):
        row, column, place, here = _tile(
            tl.program_id(0).to(tl.int64) * TILE + number * PART, rows, columns, TILE, PART
        )
        u = read(gradient, place, here, GRADIENT_BF16)
        u *= tl.load(row_factor + row, mask=row < rows, other=0)[:, None]
        u *= tl.load(column_factor + column, mask=column < columns, other=0)[None, :]
        across += tl.sum(u * u, axis=0)
    tl.store(sums + tl.program_id(0) * tl.num_programs(1) + tl.program_id(1), tl.sum(across))


@triton.jit(
    do_not_specialize=["start", "noise_low", "noise_high"],
    do_not_specialize_on_alignment=["row_factor"],
)
def _adafactor(
    value,
    rounded,
    gradient,
    correction,
    row_factor,
    column_factor,
    size,
    keep,
    step,
    found_inf,
    rows,
    columns,
    start,
    noise_low,
    noise_high,
    STOCHASTIC: tl.constexpr,
    VALUE_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr,
    GRADIENT_BF16: tl.constexpr,
    SMALLEST: tl.constexpr,
    RELATIVE: tl.constexpr,
    TILE: tl.constexpr,
    PART: tl.constexpr,
):
    if found_inf is not None:
        rows = tl.where(tl.load(found_inf) == 0, rows, 0)
    row, column, place, here = _tile(tl.program_id(0).to(tl.int64) * PART, rows, columns, TILE, PART)
    u = read(gradient, place, here, GRADIENT_BF16)
    u *= tl.load(row_factor + row, mask=row < rows, other=0)[:, None]
    u *= tl.load(column_factor + column, mask=column < columns, other=0)[None, :]
    old = _value(value, correction, place, here, VALUE_BF16, SMALLEST, RELATIVE)
    new = old * tl.load(keep) - u * tl.load(size)
    if STOCHASTIC:
        noise = _noise(place + start, step, noise_low, noise_high)
        new = _rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    _store(new, value, rounded, correction, place, here, WEIGHT_BF16, SMALLEST, RELATIVE)


# -- launches, with the arguments of the operators ---------------------------------------------------------------------


def adamw(
    value: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    correction: Tensor | None,
    step: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    precision: str | None,
    rates: Sequence[float],
    start: int,
    noise: Sequence[int] | None,
    *,
    rounded: Tensor | None = None,
) -> None:
    """Update a slice; see ``adamw.py``."""
    lr, beta1, beta2, eps, weight_decay = rates
    scales = moments[2:] or (None, None)
    _adamw[(triton.cdiv(block_count(value.numel()), ROWS),)](
        *(storable(tensor) for tensor in (value, rounded, gradient, *moments[:2], *scales, correction)),
        *(step, scale, found_inf, value.numel(), start, *(noise or (0, 0))),
        *(lr, 1 - lr * weight_decay, 1 - beta1, 1 - beta2, _log(beta1), _log(beta2), eps),
        **_forms(value, rounded, gradient, precision),
        ROWS=ROWS,
        BLOCK=BLOCK,
    )


def sgd(
    value: Tensor,
    gradient: Tensor,
    moments: Sequence[Tensor],
    correction: Tensor | None,
    step: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    precision: str | None,
    rates: Sequence[float],
    start: int,
    noise: Sequence[int] | None,
    *,
    rounded: Tensor | None = None,
) -> None:
    """Update a slice; see ``sgd.py``."""
    *factors, nesterov = rates
    _sgd[(triton.cdiv(value.numel(), ROWS * BLOCK),)](
        *(storable(tensor) for tensor in (value, rounded, gradient, moments[0] if moments else None, correction)),
        *(step, scale, found_inf, value.numel(), start, *(noise or (0, 0)), *factors),
        **_forms(value, rounded, gradient, precision),
        NESTEROV=bool(nesterov),
        SIZE=ROWS * BLOCK,
    )


def adafactor_squares(gradient: Tensor) -> tuple[Tensor, Tensor]:
    """Return sums of squares of parts of the rows and of the columns; see ``adafactor.py``."""
    rows, columns = gradient.shape
    tiles = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    row_sums = gradient.new_empty((rows, tiles[1]), dtype=torch.float32)
    column_sums = gradient.new_empty((tiles[0], columns), dtype=torch.float32)
    _adafactor_squares[tiles](
        *(storable(gradient), row_sums, column_sums, rows, columns),
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
        TILE=TILE,
        PART=TILE // 4,
    )
    return row_sums, column_sums


def adafactor_length(gradient: Tensor, row_factor: Tensor, column_factor: Tensor) -> Tensor:
    """Return sums of squares of parts of the update; see ``adafactor.py``."""
    rows, columns = gradient.shape
    tiles = triton.cdiv(rows, TILE), triton.cdiv(columns, TILE)
    sums = row_factor.new_empty(tiles)
    _adafactor_length[tiles](
        *(storable(gradient), row_factor, column_factor, sums, rows, columns),
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
        TILE=TILE,
        PART=TILE // 4,
    )
    return sums


def adafactor(
    value: Tensor,
    gradient: Tensor,
    correction: Tensor | None,
    row_factor: Tensor,
    column_factor: Tensor,
    size: Tensor,
    keep: Tensor,
    step: Tensor,
    found_inf: Tensor | None,
    precision: str | None,
    start: int,
    noise: Sequence[int] | None,
    *,
    rounded: Tensor | None = None,
) -> None:
    """Update some rows; see ``adafactor.py``."""
    rows, columns = gradient.shape
    _adafactor[(triton.cdiv(rows, ROWS * 2), triton.cdiv(columns, TILE))](
        *(storable(tensor) for tensor in (value, rounded, gradient, correction)),
        *(row_factor, column_factor, size, keep, step, found_inf, rows, columns, start, *(noise or (0, 0))),
        **_forms(value, rounded, gradient, precision),
        TILE=TILE,
        PART=ROWS * 2,
    )


def _forms(value: Tensor, rounded: Tensor | None, gradient: Tensor, precision: str | None) -> dict[str, Any]:
    weight = value if rounded is None else rounded
    return {
        "STOCHASTIC": precision == "stochastic",
        "VALUE_BF16": value.dtype == torch.bfloat16,
        "WEIGHT_BF16": weight.dtype == torch.bfloat16,
        "GRADIENT_BF16": gradient.dtype == torch.bfloat16,
        "SMALLEST": torch.finfo(weight.dtype).tiny,
        "RELATIVE": 2.0 ** (1 - SIGNIFICAND_BITS.get(weight.dtype, 24)),
    }


def _log(beta: float) -> float:
    return math.log(beta) if beta else -math.inf
