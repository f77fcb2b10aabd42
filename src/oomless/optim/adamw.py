"""AdamW (Loshchilov and Hutter, 2019) with fp32 moments, for fp32 and sixteen-bit weights.

    m ← β1·m + (1−β1)·g        v ← β2·v + (1−β2)·g²
    w ← (1 − lr·λ)·w − lr · m/(1−β1ᵗ) / (√(v/(1−β2ᵗ)) + ε)

Fused, it is one operator (``fused.py``), with moments in 32 bits or in 8. The arithmetic of the plain form is torch's fused
kernel, called on slices: one pass over memory, the counter, the scale and the overflow flag read on the device. fp32
weights with fp32 gradients need no temporaries at all and are not sliced. Sixteen-bit weights are widened a slice at a
time (``precision.py``).

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
    store_unless,
    weight_precision_of,
)
from oomless.optim.blockwise import block_count, decode_signed, decode_unsigned, encode_signed, encode_unsigned
from oomless.optim.fused import Terms, Update
from oomless.optim.offload import HostMemory, to_host

SMALLEST_QUANTISED = 4096
"""Tensors of fewer elements keep fp32 moments where those of others are coded."""


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
        coded = "first_moment_scale" in state
        # The fp32 gradient of a slice and the coding of the moments do not exist at the same time.
        moment_bytes = max(4 * (gradient.dtype != torch.float32), 14 * coded)
        self._update_slices(
            _UPDATE,
            (group["lr"], *group["betas"], group["eps"], group["weight_decay"]),
            parameter,
            gradient,
            group,
            state,
            gradient_scale,
            found_inf,
            plain_bytes=weight_precision_of(parameter, group).value_bytes + moment_bytes,
        )

    # Moments of 32 bits that become such of 8 in the middle of a run

    def can_be_leaner(self) -> bool:
        """Return whether there are moments that ``make_leaner`` would change."""
        return any(self._has_wide_moments(parameter) for parameter in self._index)

    def _has_wide_moments(self, parameter: Tensor) -> bool:
        state = self.state[parameter]
        return "first_moment" in state and "first_moment_scale" not in state and is_quantisable(parameter)

    @torch.no_grad()
    def make_leaner(self, device: HostMemory) -> None:
        """Code the moments in 8 bits, as those of ``adamw_8bit``, from now on; the work is the host's."""
        for parameter in self._index:
            if not self._has_wide_moments(parameter):
                continue
            state, offloaded = self.state[parameter], parameter in self._offloaded
            coded = {}
            for name, encode in (("first_moment", encode_signed), ("second_moment", encode_unsigned)):
                with device.host():
                    whole = state[name].clone() if offloaded else device.fetch(state[name])
                    codes, coded[f"{name}_scale"] = encode(whole.view(-1))
                    coded[name] = codes.view(parameter.shape)
            self._become_leaner(parameter, coded, device)

    def _become_leaner(self, parameter: Tensor, coded: State, device: HostMemory) -> None:
        offloaded = parameter in self._offloaded
        self.state[parameter] |= to_host(dict(coded), self.sliced_state if offloaded else frozenset(), device)
        if offloaded:
            self._note_offloaded(parameter, self.state[parameter])

    def load_state_tensors(self, parameter: Tensor, tensors: State) -> None:
        """Copy as ``MemoryLeanOptimizer`` does; what was saved after ``make_leaner`` makes these moments leaner too."""
        if "first_moment_scale" in tensors and self._has_wide_moments(parameter):
            if self._offload is not None and parameter in self._offloaded:
                self._become_leaner(parameter, tensors, self._offload)
            else:
                self.state[parameter] |= moments_of_8_bits(parameter)
        super().load_state_tensors(parameter, tensors)


def _plain(weight: Tensor, gradient: Tensor, state: State, terms: Terms, start: int) -> None:
    value = terms.precision.read(weight, state)
    _move(value, gradient, state, terms)
    terms.precision.write(weight, state, value, terms.key, start)


def _move(value: Tensor, gradient: Tensor, state: State, terms: Terms) -> None:
    coded = "first_moment_scale" in state
    first, second = state["first_moment"], state["second_moment"]
    if coded:
        first = decode_signed(first, state["first_moment_scale"])
        second = decode_unsigned(second, state["second_moment_scale"])
    lr, beta1, beta2, eps, weight_decay = terms.rates
    torch._fused_adamw_(
        [value],
        [gradient.float()],
        [first],
        [second],
        [],
        [terms.step],
        lr=lr,
        beta1=beta1,
        beta2=beta2,
        weight_decay=weight_decay,
        eps=eps,
        amsgrad=False,
        maximize=False,
        grad_scale=terms.divisor,
        found_inf=terms.found_inf,
    )
    if coded:
        _store_coded(state, "first_moment", encode_signed(first), terms.found_inf)
        _store_coded(state, "second_moment", encode_unsigned(second), terms.found_inf)


def _store_coded(state: State, name: str, coded: tuple[Tensor, Tensor], found_inf: Tensor | None) -> None:
    store_unless(found_inf, state[name], coded[0])
    store_unless(found_inf, state[f"{name}_scale"], coded[1])


_UPDATE = Update("adamw", ("first_moment", "second_moment", "first_moment_scale", "second_moment_scale"), _plain)


def is_quantisable(parameter: Tensor) -> bool:
    """Return whether ``parameter``, or that which it is one process's part of, is large enough for moments of 8 bits."""
    return int(getattr(parameter, "whole_numel", parameter.numel())) >= SMALLEST_QUANTISED


def moments_of_8_bits(parameter: Tensor) -> State:
    """Return both moments of ``parameter``, all zero, in the codes of ``blockwise``."""
    blocks = block_count(parameter.numel())
    return {
        "first_moment": torch.zeros_like(parameter, dtype=torch.int8),
        "first_moment_scale": torch.zeros(blocks, dtype=torch.float32, device=parameter.device),
        "second_moment": torch.zeros_like(parameter, dtype=torch.uint8),
        "second_moment_scale": torch.zeros(blocks, dtype=torch.float32, device=parameter.device),
    }


def check_adam_group(group: Group) -> None:
    """Raise a ValueError where ``betas`` or ``eps`` is out of range."""
    beta1, beta2 = group["betas"]
    require_range("betas[0]", beta1, 0.0, 1.0)
    require_range("betas[1]", beta2, 0.0, 1.0)
    require_range("eps", group["eps"], 0.0)
