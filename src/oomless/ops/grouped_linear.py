"""Linear layers of which each takes some of the rows: the experts of a mixture, one product for each.

A token goes to K of E experts, so N tokens make S = N x K rows, whatever the router decides. They are sorted by expert; each
expert multiplies its own slice of them, into its slice of the result. All that is asked for has a size that follows from S
alone, so a rehearsal, which does not know where tokens go, asks for exactly what a run asks for, and no expert has a capacity
beyond which tokens are dropped. Frozen weights are unpacked one expert at a time, in forward and again in backward.

Shapes in names: N tokens, K experts of each, S = N x K rows, E experts, D in, F out.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import Any, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from oomless.ops.repeating import repeating

MatrixOf = Callable[[int, torch.dtype], Tensor]


class StoredExperts(Protocol):
    """Frozen matrices, one for each expert, that are stored in another form, or elsewhere, than products need them."""

    @property
    def form(self) -> Hashable:
        """What decides, with ``shape``, which memory ``matrices`` asks for."""

    @property
    def shape(self) -> tuple[int, int, int]:
        """Experts, then the shape of each matrix."""

    def matrices(self, experts: Sequence[int]) -> MatrixOf:
        """Return what gives the matrix of each of ``experts``, asked for in this order, on the device and in a dtype.

        Each is to be dropped after its product.
        """


@dataclass(frozen=True, slots=True)
class Groups:
    """Which rows belong to which expert.

    ``bounds`` are E + 1 numbers, increasing: the rows of expert e are ``bounds[e]:bounds[e + 1]``. Rows after the last are
    nobody's; their results are 0.
    """

    bounds: list[int]

    @property
    def busy(self) -> list[int]:
        """The experts that have rows."""
        return [expert for expert, (begin, end) in enumerate(pairwise(self.bounds)) if begin < end]

    def each(self, key: Hashable, function: Callable[[int, slice], None]) -> None:
        """Call ``function`` with every expert that has rows, and with these; ``key`` and their number decide what it asks for."""
        busy = self.busy
        for expert in busy:
            rows = slice(self.bounds[expert], self.bounds[expert + 1])
            repeating((key, rows.stop - rows.start, expert == busy[-1]), partial(function, expert, rows))


def even_bounds(rows: int, experts: int) -> list[int]:
    """Return the bounds of ``rows`` that are spread over ``experts`` as evenly as can be."""
    return [rows * expert // experts for expert in range(experts + 1)]


def grouped_linear(
    inputs: Tensor,
    weight: Tensor | StoredExperts,
    groups: Groups,
    *,
    bias: Tensor | None = None,
    transposed: bool = False,
    base: Tensor | None = None,
    scale: float = 1.0,
) -> Tensor:
    """Return for the rows of each expert e ``base + scale * (inputs @ weight[e].T + bias[e])``: [S, F].

    Args:
        inputs: [S, D], sorted by expert.
        weight: [E, F, D], or [E, D, F] if ``transposed``; a tensor gets a gradient if it wants one.
        groups: whose rows are whose.
        bias: [E, F].
        transposed: how each matrix lies.
        base: [S, F], what to add to, in place.
        scale: a factor.
    """
    result: Tensor = _GroupedLinear.apply(inputs, weight, bias, base, groups, transposed, scale)  # type: ignore[no-untyped-call]
    return result


class _GroupedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        inputs: Tensor,
        weight: Tensor | StoredExperts,
        bias: Tensor | None,
        base: Tensor | None,
        groups: Groups,
        transposed: bool,
        scale: float,
    ) -> Tensor:
        stored = isinstance(weight, Tensor)
        ctx.stored, ctx.groups, ctx.transposed, ctx.scale = None if stored else weight, groups, transposed, scale
        ctx.save_for_backward(inputs if ctx.needs_input_grad[1] else None, weight if stored else None)
        ctx.bias_shape = None if bias is None else bias.shape
        columns = weight.shape[2 if transposed else 1]
        if base is None:
            outputs = inputs.new_empty(inputs.shape[0], columns)
            outputs[groups.bounds[-1] :].zero_()
        else:
            outputs = base
            ctx.mark_dirty(base)

        matrix_of = _matrices(weight, groups)

        def multiply(expert: int, rows: slice) -> None:
            matrix = matrix_of(expert, inputs.dtype)
            target = outputs[rows]
            target.addmm_(
                inputs[rows], matrix if transposed else matrix.t(), beta=0 if base is None else 1, alpha=scale
            )
            if bias is not None:
                target.add_(bias[expert], alpha=scale)

        groups.each(("forward", _key(weight), inputs.dtype, transposed, base is None, bias is None), multiply)
        return outputs

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        inputs, weight = ctx.saved_tensors
        weight = ctx.stored if weight is None else weight
        needs_inputs, needs_weight, needs_bias, needs_base = ctx.needs_input_grad[:4]
        groups: Groups = ctx.groups
        gradient = gradient.contiguous()
        of_inputs = of_weight = of_bias = None
        if needs_inputs:
            of_inputs = gradient.new_empty(gradient.shape[0], weight.shape[1 if ctx.transposed else 2])
            of_inputs[groups.bounds[-1] :].zero_()
        if needs_weight:
            of_weight = torch.zeros_like(weight)
        if needs_bias:
            of_bias = gradient.new_zeros(ctx.bias_shape)

        matrix_of = _matrices(weight, groups) if needs_inputs else None

        def multiply(expert: int, rows: slice) -> None:
            own = gradient[rows]
            if of_inputs is not None and matrix_of is not None:
                matrix = matrix_of(expert, gradient.dtype)
                of_inputs[rows].addmm_(own, matrix.t() if ctx.transposed else matrix, beta=0, alpha=ctx.scale)
            if of_weight is not None:
                left, right = (inputs[rows], own) if ctx.transposed else (own, inputs[rows])
                of_weight[expert].addmm_(left.t(), right, beta=0, alpha=ctx.scale)
            if of_bias is not None:
                torch.sum(own, 0, out=of_bias[expert])

        key = ("backward", _key(weight), gradient.dtype, ctx.transposed, needs_inputs, needs_weight, needs_bias)
        groups.each(key, multiply)
        if of_bias is not None and ctx.scale != 1:
            of_bias.mul_(ctx.scale)
        return of_inputs, of_weight, of_bias, gradient if needs_base else None, None, None, None


def _matrices(weight: Tensor | StoredExperts, groups: Groups) -> MatrixOf:
    if isinstance(weight, Tensor):
        return lambda expert, dtype: weight[expert].to(dtype)
    return weight.matrices(groups.busy)


def _key(weight: Tensor | StoredExperts) -> Hashable:
    form = (weight.dtype, weight.stride()) if isinstance(weight, Tensor) else weight.form
    return form, tuple(weight.shape)


def dispatch(hidden: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
    """Return the row of its token for each place: [S, D].

    Args:
        hidden: [N, D].
        places: int64 [N, K], in which row each choice of each token is.
        tokens: int64 [S], which token each row is of.
    """
    rows: Tensor = _Dispatch.apply(hidden, places, tokens)  # type: ignore[no-untyped-call]
    return rows


class _Dispatch(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, hidden: Tensor, places: Tensor, tokens: Tensor) -> Tensor:
        ctx.save_for_backward(places)
        return hidden.index_select(0, tokens)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None, None]:
        (places,) = ctx.saved_tensors
        return _summed(gradient, places), None, None


def combine(rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
    """Return for each token the sum of its rows, weighted, in the rows' dtype: [N, D].

    Args:
        rows: [S, D].
        weights: [N, K].
        places: int64 [N, K], in which row each choice of each token is.
    """
    sums: Tensor = _Combine.apply(rows, weights, places)  # type: ignore[no-untyped-call]
    return sums


class _Combine(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, rows: Tensor, weights: Tensor, places: Tensor) -> Tensor:
        ctx.save_for_backward(rows if ctx.needs_input_grad[1] else None, weights, places)
        return _summed(rows, places, weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        rows, weights, places = ctx.saved_tensors
        of_rows = of_weights = None
        if ctx.needs_input_grad[0]:
            of_rows = gradient.new_empty(places.numel(), gradient.shape[1])
            for choice in range(places.shape[1]):
                own = gradient * weights[:, choice, None]
                of_rows.index_copy_(0, places[:, choice], own.to(of_rows.dtype))
        if rows is not None:
            of_weights = torch.empty_like(weights)
            for choice in range(places.shape[1]):
                own = rows.index_select(0, places[:, choice])
                of_weights[:, choice] = (own.float() * gradient).sum(1)
        return of_rows, of_weights, None


def _summed(rows: Tensor, places: Tensor, weights: Tensor | None = None) -> Tensor:
    """Return for each token the sum of its rows, weighted if there are ``weights``, taken in at least fp32."""
    wide = torch.promote_types(rows.dtype, torch.float32)
    total = torch.zeros(places.shape[0], rows.shape[1], dtype=wide, device=rows.device)
    for choice in range(places.shape[1]):
        own = rows.index_select(0, places[:, choice])
        total += own if weights is None else own * weights[:, choice, None]
    return total.to(rows.dtype)
