"""Muon (Jordan et al., 2024): momentum made orthogonal, for the matrices inside the layers. Experimental.

    b ← μ·b + (1−μ)·g      u = (1−μ)·g + μ·b  (Nesterov; else b)      w ← (1 − lr·λ)·w − lr·s·orthogonal(u)

Five Newton-Schulz iterations bring the singular values of the update near 1. s = 0.2·√(longer side) gives
the update the RMS of a usual Adam step (Liu et al., 2025), so that AdamW's ``lr`` and ``weight_decay`` carry
over.

Embeddings and the output head must not be made orthogonal (their rows are words, of which few occur in a
step), and from shape alone they cannot be told from other matrices. So every group must say it:
``orthogonalise=True`` for hidden or LoRA matrices, False for embeddings and head, which then take AdamW as
all vectors do. A group that does not say it is refused.

State: 4 bytes a parameter for orthogonalised matrices, 8 for the rest; plus that of the weight's precision
and 4 for each step counter. Unlike every other optimizer here it needs whole-matrix temporaries: three of the
matrix and two of the square of its shorter side, in bf16 where the weight is bf16, else in fp32. For
continued pretraining of models that were trained with AdamW, reports of its use are few.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from oomless.optim.adamw import AdamW
from oomless.optim.base import (
    DEFAULT_SLICE_BYTES,
    Group,
    Parameters,
    State,
    require_range,
    state_slice,
    store_unless,
    weight_precision_of,
    weight_state_slice,
)
from oomless.optim.offload import HostMemory

_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ITERATIONS = 5


class Muon(AdamW):
    """Muon for hidden matrices, AdamW for the rest. Further arguments: see ``AdamW`` and
    ``MemoryLeanOptimizer``.

    Args:
        momentum: μ.
        nesterov: look ahead along the momentum.
        orthogonalise: default of groups that do not set it; None refuses them.

    Raises:
        ValueError: a group does not set ``orthogonalise``, or holds a tensor of three or more dimensions.
    """

    sliced_state = AdamW.sliced_state | {"momentum"}

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1e-3,
        momentum: float = 0.95,
        nesterov: bool = True,
        orthogonalise: bool | None = None,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.01,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
        offload: HostMemory | None = None,
    ) -> None:
        self._muon_defaults: dict[str, Any] = {
            "momentum": momentum,
            "nesterov": nesterov,
            "orthogonalise": orthogonalise,
        }
        super().__init__(
            parameters,
            lr=lr,
            betas=betas,
            eps=eps,
            weight_decay=weight_decay,
            weight_precision=weight_precision,
            slice_bytes=slice_bytes,
            seed=seed,
            offload=offload,
        )

    def _extra_defaults(self) -> dict[str, Any]:
        return self._muon_defaults

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        require_range("momentum", group["momentum"], 0.0, 1.0)
        if group["orthogonalise"] is None:
            raise ValueError(
                "Muon needs every group to set orthogonalise: True for matrices inside the layers, False for "
                "embed_tokens and lm_head; got a group without it"
            )

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        if not _orthogonalised(parameter, group):
            return super()._new_moments(parameter, group)
        return {"momentum": torch.zeros_like(parameter, dtype=torch.float32)}

    def _update(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> None:
        if not _orthogonalised(parameter, group):
            super()._update(parameter, gradient, group, state, gradient_scale, found_inf)
            return
        precision = weight_precision_of(parameter, group)
        key = self._noise_key(parameter, group, state)
        direction = self._direction(parameter, gradient, group, state, gradient_scale, found_inf)
        direction = orthogonalised(direction.view(parameter.shape)).reshape(-1)
        size = group["lr"] * 0.2 * max(parameter.shape) ** 0.5
        decay: Tensor | float = 1.0 - group["lr"] * group["weight_decay"]
        if found_inf is not None:
            direction.masked_fill_(found_inf.bool(), 0.0)
            decay = torch.where(found_inf.bool(), 1.0, decay)
        weights = parameter.view(-1)
        pieces = self._slices(parameter.numel(), precision.peak_bytes + self._staged_bytes(parameter))
        for piece, part in self._with_state(parameter, state, pieces, weight_state_slice):
            value = precision.read(weights[piece], part)
            value.mul_(decay).sub_(direction[piece], alpha=size)
            precision.write(weights[piece], part, value, key, piece.start)

    def _direction(
        self,
        parameter: Tensor,
        gradient: Tensor,
        group: Group,
        state: State,
        gradient_scale: Tensor | None,
        found_inf: Tensor | None,
    ) -> Tensor:
        """Update the momentum; return the flat matrix that is to be made orthogonal."""
        gradients = gradient.view(-1)
        working_dtype = torch.bfloat16 if parameter.dtype == torch.bfloat16 else torch.float32
        direction = torch.empty_like(gradients, dtype=working_dtype)
        pieces = self._slices(gradients.numel(), 12 + self._staged_bytes(parameter))
        for piece, part in self._with_state(parameter, {"momentum": state["momentum"]}, pieces, state_slice):
            momentum, fresh = part["momentum"], gradients[piece].float()
            if gradient_scale is not None:
                fresh = fresh * gradient_scale
            store_unless(found_inf, momentum, torch.lerp(momentum, fresh, 1 - group["momentum"]))
            direction[piece] = torch.lerp(fresh, momentum, group["momentum"]) if group["nesterov"] else momentum
        return direction


def orthogonalised(matrix: Tensor) -> Tensor:
    """Return the matrix with its singular values brought near 1 by Newton-Schulz iterations, in its dtype."""
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.t()
    wide = wide / torch.linalg.vector_norm(wide).clamp(min=1e-7)
    a, b, c = _COEFFICIENTS
    for _ in range(_ITERATIONS):
        gram = wide @ wide.t()
        polynomial = torch.addmm(gram, gram, gram, beta=b, alpha=c)
        wide = torch.addmm(wide, polynomial, wide, beta=a)
    return wide if matrix.shape[0] <= matrix.shape[1] else wide.t()


def _orthogonalised(parameter: Tensor, group: Group) -> bool:
    return bool(group["orthogonalise"]) and parameter.dim() == 2
