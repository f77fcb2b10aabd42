"""An elementwise update as one operator, which reads and writes every number once and asks for no memory.

On a GPU the operator is a Triton kernel (``kernels.py``). Its plain form is what the kernel is measured by, the way of an
optimizer that is not ``fused``, and what the operator does on a CPU: on a virtual GPU, whose tensors lie there, it stands for the
kernel, and the books see what the kernel asks for, which is nothing. A rehearsal counts it by its schema: all is read, and what
changes is written too, except ``rounded``, the 16-bit copy of a master, which is only written.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import cached_property, partial

import torch
from torch import Tensor

from oomless.ops import operators
from oomless.optim.noise import noise_key
from oomless.optim.precision import WeightPrecision, weight_precision

TILE = 128
"""Side of the part of a matrix of which one program of a kernel makes sums."""

operator = partial(operators.operator, kernels="oomless.optim.kernels")

_SCHEMA = (
    "(Tensor(a!) value, Tensor gradient, Tensor(b!)[] moments, Tensor(c!)? correction, Tensor step, Tensor? scale, "
    "Tensor? found_inf, str? precision, float[] rates, int start, int[]? noise, *, Tensor(d!)? rounded=None) -> ()"
)


@dataclass(frozen=True)
class Terms:
    """What all slices of a parameter are updated with."""

    precision: WeightPrecision
    rates: tuple[float, ...]
    """The group's hyperparameters that the update calculates with."""

    step: Tensor
    scale: Tensor | None
    """The gradient's factor."""

    found_inf: Tensor | None
    noise: tuple[int, int] | None
    """What, with the step, gives the key of the random bits, where the weight's precision needs them."""

    @classmethod
    def of_operator(
        cls,
        precision: str | None,
        dtype: torch.dtype,
        rates: Sequence[float],
        step: Tensor,
        scale: Tensor | None,
        found_inf: Tensor | None,
        noise: Sequence[int] | None,
    ) -> Terms:
        """Return them from what an operator is given, for weights of ``dtype``."""
        return cls(
            precision=weight_precision(precision, dtype),
            rates=tuple(rates),
            step=step,
            scale=scale,
            found_inf=found_inf,
            noise=None if noise is None else (noise[0], noise[1]),
        )

    @cached_property
    def key(self) -> Tensor | None:
        """The key of this step's random bits."""
        return None if self.noise is None else noise_key(self.noise, self.step)

    @cached_property
    def divisor(self) -> Tensor | None:
        """The gradient's factor as torch's own kernels want it."""
        return None if self.scale is None else self.scale.reciprocal()


PlainForm = Callable[[Tensor, Tensor, dict[str, Tensor], Terms, int], None]
"""Updates a slice, flat, and its state: of the weight, its gradient, its state, the terms, and the number of its first element."""


class Update:
    """The operator of one kind of update; called as its plain form is.

    Args:
        name: of the operator, and of the function of ``kernels`` that is its kernel.
        moments: the names of the state that is the update's own.
        plain: its plain form.
    """

    def __init__(self, name: str, moments: Sequence[str], plain: PlainForm) -> None:
        self.plain = plain
        self._moments = tuple(moments)
        self._operator = operator(name, _SCHEMA, self._on_cpu)

    def __call__(self, weight: Tensor, gradient: Tensor, state: dict[str, Tensor], terms: Terms, start: int) -> None:
        """Update a slice."""
        master = state.get("master")
        self._operator(
            weight if master is None else master,
            gradient,
            [state[name] for name in self._moments if name in state],
            state.get("correction"),
            terms.step,
            terms.scale,
            terms.found_inf,
            terms.precision.name,
            terms.rates,
            start,
            terms.noise,
            rounded=None if master is None else weight,
        )

    def _on_cpu(
        self,
        value: Tensor,
        gradient: Tensor,
        moments: list[Tensor],
        correction: Tensor | None,
        step: Tensor,
        scale: Tensor | None,
        found_inf: Tensor | None,
        precision: str | None,
        rates: list[float],
        start: int,
        noise: list[int] | None,
        *,
        rounded: Tensor | None = None,
    ) -> None:
        weight = value if rounded is None else rounded
        terms = Terms.of_operator(precision, weight.dtype, rates, step, scale, found_inf, noise)
        state = {"step": step, **dict(zip(self._moments, moments, strict=False))}
        if rounded is not None:
            state["master"] = value
        if correction is not None:
            state["correction"] = correction
        self.plain(weight, gradient, state, terms, start)
