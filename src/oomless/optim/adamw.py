"""AdamW (Loshchilov & Hutter 2019) with fp32 state: 8 bytes a parameter, 12 with an fp32 master of a 16-bit weight.

The update is PyTorch's fused kernel, which reads and writes every tensor once and allocates nothing.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.adamw import adamw

from oomless.optim.base import SLICE_BYTES, MemoryLeanOptimizer


class AdamW(MemoryLeanOptimizer):
    """AdamW with decoupled weight decay."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        beta1: float = 0.9,
        beta2: float = 0.999,
        epsilon: float = 1e-8,
        weight_decay: float = 0.0,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        self.beta1, self.beta2, self.epsilon = beta1, beta2, epsilon
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay}, slice_bytes)

    def buffers(self) -> tuple[str, ...]:  # noqa: D102
        return ("exp_avg", "exp_avg_sq")

    def update(  # noqa: D102
        self,
        weight: Tensor,
        gradient: Tensor,
        buffers: list[Tensor],
        step: Tensor,
        group: dict[str, Any],
        inverse_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        adamw(
            [weight],
            [gradient],
            [buffers[0]],
            [buffers[1]],
            [],
            [step],
            fused=True,
            grad_scale=inverse_scale,
            found_inf=found_inf,
            amsgrad=False,
            maximize=False,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            beta1=self.beta1,
            beta2=self.beta2,
            eps=self.epsilon,
        )
