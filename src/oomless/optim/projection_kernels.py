"""A projection's operators as Triton kernels; see ``projection.py``.

One program sees all entries of some channels. The signs of P are a hash of their place, made where they are needed. Where
``found_inf`` is 1 nothing is read of weights and gradients and nothing stored of them or of the moments.

Matrix products are made of TF32, which the tensor cores multiply: it holds signs and gradients of 16 bits exactly, and numbers
of 32 bits as the sum of three (``tf32x3``).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from oomless.ops.triton_values import read, storable
from oomless.optim.kernel_parts import (
    bias,
    forms,
    log_of,
    random_bits,
    read_value,
    rounded_by_chance,
    store_value,
)
from oomless.optim.projection import RANKS

CHANNELS = 32
"""Of one program."""

ENTRIES = 32
"""Of a channel that are multiplied at once by all columns of P that one program sees."""

WIDTH = 64
"""Entries of a channel that one program updates."""


@triton.jit
def _signs(entry, column, rank, step, refresh_steps, low, high):
    """Return P's signs at these entries and columns."""
    period = (tl.load(step).to(tl.int32) - 1) // refresh_steps
    return ((random_bits(entry * rank + column, period, low, high) & 1) * 2 - 1).to(tl.float32)


@triton.jit
def _adam(m, v, step, log_beta1, log_beta2, eps):
    taken = tl.maximum(tl.load(step), 1.0)  # 0 until a first step finds no infinity
    return m / bias(taken * log_beta1) / (tl.sqrt(v / bias(taken * log_beta2)) + eps)


@triton.jit
def _sum_of_squares(values, here):
    return tl.sum(tl.where(here, values * values, 0.0), axis=1)


@triton.jit(do_not_specialize=["refresh_steps", "projection_low", "projection_high"])
def _project(
    first,
    second,
    gradient,
    squares,
    step,
    scale,
    found_inf,
    channels,
    length,
    rank,
    channel_stride,
    entry_stride,
    refresh_steps,
    projection_low,
    projection_high,
    size,
    fresh1,
    fresh2,
    log_beta1,
    log_beta2,
    eps,
    GRADIENT_BF16: tl.constexpr,
    PRECISION: tl.constexpr,
    CHANNELS: tl.constexpr,
    ENTRIES: tl.constexpr,
    RANKS: tl.constexpr,
):
    part, parts = tl.program_id(0), tl.num_programs(0)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    column = part * RANKS + tl.arange(0, RANKS)
    exists = channel < channels
    if found_inf is not None:
        channels = tl.where(tl.load(found_inf) == 0, channels, 0)
    here = channel < channels
    if scale is not None:
        size *= tl.load(scale)
    whole = tl.zeros((CHANNELS,), tl.float32)
    x = tl.zeros((CHANNELS, RANKS), tl.float32)
    for begin in range(0, length, ENTRIES):
        entry = begin + tl.arange(0, ENTRIES)
        place = channel[:, None] * channel_stride + entry[None, :].to(tl.int64) * entry_stride
        g = read(gradient, place, here[:, None] & (entry < length)[None, :], GRADIENT_BF16)
        whole += tl.sum(g * g, axis=1)
        signs = _signs(entry[:, None], column[None, :], rank, step, refresh_steps, projection_low, projection_high)
        x = tl.dot(g, signs, x, input_precision=PRECISION)
    x *= size
    place = channel[:, None] * rank + column[None, :]
    inside = here[:, None] & (column < rank)[None, :]
    m = tl.load(first + place, mask=inside, other=0)
    v = tl.load(second + place, mask=inside, other=0)
    m += fresh1 * (x - m)
    v += fresh2 * (x * x - v)
    tl.store(first + place, m, mask=inside)
    tl.store(second + place, v, mask=inside)
    if squares is not None:
        if scale is not None:
            whole *= tl.load(scale) * tl.load(scale)
        place = channel * 3 * parts + part
        tl.store(squares + place, tl.where(part == 0, whole, 0.0), mask=exists)
        tl.store(squares + place + parts, _sum_of_squares(x, inside), mask=exists)
        adam = _adam(m, v, step, log_beta1, log_beta2, eps)
        tl.store(squares + place + 2 * parts, _sum_of_squares(adam, inside), mask=exists)


@triton.jit(
    do_not_specialize=["start", "noise_low", "noise_high", "refresh_steps", "projection_low", "projection_high"],
)
def _subtract_projected(
    first,
    second,
    value,
    rounded,
    correction,
    step,
    found_inf,
    channels,
    length,
    rank,
    channel_stride,
    entry_stride,
    channel_stride_beside,
    entry_stride_beside,
    start,
    noise_low,
    noise_high,
    refresh_steps,
    projection_low,
    projection_high,
    size,
    keep,
    log_beta1,
    log_beta2,
    eps,
    STOCHASTIC: tl.constexpr,
    VALUE_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr,
    SMALLEST: tl.constexpr,
    RELATIVE: tl.constexpr,
    CHANNELS: tl.constexpr,
    WIDTH: tl.constexpr,
    RANKS: tl.constexpr,
):
    entry = tl.program_id(0) * WIDTH + tl.arange(0, WIDTH)
    channel = tl.program_id(1).to(tl.int64) * CHANNELS + tl.arange(0, CHANNELS)
    if found_inf is not None:
        channels = tl.where(tl.load(found_inf) == 0, channels, 0)
    here = channel < channels
    u = tl.zeros((CHANNELS, WIDTH), tl.float32)
    for begin in range(0, rank, RANKS):
        column = begin + tl.arange(0, RANKS)
        place = channel[:, None] * rank + column[None, :]
        inside = here[:, None] & (column < rank)[None, :]
        m = tl.load(first + place, mask=inside, other=0)
        v = tl.load(second + place, mask=inside, other=0)
        adam = tl.where(inside, _adam(m, v, step, log_beta1, log_beta2, eps), 0.0)
        signs = _signs(entry[None, :], column[:, None], rank, step, refresh_steps, projection_low, projection_high)
        u = tl.dot(adam, signs, u, input_precision="tf32x3")
    across = entry[None, :].to(tl.int64)
    place = channel[:, None] * channel_stride + across * entry_stride
    beside = channel[:, None] * channel_stride_beside + across * entry_stride_beside
    here = here[:, None] & (entry < length)[None, :]
    old = read_value(value, correction, place, beside, here, VALUE_BF16, SMALLEST, RELATIVE)
    new = old * keep - u * size
    if STOCHASTIC:
        noise = random_bits(channel[:, None] * length + across + start, tl.load(step), noise_low, noise_high)
        new = rounded_by_chance(new, noise, WEIGHT_BF16, SMALLEST, RELATIVE)
    store_value(new, value, rounded, correction, place, beside, here, WEIGHT_BF16, SMALLEST, RELATIVE)


# -- launches, with the arguments of the operators ---------------------------------------------------------------------


def project(
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    step: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    rates: Sequence[float],
    entry: float,
    refresh_steps: int,
    projection_noise: Sequence[int],
    *,
    squares: Tensor | None = None,
) -> None:
    """Move the moments of a slice."""
    beta1, beta2, eps = rates
    rank = first.shape[1]
    _project[(triton.cdiv(rank, RANKS), triton.cdiv(first.shape[0], CHANNELS))](
        *(first, second, storable(gradient), squares, step, scale, found_inf, *gradient.shape, rank),
        *(*gradient.stride(), refresh_steps, *projection_noise),
        *(entry, 1 - beta1, 1 - beta2, log_of(beta1), log_of(beta2), eps),
        GRADIENT_BF16=gradient.dtype == torch.bfloat16,
        PRECISION="tf32x3" if gradient.dtype == torch.float32 else "tf32",
        CHANNELS=CHANNELS,
        ENTRIES=ENTRIES,
        RANKS=_columns(rank, RANKS),
        num_warps=8,
    )


def subtract_projected(
    first: Tensor,
    second: Tensor,
    value: Tensor,
    correction: Tensor | None,
    step: Tensor,
    found_inf: Tensor | None,
    precision: str | None,
    rates: Sequence[float],
    start: int,
    noise: Sequence[int] | None,
    entry: float,
    refresh_steps: int,
    projection_noise: Sequence[int],
    *,
    rounded: Tensor | None = None,
) -> None:
    """Update a slice's weights."""
    beta1, beta2, eps, size, keep = rates
    beside = rounded if correction is None else correction
    _subtract_projected[(triton.cdiv(value.shape[1], WIDTH), triton.cdiv(value.shape[0], CHANNELS))](
        *(first, second, storable(value), storable(rounded), correction, step, found_inf),
        *(*value.shape, first.shape[1], *value.stride(), *(value if beside is None else beside).stride()),
        *(start, *(noise or (0, 0)), refresh_steps, *projection_noise),
        *(entry * size, keep, log_of(beta1), log_of(beta2), eps),
        **forms(value, rounded, precision),
        CHANNELS=CHANNELS,
        WIDTH=WIDTH,
        RANKS=_columns(first.shape[1], ENTRIES),
    )


def _columns(rank: int, most: int) -> int:
    """Return how many columns of P are multiplied at once: a power of two, 16 at least, as the tensor cores want it."""
    return int(min(most, max(16, triton.next_power_of_2(rank))))
