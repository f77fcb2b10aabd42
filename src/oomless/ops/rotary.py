"""Rotary position embedding (Su et al. 2021) of queries or keys in one operator, which keeps nothing but the angles.

Replaces::

    left, right = x.chunk(2, -1)
    y = x * cos + torch.cat([-right, left], -1) * sin

Autograd's way is five operators forward and seven backward, whose temporaries are as large as x. Here each number is read once and
written once (``layer_kernels.py``), forward and backward, and nothing is rounded in between. Where ``cos`` is narrower than x, what
is beyond it stays.

Shapes in names: B blocks, H heads, T tokens, D width of a head, R width that is rotated.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oomless.ops.operators import operator


def rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Return ``x`` rotated: [B, H, T, D], which lies in memory as ``x`` does.

    Args:
        x: [B, H, T, D], the numbers of a head side by side.
        cos: [B, T, R] or [1, T, R], in the dtype of ``x``, without gradient.
        sin: as ``cos``.
    """
    result: Tensor = _Rotary.apply(x, cos, sin)  # type: ignore[no-untyped-call]
    return result


class _Rotary(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_BHTD: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        result = torch.empty_like(x_BHTD)
        _OPERATOR(x_BHTD, cos, sin, False, result=result)
        ctx.save_for_backward(cos, sin)
        ctx.strides = result.stride()
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        gradient = gradient if gradient.stride(-1) == 1 else gradient.contiguous()
        result = gradient.new_empty_strided(gradient.shape, ctx.strides)  # as what x is a view of wants it
        _OPERATOR(gradient, *ctx.saved_tensors, True, result=result)
        return result, None, None


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, back: bool, *, result: Tensor) -> None:
    """The plain form; ``back`` takes a gradient of the result to that of ``x``."""
    width = cos.shape[-1]
    part, cos, sin = x[..., :width], cos.unsqueeze(1), sin.unsqueeze(1)
    left, right = (part * sin if back else part).chunk(2, -1)
    turned = torch.cat([right, -left], -1) if back else torch.cat([-right, left], -1) * sin
    result[..., :width] = part * cos + turned
    result[..., width:] = x[..., width:]


_OPERATOR = operator(
    "rotary",
    "(Tensor x, Tensor cos, Tensor sin, bool back, *, Tensor(a!) result) -> ()",
    _rotate,
    kernels="oomless.ops.layer_kernels",
)
