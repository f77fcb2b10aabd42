"""``activation(gate) * up`` that keeps gate and up alone.

Autograd keeps the activation's output besides, and the last projection keeps the product: half of what a gated MLP holds for
backward. Here backward computes the activation again, in slices, and the product is offered for recomputation
(``recompute.py``). Costs an elementwise pass. The result is that of autograd to the bit.

Fused, forward and backward are one operator each (``layer_kernels.py``) that reads each number once and has no temporaries, for the
activations of ``FUSED``; they do not round in between.

Shapes in names: N tokens (all leading dimensions), I width of the MLP.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from oomless.ops.operators import operator
from oomless.ops.recompute import offer
from oomless.ops.repeating import for_each, slices
from oomless.ops.rms_norm import rows

SLICE_BYTES = 32 << 20
COPIES = 5

Activation = Callable[[Tensor], Tensor]

aten = torch.ops.aten

FUSED: dict[str, tuple[Activation, Callable[[Tensor, Tensor], Tensor]]] = {
    "silu": (functional.silu, aten.silu_backward),
    "gelu": (functional.gelu, aten.gelu_backward),
    "gelu_tanh": (
        partial(functional.gelu, approximate="tanh"),
        partial(aten.gelu_backward, approximate="tanh"),
    ),
}
"""The activations of which there are kernels, and what autograd calls with a gradient and their input."""


def gated_product(gate: Tensor, up: Tensor, activation: Activation, *, fused: str | None = None) -> Tensor:
    """Return ``activation(gate) * up``: [..., I].

    Args:
        gate: [..., I].
        up: as ``gate``.
        activation: works on each number alone and has no parameters that train.
        fused: the name in ``FUSED`` of ``activation``, for one operator without temporaries; not in fp64.
    """
    if not (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad)):
        return _forward(gate, up, activation, fused)
    result: Tensor = _GatedProduct.apply(gate, up, activation, fused)  # type: ignore[no-untyped-call]
    kept_gate, kept_up = gate.detach(), up.detach()
    offer(result, lambda: _forward(kept_gate, kept_up, activation, fused))
    return result


class _GatedProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor, activation: Activation, fused: str | None) -> Tensor:
        ctx.save_for_backward(gate, up)
        ctx.activation, ctx.fused = activation, fused
        return _forward(gate, up, activation, fused)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        gate, up = ctx.saved_tensors
        for_gate, for_up = ctx.needs_input_grad[:2]
        gate_NI, up_NI, gradient_NI = (rows(tensor, ctx.fused is not None) for tensor in (gate, up, gradient))
        gate_gradient = gate_NI.new_empty(gate_NI.shape) if for_gate else None
        up_gradient = up_NI.new_empty(up_NI.shape) if for_up else None
        outputs = {"gate_gradient": gate_gradient, "up_gradient": up_gradient}
        if ctx.fused is None:
            _differentiate(gate_NI, up_NI, gradient_NI, ctx.activation, **outputs)
        else:
            _BACKWARD(gate_NI, up_NI, gradient_NI, ctx.fused, **outputs)
        return (
            None if gate_gradient is None else gate_gradient.view_as(gate),
            None if up_gradient is None else up_gradient.view_as(up),
            *(None, None),
        )


def _forward(gate: Tensor, up: Tensor, activation: Activation, fused: str | None) -> Tensor:
    if fused is None:
        active = activation(gate)
        return active * up if active is gate else active.mul_(up)
    result = gate.new_empty(gate.shape)
    _FORWARD(rows(gate, True), rows(up, True), fused, result=result.view(-1, gate.shape[-1]))
    return result


def _differentiate(
    gate_NI: Tensor,
    up_NI: Tensor,
    gradient_NI: Tensor,
    activation: Activation,
    *,
    gate_gradient: Tensor | None,
    up_gradient: Tensor | None,
) -> None:
    tokens, width = gate_NI.shape

    def differentiate(part: slice) -> None:
        with torch.enable_grad():
            leaf = gate_NI[part].detach().requires_grad_()
            active = activation(leaf)
        if up_gradient is not None:
            torch.mul(gradient_NI[part], active.detach(), out=up_gradient[part])
        if gate_gradient is not None:
            (gate_gradient[part],) = torch.autograd.grad(active, leaf, gradient_NI[part] * up_NI[part])

    trained = gate_gradient is not None, up_gradient is not None
    facts = (width, gate_NI.dtype, up_NI.dtype, gradient_NI.dtype, *trained, activation)
    for_each(slices(tokens, SLICE_BYTES // (COPIES * width * gate_NI.element_size())), differentiate, facts)


# -- the plain forms of the operators ----------------------------------------------------------------------------------


def _multiply(gate: Tensor, up: Tensor, activation: str, *, result: Tensor) -> None:
    torch.mul(FUSED[activation][0](gate), up, out=result)


def _go_back(
    gate: Tensor,
    up: Tensor,
    gradient: Tensor,
    activation: str,
    *,
    gate_gradient: Tensor | None = None,
    up_gradient: Tensor | None = None,
) -> None:
    function, backward = FUSED[activation]
    if up_gradient is not None:
        torch.mul(gradient, function(gate), out=up_gradient)
    if gate_gradient is not None:
        gate_gradient.copy_(backward(gradient * up, gate))


_FORWARD = operator(
    "gated_product",
    "(Tensor gate, Tensor up, str activation, *, Tensor(a!) result) -> ()",
    _multiply,
    kernels="oomless.ops.layer_kernels",
)
_BACKWARD = operator(
    "gated_product_backward",
    "(Tensor gate, Tensor up, Tensor gradient, str activation, *, Tensor(a!)? gate_gradient=None, "
    "Tensor(b!)? up_gradient=None) -> ()",
    _go_back,
    kernels="oomless.ops.layer_kernels",
)
