"""RMSNorm that keeps its input and one number per token.

Replaces::

    normal = x.float() * torch.rsqrt(x.float().pow(2).mean(-1, keepdim=True) + eps)
    y = weight * normal.to(x.dtype)              # round_first (Llama, Mistral, Qwen, Phi)
    y = (normal * weight).to(x.dtype)            # not round_first (OLMo 2)
    y = (normal * (1.0 + weight.float())).to(x.dtype)    # unit_offset (Gemma)

Autograd keeps of these lines an fp32 copy of x and the normalised x in 16 bits: 8 bytes for each number with those of the
output. Here x is kept, which the residual stream is as a rule, and 4 bytes per token. The forward is the same to the bit;
backward works in fp32 throughout, where autograd rounds in between. Temporaries take at most ``SLICE_BYTES``. Costs the
normalisation once more in backward. The output is offered for recomputation (``recompute.py``).

Shapes in names: N tokens (all leading dimensions), D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oomless.ops.recompute import offer
from oomless.ops.repeating import for_each, slices

SLICE_BYTES = 32 << 20
COPIES = 5


def rms_norm(
    x: Tensor,
    weight: Tensor,
    *,
    eps: float,
    round_first: bool = True,
    unit_offset: bool = False,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Return the normalised ``x``: [..., D], contiguous.

    Args:
        x: [..., D].
        weight: [D].
        eps: added to the mean square.
        round_first: round to the dtype of ``x`` before the weight multiplies, not after it.
        unit_offset: multiply by 1 + weight.
        dtype: of the result; by default what the lines above give.
    """
    if dtype is None:
        dtype = torch.promote_types(x.dtype, weight.dtype) if round_first else x.dtype
    form = (eps, round_first, unit_offset, dtype)
    if not (torch.is_grad_enabled() and (x.requires_grad or weight.requires_grad)):
        return _forward(x, weight, *form)[0]
    result: Tensor = _RMSNorm.apply(x, weight, *form)  # type: ignore[no-untyped-call]
    source, factor = x.detach(), weight.detach()
    offer(result, lambda: _forward(source, factor, *form)[0])
    return result


class _RMSNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight_D: Tensor, eps: float, round_first: bool, unit_offset: bool, dtype: torch.dtype
    ) -> Tensor:
        result, scale_N = _forward(x, weight_D, eps, round_first, unit_offset, dtype)
        ctx.save_for_backward(x, weight_D, scale_N)
        ctx.unit_offset = unit_offset
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        x, weight_D, scale_N = ctx.saved_tensors
        for_x, for_weight = ctx.needs_input_grad[:2]
        exact = scale_N.dtype
        factor_D = weight_D.to(exact) + 1 if ctx.unit_offset else weight_D.to(exact)
        x_ND, gradient_ND = x.reshape(-1, x.shape[-1]), gradient.reshape(-1, x.shape[-1])
        x_gradient = torch.empty_like(x_ND) if for_x else None
        weight_gradient = torch.zeros_like(factor_D) if for_weight else None

        def add(part: slice) -> None:
            normal = x_ND[part].to(exact) * scale_N[part]
            wide = gradient_ND[part].to(exact)
            if weight_gradient is not None:
                weight_gradient.add_((wide * normal).sum(0))
            if x_gradient is not None:
                wide = wide * factor_D
                normal.mul_((wide * normal).mean(-1, keepdim=True))
                x_gradient[part] = wide.sub_(normal).mul_(scale_N[part])

        facts = (x_ND.shape[1], x_ND.stride(), x.dtype, weight_D.dtype, gradient.dtype, for_x, for_weight)
        for_each(_slices(x_ND, exact), add, facts)
        return (
            None if x_gradient is None else x_gradient.view_as(x),
            None if weight_gradient is None else weight_gradient.to(weight_D.dtype),
            *(None, None, None, None),
        )


def _forward(
    x: Tensor, weight_D: Tensor, eps: float, round_first: bool, unit_offset: bool, dtype: torch.dtype
) -> tuple[Tensor, Tensor]:
    """Return the output, and the inverse root mean squares [N, 1]."""
    exact = torch.float64 if x.dtype == torch.float64 else torch.float32
    x_ND = x.reshape(-1, x.shape[-1])
    result_ND = x_ND.new_empty(x_ND.shape, dtype=dtype)
    scale_N = x_ND.new_empty(x_ND.shape[0], 1, dtype=exact)
    factor_D = weight_D if round_first else weight_D.to(exact)
    if unit_offset:
        factor_D = factor_D + 1

    def norm(part: slice) -> None:
        wide = x_ND[part].to(exact)
        scale = torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
        scale_N[part] = scale
        normal = wide * scale
        result_ND[part] = (normal.to(x.dtype) if round_first else normal) * factor_D

    facts = (x_ND.shape[1], x_ND.stride(), x.dtype, weight_D.dtype, round_first, dtype)
    for_each(_slices(x_ND, exact), norm, facts)
    return result_ND.view(x.shape), scale_N


def _slices(x_ND: Tensor, exact: torch.dtype) -> list[slice]:
    """Return parts of the tokens whose temporaries take at most ``SLICE_BYTES``."""
    tokens, width = x_ND.shape
    return slices(tokens, SLICE_BYTES // (COPIES * width * exact.itemsize))
