"""RMSNorm that keeps its input and one number per token.

Replaces::

    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    y = weight * normal.to(x.dtype)              # round_first (Llama, Mistral, Qwen, Phi)
    y = (normal * weight).to(x.dtype)            # not round_first (OLMo 2)
    y = (normal * (1.0 + weight.float())).to(x.dtype)    # unit_offset (Gemma)

Autograd keeps of these lines an fp32 copy of x and the normalised x in 16 bits: 8 bytes for each number with those of the
output. Here x is kept, which the residual stream is as a rule, and 4 bytes per token. The forward is the same to the bit;
backward works in fp32 throughout, where autograd rounds in between. Costs the normalisation once more in backward. The output is
offered for recomputation (``recompute.py``).

Fused, forward and backward are one operator each (``layer_kernels.py``) that reads x, and in backward its gradient, once, and has no
temporaries; sums over tokens, of which the weight's gradient is made, are written for at most ``PARTS`` parts of the tokens. The
temporaries of the plain form take at most ``SLICE_BYTES``.

Shapes in names: N tokens (all leading dimensions), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oomless.ops.operators import operator
from oomless.ops.recompute import offer
from oomless.ops.repeating import for_each, slices

SLICE_BYTES = 32 << 20
COPIES = 5
PARTS = 256
TOKENS_OF_A_PART = 16


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    round_first: bool = True,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
    fused: bool = False,
) -> Tensor:
    """Return the normalised ``x``: [..., D], contiguous.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
        round_first: round to the dtype of ``x`` before the weight multiplies, not after it.
        unit_offset: multiply by 1 + weight.
        dtype: of the result; by default what the lines above give.
        fused: by one operator without temporaries; not in fp64.
    """
    if dtype is None:
        dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
    form = (eps, round_first, unit_offset, dtype, fused)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return _forward(x, weight, *form)[0]
    result: Tensor = _RMSNorm.apply(x, weight, *form)  # type: ignore[no-untyped-call]
    source, factor = x.detach(), weight.detach()
    offer(result, lambda: _forward(source, factor, *form)[0])
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight_D: Tensor,
        eps: float,
        round_first: bool,
        unit_offset: bool,
        dtype: torch.dtype,
        fused: bool,
    ) -> Tensor:
        result, scale_N = _forward(x, weight_D, eps, round_first, unit_offset, dtype, fused)
        ctx.save_for_backward(x, weight_D, scale_N)
        ctx.unit_offset, ctx.fused = unit_offset, fused
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_N = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        x_ND, gradient_ND = rows(x, ctx.fused), rows(gradient, ctx.fused)
        tokens, width = x_ND.shape
        parts = min(PARTS, -(-tokens // TOKENS_OF_A_PART)) if ctx.fused else 1
        x_gradient = x_ND.new_empty(x_ND.shape) if for_x else None
        weight_parts = scale_N.new_empty(parts, width) if for_weight else None
        (_BACKWARD if ctx.fused else _differentiate)(
            *(x_ND, weight_D, scale_N, gradient_ND, ctx.unit_offset), x_gradient=x_gradient, weight_parts=weight_parts
        )
        weight_gradient = None
        if weight_parts is not None:
            weight_gradient = (weight_parts.sum(0) if parts > 1 else weight_parts[0]).to(weight_D.dtype)
        return (None if x_gradient is None else x_gradient.view_as(x), weight_gradient, *(None,) * 5)


def _forward(
    x: Tensor, weight_D: Tensor, eps: float, round_first: bool, unit_offset: bool, dtype: torch.dtype, fused: bool
) -> tuple[Tensor, Tensor]:
    """Return the output, and the inverse root mean squares [N, 1]."""
    x_ND = rows(x, fused)
    result_ND = x_ND.new_empty(x_ND.shape, dtype=dtype)
    scale_N = x_ND.new_empty(x_ND.shape[0], 1, dtype=_exact(x))
    (_FORWARD if fused else _normalise)(
        *(x_ND, weight_D, eps, round_first, unit_offset), result=result_ND, scale=scale_N
    )
    return result_ND.view(x.shape), scale_N


def rows(x: Tensor, fused: bool) -> Tensor:
    """Return ``x`` as [N, D]; for a kernel the numbers of a row lie side by side."""
    x_ND = x.reshape(-1, x.shape[-1])
    return x_ND.contiguous() if fused and x_ND.stride(1) != 1 else x_ND


# -- the plain forms ---------------------------------------------------------------------------------------------------


def _normalise(
    x_ND: Tensor,
    weight_D: Tensor,
    eps: float,
    round_first: bool,
    unit_offset: bool,
    *,
    result: Tensor,
    scale: Tensor,
) -> None:
    exact = scale.dtype
    factor_D = weight_D if round_first else weight_D.to(exact)
    if unit_offset:
        factor_D = factor_D + 1

    def norm(part: slice) -> None:
        wide = x_ND[part].to(exact)
        inverse = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        scale[part] = inverse
        normal = wide * inverse
        result[part] = (normal.to(x_ND.dtype) if round_first else normal) * factor_D

    facts = (x_ND.shape[1], x_ND.stride(), x_ND.dtype, weight_D.dtype, round_first, result.dtype)
    for_each(_slices(x_ND, exact), norm, facts)


def _differentiate(
    x_ND: Tensor,
    weight_D: Tensor,
    scale_N: Tensor,
    gradient_ND: Tensor,
    unit_offset: bool,
    *,
    x_gradient: Tensor | None = None,
    weight_parts: Tensor | None = None,
) -> None:
    """Write both gradients; that of the weight is the sum of its parts, of which the first gets all."""
    exact = scale_N.dtype
    factor_D = weight_D.to(exact) + 1 if unit_offset else weight_D.to(exact)
    if weight_parts is not None:
        weight_parts.zero_()

    def add(part: slice) -> None:
        normal = x_ND[part].to(exact) * scale_N[part]
        wide = gradient_ND[part].to(exact)
        if weight_parts is not None:
            weight_parts[0].add_((wide * normal).sum(0))
        if x_gradient is not None:
            wide = wide * factor_D
            normal.mul_((wide * normal).mean(-1, keepdim=True))
            x_gradient[part] = wide.sub_(normal).mul_(scale_N[part])

    trained = x_gradient is not None, weight_parts is not None
    facts = (x_ND.shape[1], x_ND.stride(), x_ND.dtype, weight_D.dtype, gradient_ND.dtype, *trained)
    for_each(_slices(x_ND, exact), add, facts)


def _exact(x: Tensor) -> torch.dtype:
    return torch.float64 if x.dtype == torch.float64 else torch.float32


def _slices(x_ND: Tensor, exact: torch.dtype) -> list[slice]:
    """Return parts of the tokens whose temporaries take at most ``SLICE_BYTES``."""
    tokens, width = x_ND.shape
    return slices(tokens, SLICE_BYTES // (COPIES * width * exact.itemsize))


_FORWARD = operator(
    "rms_norm",
    "(Tensor x, Tensor weight, float eps, bool round_first, bool unit_offset, *, Tensor(a!) result, Tensor(b!) scale) -> ()",
    _normalise,
    kernels="oomless.ops.layer_kernels",
)
_BACKWARD = operator(
    "rms_norm_backward",
    "(Tensor x, Tensor weight, Tensor scale, Tensor gradient, bool unit_offset, *, Tensor(a!)? x_gradient=None, "
    "Tensor(b!)? weight_parts=None) -> ()",
    _differentiate,
    kernels="oomless.ops.layer_kernels",
)
