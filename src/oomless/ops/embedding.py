"""An embedding whose backward touches only the rows that occur, in the one gradient buffer of its matrix.

Replaces ``torch.nn.functional.embedding``. Ordinary autograd makes a new V x D gradient, zero but for the few thousand rows
that occur, and adds it to what is there: for a tied matrix a second V x D tensor, with accumulation a third. Here the
tokens' gradients are summed by row in fp32 first, in temporaries of N rows, and each row of the buffer that occurs is added
to once, with one rounding. (``index_add_`` straight into a 16-bit buffer rounds for every token: a word that occurs a few
hundred times would lose most of its gradient in bf16.) A buffer of zeros is made only where there is none.

Costs a sort of the N ids, and temporaries of at most ``chunk_bytes``. Shapes depend on N alone, so nothing waits for the
device; the sum goes through torch's own embedding backward, which is deterministic on the CPU and on CUDA.

Shapes in names: N tokens, V vocabulary, D width.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn import functional

from oomless.ops.gradient_buffer import GradientDestination, deliver, take_buffer


def embedding(
    ids: Tensor,
    weight: Tensor,
    *,
    padding_index: int | None = None,
    destination: GradientDestination = "new",
    chunk_bytes: int = 64 << 20,
) -> Tensor:
    """Return the rows ``ids`` of ``weight``: [..., D].

    Args:
        ids: int64, any shape, each from 0 to V - 1.
        weight: [V, D].
        padding_index: a row that gets no gradient.
        destination: where the gradient of ``weight`` goes.
        chunk_bytes: most bytes of temporaries in backward; those of one column at least.

    Raises:
        ValueError: ``destination`` is not "new" and ``weight`` is not a leaf.
    """
    if not (torch.is_grad_enabled() and weight.requires_grad):
        return functional.embedding(ids, weight)
    if destination != "new" and not weight.is_leaf:
        raise ValueError(f'gradients of a computed tensor are "new"; got {destination!r}: pass the parameter itself')
    result: Tensor = _Embedding.apply(ids, weight, padding_index, destination, chunk_bytes)  # type: ignore[no-untyped-call]
    return result


class _Embedding(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        ids: Tensor,
        weight_VD: Tensor,
        padding_index: int | None,
        destination: GradientDestination,
        chunk_bytes: int,
    ) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.weight = weight_VD
        ctx.settings = (padding_index, destination, chunk_bytes)
        return functional.embedding(ids, weight_VD)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        (ids,) = ctx.saved_tensors
        weight_VD = ctx.weight
        padding_index, destination, chunk_bytes = ctx.settings
        buffer_VD = take_buffer(destination, weight_VD)
        if buffer_VD is None:
            buffer_VD = torch.zeros_like(weight_VD)
        if ids.numel():
            _add_rows(buffer_VD, ids.flatten(), gradient.reshape(-1, gradient.shape[-1]), padding_index, chunk_bytes)
        return None, deliver(destination, weight_VD, buffer_VD), None, None, None


def _add_rows(
    buffer_VD: Tensor, ids_N: Tensor, gradient_ND: Tensor, padding_index: int | None, chunk_bytes: int
) -> None:
    """Add each row of ``gradient_ND`` to the row of ``buffer_VD`` that its id names."""
    tokens, width = gradient_ND.shape
    places_N, rows_N = _distinct(ids_N)
    exact = torch.float64 if gradient_ND.dtype == torch.float64 else torch.float32
    entry_bytes = exact.itemsize
    if gradient_ND.dtype != exact:
        entry_bytes += exact.itemsize + gradient_ND.dtype.itemsize
    columns = max(1, chunk_bytes // (tokens * entry_bytes))
    for start in range(0, width, columns):
        part = slice(start, start + columns)
        sums = torch.ops.aten.embedding_dense_backward(gradient_ND[:, part].to(exact), places_N, tokens, -1, False)
        if padding_index is not None:
            sums.mul_((rows_N != padding_index)[:, None])
        buffer_VD[:, part].index_add_(0, rows_N, sums.to(buffer_VD.dtype))


def _distinct(ids_N: Tensor) -> tuple[Tensor, Tensor]:
    """Number the distinct ids; return each token's number, and each number's id (0 where there are fewer than N).

    A number without an id adds zero to row 0, which keeps all shapes free of the data.
    """
    ordered, order = ids_N.sort()
    first = torch.zeros_like(ids_N)
    first[1:] = ordered[1:] != ordered[:-1]
    number = first.cumsum(0)
    return torch.empty_like(ids_N).scatter_(0, order, number), torch.zeros_like(ids_N).scatter_(0, number, ordered)
