"""Updates that are the gradient times a factor for each row and one for each column: of matrices with Adafactor and with APOLLO.

    w ← keep·w − size·(r·cᵀ ∘ g)

r or c, or both, may be left out.

As in ``fused.py``: one operator, which reads and writes every number once, and its plain form.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import torch
from torch import Tensor

from oomless.optim.fused import Terms, operator

Factors = tuple[Tensor | None, Tensor | None]
"""What each row and each column of the gradient is multiplied by: vectors in fp32, or nothing."""


def subtract_scaled(
    weights: Tensor,
    gradient: Tensor,
    factors: Factors,
    size: Tensor,
    keep: float,
    pieces: Iterable[tuple[slice, dict[str, Tensor]]],
    terms: Terms,
    *,
    fused: bool,
) -> None:
    """Update a matrix slice by slice.

    Args:
        weights: rows × columns, contiguous.
        gradient: of the same shape.
        factors: for rows and columns.
        size: multiplies the update; 0-dim fp32.
        keep: multiplies the weights.
        pieces: slices of whole rows, flat, each with the state of the weight's own precision.
        terms: of the parameter; ``scale`` and ``rates`` are not read.
        fused: whether a slice is one operator without temporaries, or its plain form.
    """
    columns = gradient.shape[1]
    for flat, state in pieces:
        piece = slice(flat.start // columns, flat.stop // columns)
        weight, rows = weights[piece].view(-1), gradient[piece]
        row_factor = None if factors[0] is None else factors[0][piece]
        if not fused:
            _plain(weight, rows, (row_factor, factors[1]), size, keep, state, terms, flat.start)
            continue
        master = state.get("master")
        _SUBTRACT_SCALED(
            *(weight if master is None else master, rows, state.get("correction"), row_factor, factors[1], size, keep),
            *(terms.step, terms.found_inf, terms.precision.name, flat.start, terms.noise),
            rounded=None if master is None else weight,
        )


def row_slices(rows: Tensor, bytes_each: int, free_bytes: int) -> Iterator[slice]:
    """Cut a matrix whose temporaries take ``bytes_each`` an element into slices of whole rows, two at least.

    An even number of rows, as the noise of stochastic rounding comes in pairs of elements.
    """
    length = max(1, free_bytes // (bytes_each * rows.shape[1]) // 2) * 2
    for start in range(0, rows.shape[0], length):
        yield slice(start, min(start + length, rows.shape[0]))


def kept(keep: float, found_inf: Tensor | None) -> Tensor | float:
    """Return what the weights are multiplied by: 1 where ``found_inf`` is 1."""
    return keep if found_inf is None else torch.where(found_inf.bool(), 1.0, keep)


def _plain(
    weight: Tensor,
    gradient: Tensor,
    factors: Factors,
    size: Tensor,
    keep: float,
    state: dict[str, Tensor],
    terms: Terms,
    start: int,
) -> None:
    value = terms.precision.read(weight, state)
    row_factor, column_factor = factors
    update = gradient * (size.view(1, 1) if row_factor is None else (row_factor * size)[:, None])
    if column_factor is not None:
        update.mul_(column_factor)
    update = update.view(-1)
    if terms.found_inf is not None:
        update.masked_fill_(terms.found_inf.bool(), 0.0)
    value.mul_(kept(keep, terms.found_inf)).sub_(update)
    del update
    terms.precision.write(weight, state, value, terms.key, start)


def _on_cpu(
    value: Tensor,
    gradient: Tensor,
    correction: Tensor | None,
    row_factor: Tensor | None,
    column_factor: Tensor | None,
    size: Tensor,
    keep: float,
    step: Tensor,
    found_inf: Tensor | None,
    precision: str | None,
    start: int,
    noise: list[int] | None,
    *,
    rounded: Tensor | None = None,
) -> None:
    weight = value if rounded is None else rounded
    state = {"master": value} if correction is None else {"correction": correction}
    terms = Terms.of_operator(precision, weight.dtype, (), step, None, found_inf, noise)
    _plain(weight, gradient, (row_factor, column_factor), size, keep, state, terms, start)


_SUBTRACT_SCALED = operator(
    "subtract_scaled",
    "(Tensor(a!) value, Tensor gradient, Tensor(b!)? correction, Tensor? row_factor, Tensor? column_factor, Tensor size, "
    "float keep, Tensor step, Tensor? found_inf, str? precision, int start, int[]? noise, *, Tensor(c!)? rounded=None) -> ()",
    _on_cpu,
)
