"""The updates as Triton kernels: one launch over a slice, in which every number is read once and written once.

``fused.py`` says which operator each of them is, and what its plain form is. Scales are those of ``blockwise.py``, random bits those
of ``noise.py``. Where ``found_inf`` is 1 nothing is read and nothing stored.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oomless.ops.triton_values import read, storable
from oomless.optim.blockwise import BLOCK, block_count
from oomless.optim.fused import TILE
from oomless.optim.kernel_parts import (
    bias,
    forms,
    log_of,
    random_bits,
    read_value,
    rounded_by_chance,
    store_value,
)

ROWS = 4
"""Blocks of one program."""


# -- the updates -------------------------------------------------------------------------------------------------------


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
    root = tl.sqrt(v) / tl.sqrt(bias(taken * log_beta2)) + eps
    old = read_value(value, correction, place, place, here, VALUE_BF16, SMALLEST, RELATIVE)
    new = old * keep - lr / bias(taken * log_beta1) * m / root
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
        noise = random_bits(place + start, tl.load(step), noise_low, noise_high)
        new = rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    store_value(new, value, rounded, correction, place, place, here, WEIGHT_BF16, SMALLEST, RELATIVE)


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
    old = read_value(value, correction, place, place, here, VALUE_BF16, SMALLEST, RELATIVE)
    g += weight_decay * old
    if momentum is not None:
        speed = tl.load(momentum + place, mask=here, other=0) * kept + g
        tl.store(momentum + place, speed, mask=here)
        g = g + kept * speed if NESTEROV else speed
    new = old - lr * g
    if STOCHASTIC:
        noise = random_bits(place + start, tl.load(step), noise_low, noise_high)
        new = rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    store_value(new, value, rounded, correction, place, place, here, WEIGHT_BF16, SMALLEST, RELATIVE)


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
def _subtract_scaled(
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
    if row_factor is not None:
        u *= tl.load(row_factor + row, mask=row < rows, other=0)[:, None]
    if column_factor is not None:
        u *= tl.load(column_factor + column, mask=column < columns, other=0)[None, :]
    old = read_value(value, correction, place, place, here, VALUE_BF16, SMALLEST, RELATIVE)
    new = old * keep - u * tl.load(size)
    if STOCHASTIC:
        noise = random_bits(place + start, tl.load(step), noise_low, noise_high)
        new = rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    store_value(new, value, rounded, correction, place, place, here, WEIGHT_BF16, SMALLEST, RELATIVE)


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
        *(lr, 1 - lr * weight_decay, 1 - beta1, 1 - beta2, log_of(beta1), log_of(beta2), eps),
        **forms(value, rounded, precision),
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
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
        **forms(value, rounded, precision),
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
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


def subtract_scaled(
    value: Tensor,
    gradient: Tensor,
    correction: Tensor | None,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    size: Tensor,
    keep: float,
    step: Tensor,
    found_inf: Tensor | None,
    precision: str | None,
    start: int,
    noise: Sequence[int] | None,
    *,
    rounded: Tensor | None = None,
) -> None:
    """Update some rows; see ``scaled.py``."""
    rows, columns = gradient.shape
    _subtract_scaled[(triton.cdiv(rows, ROWS * 2), triton.cdiv(columns, TILE))](
        *(storable(tensor) for tensor in (value, rounded, gradient, correction)),
        *(row_factor, column_factor, size, keep, step, found_inf, rows, columns, start, *(noise or (0, 0))),
        **forms(value, rounded, precision),
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
        TILE=TILE,
        PART=ROWS * 2,
    )
