"""Norms, gated products and rotary embeddings as Triton kernels: each number is read once and written once, forward and backward.

``rms_norm.py``, ``gated_product.py`` and ``rotary.py`` say what each of them is and have its plain form. Inner sums and products are fp32.
Sums over tokens are made part by part, so that they are the same every time.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from oomless.ops.triton_values import nearest_bf16, read, storable, store

TILE = 2048
"""Numbers that one program holds at once, where a row is not wider."""


# -- RMSNorm -----------------------------------------------------------------------------------------------------------


@triton.jit
def _norm(
    x,
    weight,
    result,
    scale,
    rows,
    width,
    x_stride,
    eps,
    ROUND_FIRST: tl.constexpr,
    UNIT_OFFSET: tl.constexpr,
    X_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr,
    RESULT_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    column = tl.arange(0, WIDTH)
    here = (row < rows)[:, None] & (column < width)[None, :]
    wide = read(x, row[:, None] * x_stride + column[None, :], here, X_BF16)
    inverse = tl.div_rn(1.0, tl.sqrt_rn(tl.div_rn(tl.sum(wide * wide, axis=1), width.to(tl.float32)) + eps))
    tl.store(scale + row, inverse, mask=row < rows)
    normal = wide * inverse[:, None]
    if ROUND_FIRST:
        if X_BF16:
            normal = (nearest_bf16(normal) << 16).to(tl.float32, bitcast=True)
        else:
            normal = normal.to(x.dtype.element_ty).to(tl.float32)
    factor = read(weight, column, column < width, WEIGHT_BF16)
    if UNIT_OFFSET:
        factor += 1
    store(result, row[:, None] * width + column[None, :], normal * factor[None, :], here, RESULT_BF16)


@triton.jit
def _norm_backward(
    x,
    weight,
    scale,
    gradient,
    x_gradient,
    weight_parts,
    rows,
    width,
    x_stride,
    gradient_stride,
    tiles,
    UNIT_OFFSET: tl.constexpr,
    X_BF16: tl.constexpr,
    WEIGHT_BF16: tl.constexpr,
    GRADIENT_BF16: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
):
    column = tl.arange(0, WIDTH)
    factor = read(weight, column, column < width, WEIGHT_BF16)
    if UNIT_OFFSET:
        factor += 1
    across = tl.zeros((WIDTH,), tl.float32)
    for tile in range(tiles):
        row = (tl.program_id(0).to(tl.int64) * tiles + tile) * ROWS + tl.arange(0, ROWS)
        here = (row < rows)[:, None] & (column < width)[None, :]
        inverse = tl.load(scale + row, mask=row < rows, other=0)[:, None]
        normal = read(x, row[:, None] * x_stride + column[None, :], here, X_BF16) * inverse
        g = read(gradient, row[:, None] * gradient_stride + column[None, :], here, GRADIENT_BF16)
        if weight_parts is not None:
            across += tl.sum(g * normal, axis=0)
        if x_gradient is not None:
            g *= factor[None, :]
            along = tl.div_rn(tl.sum(g * normal, axis=1), width.to(tl.float32))
            store(
                x_gradient,
                row[:, None] * width + column[None, :],
                (g - normal * along[:, None]) * inverse,
                here,
                X_BF16,
            )
    if weight_parts is not None:
        tl.store(weight_parts + tl.program_id(0).to(tl.int64) * width + column, across, mask=column < width)


# -- the gated product -------------------------------------------------------------------------------------------------


@triton.jit
def _active(gate, ACTIVATION: tl.constexpr):
    """Return the activation of ``gate`` and its slope there."""
    if ACTIVATION == "gelu":
        below = 0.5 * (1 + tl.erf(gate * 0.7071067811865476))
        return gate * below, below + gate * 0.3989422804014327 * tl.exp(-0.5 * gate * gate)
    if ACTIVATION == "gelu_tanh":  # (1 + tanh(a)) / 2 is the logistic function of 2 a
        square = gate * gate
        share = tl.sigmoid(1.5957691216057308 * gate * (1 + 0.044715 * square))
        return gate * share, share + gate * share * (1 - share) * 1.5957691216057308 * (1 + 0.134145 * square)
    share = tl.sigmoid(gate)
    return gate * share, share * (1 + gate * (1 - share))


@triton.jit
def _gated_product(
    gate,
    up,
    result,
    width,
    gate_stride,
    up_stride,
    ACTIVATION: tl.constexpr,
    BF16: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here = column < width
    active, _ = _active(read(gate, row * gate_stride + column, here, BF16), ACTIVATION)
    store(result, row * width + column, active * read(up, row * up_stride + column, here, BF16), here, BF16)


@triton.jit
def _gated_product_backward(
    gate,
    up,
    gradient,
    gate_gradient,
    up_gradient,
    width,
    gate_stride,
    up_stride,
    gradient_stride,
    ACTIVATION: tl.constexpr,
    BF16: tl.constexpr,
    SIZE: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    column = tl.program_id(1) * SIZE + tl.arange(0, SIZE)
    here = column < width
    g = read(gradient, row * gradient_stride + column, here, BF16)
    active, slope = _active(read(gate, row * gate_stride + column, here, BF16), ACTIVATION)
    if up_gradient is not None:
        store(up_gradient, row * width + column, g * active, here, BF16)
    if gate_gradient is not None:
        g *= read(up, row * up_stride + column, here, BF16)
        store(gate_gradient, row * width + column, g * slope, here, BF16)


# -- rotary embeddings -------------------------------------------------------------------------------------------------


@triton.jit
def _rotary(
    x,
    cos,
    sin,
    result,
    heads,
    tokens,
    half,
    rest,
    x_block,
    x_head,
    x_token,
    result_block,
    result_head,
    result_token,
    cos_block,
    cos_token,
    sin_block,
    sin_token,
    BACK: tl.constexpr,
    BF16: tl.constexpr,
    HEADS: tl.constexpr,
    HALF: tl.constexpr,
    REST: tl.constexpr,
):
    block = tl.program_id(0).to(tl.int64) // tokens
    token = tl.program_id(0).to(tl.int64) % tokens
    head = tl.program_id(1) * HEADS + tl.arange(0, HEADS)
    column = tl.arange(0, HALF)
    known = column < half
    here = (head < heads)[:, None] & known[None, :]
    place = (block * x_block + token * x_token + head * x_head)[:, None] + column[None, :]
    left, right = read(x, place, here, BF16), read(x, place + half, here, BF16)
    angle = block * cos_block + token * cos_token + column
    cos_left, cos_right = read(cos, angle, known, BF16)[None, :], read(cos, angle + half, known, BF16)[None, :]
    angle = block * sin_block + token * sin_token + column
    sin_left, sin_right = read(sin, angle, known, BF16)[None, :], read(sin, angle + half, known, BF16)[None, :]
    if BACK:
        new_left, new_right = left * cos_left + right * sin_right, right * cos_right - left * sin_left
    else:
        new_left, new_right = left * cos_left - right * sin_left, right * cos_right + left * sin_right
    target = (block * result_block + token * result_token + head * result_head)[:, None] + column[None, :]
    store(result, target, new_left, here, BF16)
    store(result, target + half, new_right, here, BF16)
    if REST > 0:
        beyond = tl.arange(0, REST)
        here = (head < heads)[:, None] & (beyond < rest)[None, :]
        place = (block * x_block + token * x_token + head * x_head)[:, None] + 2 * half + beyond[None, :]
        target = (
            (block * result_block + token * result_token + head * result_head)[:, None] + 2 * half + beyond[None, :]
        )
        store(result, target, read(x, place, here, BF16), here, BF16)


# -- launches, with the arguments of the operators ---------------------------------------------------------------------


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    round_first: bool,
    unit_offset: bool,
    *,
    result: Tensor,
    scale: Tensor,
) -> None:
    """Normalise the rows of ``x``; see ``rms_norm.py``."""
    rows, width = x.shape
    wide, high = _tile(width)
    _norm[(triton.cdiv(rows, high),)](
        *(storable(x), storable(weight), storable(result), scale, rows, width, x.stride(0), eps),
        ROUND_FIRST=round_first,
        UNIT_OFFSET=unit_offset,
        X_BF16=_is_bf16(x),
        WEIGHT_BF16=_is_bf16(weight),
        RESULT_BF16=_is_bf16(result),
        ROWS=high,
        WIDTH=wide,
        num_warps=_warps(high * wide),
    )


def rms_norm_backward(
    x: Tensor,
    weight: Tensor,
    scale: Tensor,
    gradient: Tensor,
    unit_offset: bool,
    *,
    x_gradient: Tensor | None = None,
    weight_parts: Tensor | None = None,
) -> None:
    """Write the gradients; see ``rms_norm.py``."""
    rows, width = x.shape
    wide, high = _tile(width)
    tiles = 1 if weight_parts is None else triton.cdiv(rows, high * len(weight_parts))
    _norm_backward[(triton.cdiv(rows, high) if weight_parts is None else len(weight_parts),)](
        *(storable(x), storable(weight), scale, storable(gradient), storable(x_gradient), weight_parts),
        *(rows, width, x.stride(0), gradient.stride(0), tiles),
        UNIT_OFFSET=unit_offset,
        X_BF16=_is_bf16(x),
        WEIGHT_BF16=_is_bf16(weight),
        GRADIENT_BF16=_is_bf16(gradient),
        ROWS=high,
        WIDTH=wide,
        num_warps=_warps(high * wide),
    )


def gated_product(gate: Tensor, up: Tensor, activation: str, *, result: Tensor) -> None:
    """Multiply; see ``gated_product.py``."""
    rows, width = gate.shape
    size = min(TILE // 2, triton.next_power_of_2(width))
    _gated_product[(rows, triton.cdiv(width, size))](
        *(storable(gate), storable(up), storable(result), width, gate.stride(0), up.stride(0)),
        ACTIVATION=activation,
        BF16=_is_bf16(gate),
        SIZE=size,
    )


def gated_product_backward(
    gate: Tensor,
    up: Tensor | None,
    gradient: Tensor,
    activation: str,
    *,
    gate_gradient: Tensor | None = None,
    up_gradient: Tensor | None = None,
) -> None:
    """Write the gradients; see ``gated_product.py``."""
    rows, width = gate.shape
    size = min(TILE // 2, triton.next_power_of_2(width))
    _gated_product_backward[(rows, triton.cdiv(width, size))](
        *(storable(gate), storable(up), storable(gradient), storable(gate_gradient), storable(up_gradient)),
        *(width, gate.stride(0), 0 if up is None else up.stride(0), gradient.stride(0)),
        ACTIVATION=activation,
        BF16=_is_bf16(gate),
        SIZE=size,
    )


def rotary(x: Tensor, cos: Tensor, sin: Tensor, back: bool, *, result: Tensor) -> None:
    """Rotate; see ``rotary.py``."""
    blocks, heads, tokens, width = x.shape
    half, rest = cos.shape[-1] // 2, width - cos.shape[-1]
    wide, high = _tile(half)
    high = min(high, triton.next_power_of_2(heads))
    angles = [(0 if len(angle) == 1 else angle.stride(0), angle.stride(1)) for angle in (cos, sin)]
    _rotary[(blocks * tokens, triton.cdiv(heads, high))](
        *(storable(x), storable(cos), storable(sin), storable(result), heads, tokens, half, rest),
        *(*x.stride()[:3], *result.stride()[:3], *angles[0], *angles[1]),
        BACK=back,
        BF16=_is_bf16(x),
        HEADS=high,
        HALF=wide,
        REST=triton.next_power_of_2(rest) if rest else 0,
    )


def _tile(width: int) -> tuple[int, int]:
    """Return the width and the number of rows that one program holds at once."""
    wide = triton.next_power_of_2(width)
    return wide, max(1, TILE // wide)


def _warps(numbers: int) -> int:
    return min(16, max(4, numbers // 512))


def _is_bf16(tensor: Tensor) -> bool:
    return tensor.dtype == torch.bfloat16
