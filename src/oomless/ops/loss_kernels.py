"""The loss' two passes over a chunk of logits as Triton kernels; ``loss_passes.py`` says what they do, and has their plain form."""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oomless.ops.triton_values import read, storable, store

READ_AT_ONCE = 4096
"""Columns of a token that the first pass reads together; a program goes through all of them."""

WRITTEN_AT_ONCE = 2048
"""Columns of a token that a program of the second pass makes."""


@triton.jit
def _final(logit, cap, logit_scale, CAPPED: tl.constexpr):
    """Return x and dx/dlogit."""
    x = logit * logit_scale
    slope = logit_scale
    if CAPPED:
        falling = tl.exp(tl.abs(x) * (-2 / cap))
        size = cap * (1 - falling) / (1 + falling)
        slope = logit_scale * 4 * falling / ((1 + falling) * (1 + falling))
        x = tl.where(x < 0, -size, size)
    return x, slope


@triton.jit(do_not_specialize_on_alignment=["columns"])
def _statistics(
    logits,
    columns,
    largest,
    sums,
    target,
    totals,
    count,
    cap,
    logit_scale,
    CAPPED: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    begin = row * count
    most = tl.load(largest + row)
    column = tl.load(columns + row)
    inside = (column >= 0) & (column < count)
    aim, _slope = _final(read(logits, begin + column, inside, BF16), cap, logit_scale, CAPPED)
    tl.store(target + row, tl.load(target + row) + tl.where(inside, aim, 0.0))
    exponentials = tl.where(tl.arange(0, BLOCK) == 0, tl.load(sums + row), 0.0)
    total = tl.zeros((BLOCK,), tl.float32)
    for first in range(0, count, BLOCK):
        place = first + tl.arange(0, BLOCK)
        here = place < count
        x, _ = _final(read(logits, begin + place, here, BF16), cap, logit_scale, CAPPED)
        if totals is not None:
            total += tl.where(here, x, 0.0)
        x = tl.where(here, x, -float("inf"))
        more = tl.maximum(most, tl.max(x, axis=0))
        exponentials = exponentials * tl.exp(most - more) + tl.exp(x - more)
        most = more
    tl.store(largest + row, most)
    tl.store(sums + row, tl.sum(exponentials, axis=0))
    if totals is not None:
        tl.store(totals + row, tl.load(totals + row) + tl.sum(total, axis=0))


@triton.jit(do_not_specialize=["parts"], do_not_specialize_on_alignment=["columns"])
def _gradient(
    logits,
    columns,
    largest,
    heights,
    factors,
    count,
    parts,
    peak,
    even,
    cap,
    logit_scale,
    CAPPED: tl.constexpr,
    BF16: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = (tl.program_id(0) // parts).to(tl.int64)
    place = tl.program_id(0) % parts * BLOCK + tl.arange(0, BLOCK)
    here = place < count
    x, slope = _final(read(logits, row * count + place, here, BF16), cap, logit_scale, CAPPED)
    made = tl.exp(x - tl.load(largest + row)) * tl.load(heights + row) - even
    made -= tl.where(place == tl.load(columns + row), peak, 0.0)
    store(logits, row * count + place, made * tl.load(factors + row) * slope, here, BF16)


# -- launches, with the arguments of the operators ---------------------------------------------------------------------


def loss_statistics(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    sums: Tensor,
    target: Tensor,
    totals: Tensor | None,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Add a chunk to the statistics of its tokens; one program each."""
    tokens, count = logits.shape
    if tokens:
        _statistics[(tokens,)](
            *(storable(logits), columns, largest, sums, target, totals, count),
            *(softcap or 1.0, logit_scale),
            CAPPED=bool(softcap),
            BF16=logits.dtype == torch.bfloat16,
            BLOCK=min(READ_AT_ONCE, triton.next_power_of_2(count)),
            num_warps=8,
        )


def loss_gradient(
    logits: Tensor,
    columns: Tensor,
    largest: Tensor,
    heights: Tensor,
    factors: Tensor,
    peak: float,
    even: float,
    softcap: float | None,
    logit_scale: float,
) -> None:
    """Put the gradient in the place of a chunk."""
    tokens, count = logits.shape
    block = min(WRITTEN_AT_ONCE, triton.next_power_of_2(count))
    parts = triton.cdiv(count, block)
    if tokens:
        _gradient[(tokens * parts,)](
            *(storable(logits), columns, largest, heights, factors, count, parts, peak, even),
            *(softcap or 1.0, logit_scale),
            CAPPED=bool(softcap),
            BF16=logits.dtype == torch.bfloat16,
            BLOCK=block,
        )
