"""Stochastic gradient descent with momentum; the least state of all, for weights that tolerate one rate for
all.

    g ← g + λ·w        b ← μ·b + g        w ← w − lr·(g + μ·b  if nesterov else  b)

Equals ``torch.optim.SGD`` (dampening 0): weight decay is added to the gradient, not decoupled. Fused, it
is one operator (``fused.py``); its plain form is torch's fused kernel, called on slices. State, in bytes a parameter: 4 with momentum, 0 without; plus that of the weight's
precision (``precision.py``) and 4 for each tensor's step counter. Transformers train poorly with it; it is
here for the head alone, and as the floor of what state can cost.
"""

from __future__ import annotations

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
    weight_precision_of,
)
from oomless.optim.fused import Terms, Update
from oomless.optim.offload import HostMemory


class SGD(MemoryLeanOptimizer):
    """SGD with momentum, as ``torch.optim.SGD``. Arguments: see ``MemoryLeanOptimizer``."""

    sliced_state = WEIGHT_STATE_NAMES | {"momentum"}

    def __init__(
        self,
        parameters: Parameters,
        *,
        lr: float = 1e-3,
        momentum: float = 0.9,
        nesterov: bool = False,
        weight_decay: float = 0.0,
        weight_precision: str | None = None,
        slice_bytes: int = DEFAULT_SLICE_BYTES,
        seed: int = 0,
        offload: HostMemory | None = None,
    ) -> None:
        defaults = {"lr": lr, "momentum": momentum, "nesterov": nesterov, "weight_decay": weight_decay}
        super().__init__(
            parameters,
            defaults,
            weight_precision=weight_precision,
            slice_bytes=slice_bytes,
            seed=seed,
            offload=offload,
        )

    def _check_group(self, group: Group) -> None:
        super()._check_group(group)
        require_range("momentum", group["momentum"], 0.0, 1.0)
        if group["nesterov"] and not group["momentum"]:
            raise ValueError("nesterov needs a momentum above 0; got 0; set momentum or drop nesterov")

    def _new_moments(self, parameter: Tensor, group: Group) -> State:
        if not group["momentum"]:
            return {}
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
        gradient_bytes = 0 if gradient.dtype == torch.float32 else 4
        self._update_slices(
            _UPDATE,
            (group["lr"], group["momentum"], group["weight_decay"], float(group["nesterov"])),
            parameter,
            gradient,
            group,
            state,
            gradient_scale,
            found_inf,
            plain_bytes=weight_precision_of(parameter, group).value_bytes + gradient_bytes,
        )


def _plain(weight: Tensor, gradient: Tensor, state: State, terms: Terms, start: int) -> None:
    value = terms.precision.read(weight, state)
    lr, momentum, weight_decay, nesterov = terms.rates
    torch._fused_sgd_(
        [value],
        [gradient.float()],
        [state["momentum"]] if "momentum" in state else [],
        weight_decay=weight_decay,
        momentum=momentum,
        lr=lr,
        dampening=0.0,
        nesterov=bool(nesterov),
        maximize=False,
        is_first_step=False,
        grad_scale=terms.divisor,
        found_inf=terms.found_inf,
    )
    terms.precision.write(weight, state, value, terms.key, start)


_UPDATE = Update("sgd", ("momentum",), _plain)
