"""AdamW (Loshchilov and Hutter, 2019) with fp32 moments, for fp32 and sixteen-bit weights.

    m ← β1·m + (1−β1)·g        v ← β2·v + (1−β2)·g²
    w ← (1 − lr·λ)·w − lr · m/(1−β1ᵗ) / (√(v/(1−β2ᵗ)) + ε)

The arithmetic is torch's fused kernel, called on slices: one pass over memory, the counter, the scale and
the overflow flag read on the device. fp32 weights with fp32 gradients need no temporaries at all and are not
sliced. Sixteen-bit weights are widened a slice at a time (``precision.py``).

State, in bytes a parameter: 8 (two moments), plus that of the weight's precision: master 4, correction 1,
others 0; plus 4 for each tensor's step counter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oomless.optim.base import (
    DEFAULT_SLICE_BYTES,
    Group,
    Parameters,
    SlicedOptimizer,
    State,
    require_range,
    weight_precision_of,
)


class AdamW(SlicedOptimizer):
    """AdamW with fp32 moments; equals torch's on fp32 weights. Arguments: see ``SlicedOptimizer``."""

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1e-3,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay}
        super().__init__(
            parameters, defaults, weight_precision=weight_precision, slice_bytes=slice_bytes, seed=seed
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        check_adam_group(group)

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        return {
            "first_moment": torch.zeros_like(parameter, dtype=torch.float32),
            "second_moment": torch.zeros_like(parameter, dtype=torch.float32),
        }

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        precision = weight_precision_of(parameter, group)
        key = self._noise_key(parameter, group, state)
        divisor = None if gradient_scale is None else gradient_scale.reciprocal()
        flat = {name: tensor.view(-1) for name, tensor in state.items() if name != "step"}
        weights, gradients = parameter.view(-1), gradient.view(-1)
        gradient_bytes = 0 if gradient.dtype == torch.float32 else 4
        temporary_bytes = max(precision.value_bytes + gradient_bytes, precision.peak_bytes)
        for piece in self._slices(parameter.numel(), temporary_bytes):
            part = {name: tensor[piece] for name, tensor in flat.items()}
            value = precision.read(weights[piece], part)
            fused_adamw(
                value,
                gradients[piece].float(),
                part["first_moment"],
                part["second_moment"],
                state["step"],
                group,
                divisor,
                found_inf,
            )
            precision.write(weights[piece], part, value, key, piece.start)


def fused_adamw(
    value: Tensor,
    gradient: Tensor,
    first_moment: Tensor,
    second_moment: Tensor,
    step: Tensor,
    group: Group,
    gradient_divisor: Tensor | None,
    found_inf: Tensor | None,
) -> None:
    """Update fp32 ``value`` and its moments in place with torch's fused kernel; does nothing where found_inf
    is 1.

    ``gradient_divisor`` is 1 / gradient_scale, 0-dim; the kernel also stores the divided gradient.
    """
    beta1, beta2 = group["betas"]
    torch._fused_adamw_(
        [value],
        [gradient],
        [first_moment],
        [second_moment],
        [],
        [step],
        lr=group["lr"],
        beta1=beta1,
        beta2=beta2,
        weight_decay=group["weight_decay"],
        eps=group["eps"],
        amsgrad=False,
        maximize=False,
        grad_scale=gradient_divisor,
        found_inf=found_inf,
    )


def check_adam_group(group: Group) -> None:
    """Raise a ValueError where ``betas`` or ``eps`` is out of range."""
    beta1, beta2 = group["betas"]
    require_range("betas[0]", beta1, 0.0, 1.0)
    require_range("betas[1]", beta2, 0.0, 1.0)
    require_range("eps", group["eps"], 0.0)
