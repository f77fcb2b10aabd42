"""What APOLLO and GaLore do with a matrix's projection: X = G·P with its moments, and X̃·Pᵀ.

As in ``fused.py``: one operator each, which reads and writes every number once, and its plain form. The operators' kernels
(``projection_kernels.py``) make P's signs where they need them, so that P is never in memory; the plain forms draw it once a
step. Matrices are given as channels × entries; those of wide weights are transposed views.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import register_flop_formula

from oomless.ops.operators import operator
from oomless.optim.base import State, store_unless
from oomless.optim.fused import Terms
from oomless.optim.noise import noise_key, random_signs
from oomless.optim.scaled import kept

RANKS = 256
"""Of so many columns of P one program of the kernel makes sums."""

_KERNELS = "oomless.optim.projection_kernels"


@dataclass(frozen=True)
class Projection:
    """P of one parameter in one step."""

    shape: tuple[int, int]
    """Entries of a channel, and the rank."""

    entry: float
    """The size of each of its numbers."""

    step: Tensor
    refresh_steps: int
    noise: tuple[int, int]
    """What, with the step, gives the key of its signs."""

    @cached_property
    def signs(self) -> Tensor:
        """The signs of P, +1 and -1: entries × rank, fp32."""
        period = (self.step - 1).div(self.refresh_steps).floor()
        return random_signs(noise_key(self.noise, period), self.shape)

    def new_squares(self, channels: int) -> Tensor:
        """Return memory for the sums of ``project``: (channels, 3, parts of the rank), fp32."""
        return torch.empty((channels, 3, -(-self.shape[1] // RANKS)), dtype=torch.float32, device=self.step.device)


def project(
    gradient: Tensor,
    state: State,
    terms: Terms,
    projection: Projection,
    squares: Tensor | None = None,
    *,
    fused: bool,
) -> None:
    """Move the moments of a slice's X.

    Args:
        gradient: channels × entries.
        state: the slice's moments.
        terms: of the parameter; its rates are Adam's two betas and eps.
        projection: of the parameter.
        squares: gets the sums of squares of each channel of G, X and X̃, in parts.
        fused: whether it is one operator without temporaries, or its plain form.
    """
    first, second = state["projected_first_moment"], state["projected_second_moment"]
    if fused:
        _PROJECT(
            *(first, second, gradient, terms.step, terms.scale, terms.found_inf, terms.rates),
            *(projection.entry, projection.refresh_steps, projection.noise),
            squares=squares,
        )
    else:
        _project(first, second, gradient, terms, projection, squares)


def subtract_projected(
    weight: Tensor,
    state: State,
    size: float,
    keep: float,
    terms: Terms,
    projection: Projection,
    start: int,
    *,
    fused: bool,
) -> None:
    """Update a slice's weights by X̃·Pᵀ: w ← keep·w − size·X̃·Pᵀ.

    Args:
        weight: channels × entries.
        state: the slice's, after ``project``.
        size: multiplies the update.
        keep: multiplies the weights.
        terms: as for ``project``.
        projection: of the parameter.
        start: the number of the slice's first element, counted channel by channel.
        fused: whether it is one operator without temporaries, or its plain form.
    """
    if not fused:
        _subtract(weight, state, size, keep, terms, projection, start)
        return
    master = state.get("master")
    _SUBTRACT_PROJECTED(
        *(state["projected_first_moment"], state["projected_second_moment"]),
        *(weight if master is None else master, state.get("correction"), terms.step, terms.found_inf),
        *(terms.precision.name, (*terms.rates, size, keep), start, terms.noise),
        *(projection.entry, projection.refresh_steps, projection.noise),
        rounded=None if master is None else weight,
    )


# -- plain forms -------------------------------------------------------------------------------------------------------


def _project(
    first: Tensor, second: Tensor, gradient: Tensor, terms: Terms, projection: Projection, squares: Tensor | None
) -> None:
    beta1, beta2, _ = terms.rates
    values = _scaled(gradient, terms.scale)
    if squares is not None:
        squares.zero_()[:, 0, 0] = torch.linalg.vector_norm(values, dim=1).square_()
    projected = (values @ projection.signs).mul_(projection.entry)
    del values
    store_unless(terms.found_inf, first, torch.lerp(first, projected, 1 - beta1))
    store_unless(terms.found_inf, second, (second * beta2).addcmul_(projected, projected, value=1 - beta2))
    if squares is not None:
        squares[:, 1, 0] = torch.linalg.vector_norm(projected, dim=1).square_()
        del projected
        squares[:, 2, 0] = torch.linalg.vector_norm(_adam(first, second, terms), dim=1).square_()


def _subtract(
    weight: Tensor, state: State, size: float, keep: float, terms: Terms, projection: Projection, start: int
) -> None:
    adam = _adam(state["projected_first_moment"], state["projected_second_moment"], terms)
    update = adam.mul_(size * projection.entry) @ projection.signs.t()
    del adam
    value = terms.precision.read(weight, state)
    if terms.found_inf is not None:
        update.masked_fill_(terms.found_inf.bool(), 0.0)
    value.mul_(kept(keep, terms.found_inf)).sub_(update)
    del update
    terms.precision.write(weight, state, value, terms.key, start)


def _adam(first: Tensor, second: Tensor, terms: Terms) -> Tensor:
    """Return X̃."""
    beta1, beta2, eps = terms.rates
    root = (second / (1 - beta2**terms.step)).sqrt_().add_(eps)
    return torch.div(first, root, out=root).div_(1 - beta1**terms.step)


def _scaled(gradient: Tensor, gradient_scale: Tensor | None) -> Tensor:
    """Return a slice of the gradient in fp32: itself, or a new tensor."""
    if gradient_scale is None:
        return gradient.float()
    if gradient.dtype == torch.float32:
        return gradient * gradient_scale
    return gradient.float().mul_(gradient_scale)


# -- operators ---------------------------------------------------------------------------------------------------------


def _project_on_cpu(
    first: Tensor,
    second: Tensor,
    gradient: Tensor,
    step: Tensor,
    scale: Tensor | None,
    found_inf: Tensor | None,
    rates: Sequence[float],
    entry: float,
    refresh_steps: int,
    projection_noise: Sequence[int],
    *,
    squares: Tensor | None = None,
) -> None:
    terms = Terms.of_operator(None, torch.float32, rates, step, scale, found_inf, None)
    shape = (gradient.shape[1], first.shape[1])
    _project(first, second, gradient, terms, _again(shape, entry, step, refresh_steps, projection_noise), squares)


def _subtract_on_cpu(
    first: Tensor,
    second: Tensor,
    value: Tensor,
    correction: Tensor | None,
    step: Tensor,
    found_inf: Tensor | None,
    precision: str | None,
    rates: Sequence[float],
    start: int,
    noise: Sequence[int] | None,
    entry: float,
    refresh_steps: int,
    projection_noise: Sequence[int],
    *,
    rounded: Tensor | None = None,
) -> None:
    weight = value if rounded is None else rounded
    *adams, size, keep = rates
    state = {"projected_first_moment": first, "projected_second_moment": second}
    state |= {"master": value} if correction is None else {"correction": correction}
    terms = Terms.of_operator(precision, weight.dtype, adams, step, None, found_inf, noise)
    shape = (weight.shape[1], first.shape[1])
    projection = _again(shape, entry, step, refresh_steps, projection_noise)
    _subtract(weight, state, size, keep, terms, projection, start)


def _again(shape: tuple[int, int], entry: float, step: Tensor, refresh_steps: int, noise: Sequence[int]) -> Projection:
    return Projection(shape=shape, entry=entry, step=step, refresh_steps=refresh_steps, noise=(noise[0], noise[1]))


_PROJECT = operator(
    "project",
    "(Tensor(a!) first, Tensor(b!) second, Tensor gradient, Tensor step, Tensor? scale, Tensor? found_inf, float[] rates, "
    "float entry, int refresh_steps, int[] projection_noise, *, Tensor(c!)? squares=None) -> ()",
    _project_on_cpu,
    kernels=_KERNELS,
)
_SUBTRACT_PROJECTED = operator(
    "subtract_projected",
    "(Tensor first, Tensor second, Tensor(a!) value, Tensor(b!)? correction, Tensor step, Tensor? found_inf, "
    "str? precision, float[] rates, int start, int[]? noise, float entry, int refresh_steps, int[] projection_noise, *, "
    "Tensor(c!)? rounded=None) -> ()",
    _subtract_on_cpu,
    kernels=_KERNELS,
)


@register_flop_formula([torch.ops.oomless.project, torch.ops.oomless.subtract_projected])
def _flops(first: Any, second: Any, matrix: Any, *_: Any, out_shape: Any = None, **__: Any) -> int:
    """Return the operations of the matrix product, channels × entries × rank, from the operators' first arguments."""
    return int(2 * matrix[0] * matrix[1] * first[1])
