"""Stochastic gradient descent: 4 bytes a parameter for momentum (none without), 4 more for a 16-bit weight's master.

The update is PyTorch's fused kernel. Weight decay is part of the gradient, as in PyTorch.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from torch import Tensor
from torch.optim.sgd import sgd

from oomless.optim.base import SLICE_BYTES, MemoryLeanOptimizer


class SGD(MemoryLeanOptimizer):
    """SGD with momentum."""

    def __init__(
        self,
        groups: Iterable[dict[str, Any]],
        *,
        lr: float,
        momentum: float = 0.9,
        weight_decay: float = 0.0,
        slice_bytes: int = SLICE_BYTES,
    ) -> None:
        self.momentum = momentum
        super().__init__(groups, {"lr": lr, "weight_decay": weight_decay}, slice_bytes)

    def buffers(self) -> tuple[str, ...]:  # noqa: D102
        return ("momentum",) if self.momentum else ()

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
        sgd(
            [weight],
            [gradient],
            [*buffers] if buffers else [None],
            fused=True,
            grad_scale=inverse_scale,
            found_inf=found_inf,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            momentum=self.momentum,
            dampening=0.0,
            nesterov=False,
            maximize=False,
        )
