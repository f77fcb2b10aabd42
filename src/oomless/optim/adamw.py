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

from typing import Any

import torch
from torch import Tensor

from oomless.optim.base import (
    DEFAULT_SLICE_BYTES,
    WEIGHT_STATE_NAMES,
    Group,
    MemoryLeanOptimizer,
    Parameters,
    State,
    require_range,
    state_slice,
    weight_precision_of,
)
from oomless.optim.offload import HostMemory


class AdamW(MemoryLeanOptimizer):
    """AdamW with fp32 moments; equals torch's on fp32 weights. Arguments: see ``MemoryLeanOptimizer``."""

    sliced_state = WEIGHT_STATE_NAMES | {
        *("first_moment", "second_moment", "first_moment_scale", "second_moment_scale"),
    }

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
        offload: HostMemory | None = None,
    ) -> None:
        defaults = {
            "lr": lr,
            "betas": betas,
            "eps": eps,
            "weight_decay": weight_decay,
            **self._extra_defaults(),
        }
        super().__init__(
            parameters,
            defaults,
            weight_precision=weight_precision,
            slice_bytes=slice_bytes,
            seed=seed,
            offload=offload,
        )

    def _extra_defaults(self) -> dict[str, Any]:
        """Return the hyperparameters that a subclass adds to each group."""
        return {}

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
        weights, gradients = parameter.view(-1), gradient.view(-1)
        gradient_bytes = 0 if gradient.dtype == torch.float32 else 4
        update_bytes = precision.value_bytes + max(gradient_bytes, self._moment_bytes(state))
        staged_bytes = self._staged_bytes(parameter)
        pieces = self._slices(parameter.numel(), max(update_bytes, precision.peak_bytes) + staged_bytes)
        for piece, part in self._with_state(parameter, state, pieces, state_slice):
            value = precision.read(weights[piece], part)
            self._update_slice(value, gradients[piece], part, group, divisor, found_inf)
            precision.write(weights[piece], part, value, key, piece.start)

    def _update_slice(
        self,
        value: Tensor,
        gradient: Tensor,
        state: State,
        group: Group,
        gradient_divisor: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        first, second = self._read_moments(state)
        beta1, beta2 = group["betas"]
        torch._fused_adamw_(
            [value],
            [gradient.float()],
            [first],
            [second],
            [],
            [state["step"]],
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
        self._write_moments(state, first, second, found_inf)

    def _moment_bytes(self, state: State) -> int:
        """Return what the moments of ``state`` take in temporaries beside the gradient's, in bytes per
        element.

        The fp32 gradient of a slice and the coding of the moments do not exist at the same time.
        """
        return 0

    def _read_moments(self, state: State) -> tuple[Tensor, Tensor]:
        """Return the moments of a slice in fp32."""
        return state["first_moment"], state["second_moment"]

    def _write_moments(self, state: State, first: Tensor, second: Tensor, found_inf: Tensor | None) -> None:
        """Store moments that ``_read_moments`` returned and the update changed."""


def check_adam_group(group: Group) -> None:
    """Raise a ValueError where ``betas`` or ``eps`` is out of range."""
    beta1, beta2 = group["betas"]
    require_range("betas[0]", beta1, 0.0, 1.0)
    require_range("betas[1]", beta2, 0.0, 1.0)
    require_range("eps", group["eps"], 0.0)
