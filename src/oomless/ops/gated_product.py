"""``activation(gate) * up`` that keeps gate and up alone.

Autograd keeps the activation's output besides, and the last projection keeps the product: half of what a gated MLP holds for
backward. Here backward computes the activation again, in slices, and the product is offered for recomputation
(``recompute.py``). Costs an elementwise pass. The result is that of autograd to the bit.

Shapes in names: N tokens (all leading dimensions), I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oomless.ops.recompute import offer
from oomless.ops.repeating import for_each, slices

SLICE_BYTES = 32 << 20
COPIES = 5

Activation = Callable[[Tensor], Tensor]


def gated_product(gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
    """Return ``activation(gate) * up``: [..., I].

    Args:
        gate: [..., I].
        up: as ``gate``.
        activation: works on each number alone and has no parameters that train.
    """
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return activation(gate) * up
    result: Tensor = _GatedProduct.apply(gate, up, activation)  # type: ignore[no-untyped-call]
    kept_gate, kept_up = gate.detach(), up.detach()
    offer(result, lambda: activation(kept_gate) * kept_up)
    return result


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation = activation
        return activation(gate).mul_(up)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        for_gate, for_up = ctx.needs_input_grad[:2]
        gate_NI, up_NI, gradient_NI = (tensor.reshape(-1, gate.shape[-1]) for tensor in (gate, up, gradient))
        gate_gradient = torch.empty_like(gate_NI) if for_gate else None
        up_gradient = torch.empty_like(up_NI) if for_up else None
        tokens, width = gate_NI.shape

        def differentiate(part: slice) -> None:
            with torch.enable_grad():
                leaf = gate_NI[part].detach().requires_grad_()
                active = ctx.activation(leaf)
            if up_gradient is not None:
                torch.mul(gradient_NI[part], active.detach(), out=up_gradient[part])
            if gate_gradient is not None:
                (gate_gradient[part],) = torch.autograd.grad(active, leaf, gradient_NI[part] * up_NI[part])

        facts = (width, gate.dtype, up.dtype, gradient.dtype, for_gate, for_up, ctx.activation)
        for_each(slices(tokens, SLICE_BYTES // (COPIES * width * gate.element_size())), differentiate, facts)
        return (
            None if gate_gradient is None else gate_gradient.view_as(gate),
            None if up_gradient is None else up_gradient.view_as(up),
            None,
        )
