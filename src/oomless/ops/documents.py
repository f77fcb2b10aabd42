"""Causal attention of documents packed end to end, all in one launch.

Replaces one call of a kernel for each document. Flash and the memory-efficient kernel know where documents begin (``starts``, whose
last entry is the end), and give each its own softmax. The launch keeps its inputs, its output and a sum of exponentials per query
and head; no output is put together from parts.

In backward kernels take room for themselves that grows with the number of documents: flash 128 rows of fp32 for each, the
memory-efficient one as many as the longest has, rounded up. So documents are cut into several launches where that would be
more than ``SCRATCH_BYTES`` and more than twice what one document of all the tokens takes.

The plain form is below: each document alone. It runs on the CPU, and ``fault`` compares the kernels of a GPU with it before
anything rests on them.

Shapes in names: T tokens of all documents, H heads, G key-value heads, D width of a head, E that of values, N documents.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from functools import lru_cache
from itertools import accumulate, pairwise
from typing import Any, Literal, TypeGuard

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils.flop_counter import register_flop_formula

from oomless.ops.operators import operator

SCRATCH_BYTES = 192 << 20
WIDTHS = 8
"""Kernels load vectors: the width of a head is a multiple of this."""

_FLASH_ROWS = 128
_EFFICIENT_ROWS, _EFFICIENT_SUMS = 64, 32
_CAUSAL = 1
_NAMES = ("queries", "keys", "values")
_TOLERANCE = {torch.float32: 1e-3, torch.bfloat16: 3e-2, torch.float16: 5e-3}

Kernel = Literal["flash", "efficient"]
Lengths = tuple[int, ...]
Shape = tuple[int, ...]


def starts_of(lengths: Sequence[int]) -> Tensor:
    """Return where documents of ``lengths`` begin, and where the last one ends: int32 [N + 1]."""
    return torch.tensor([0, *accumulate(lengths)], dtype=torch.int32)


def attend(
    query_THD: Tensor,
    key_TGD: Tensor,
    value_TGE: Tensor,
    starts_N: Tensor,
    lengths: Lengths,
    *,
    scale: float,
    kernel: Kernel,
    window: int = 0,
) -> Tensor:
    """Return causal attention inside each document: [T, H, E].

    Args:
        query_THD: documents end to end.
        key_TGD: with H a multiple of G, for flash; else G is H.
        value_TGE: as the keys; for flash E is D.
        starts_N: where documents begin, int32 [N + 1] on the same device; see ``starts_of``.
        lengths: those of the documents.
        scale: multiplies the products of queries and keys.
        kernel: the memory-efficient kernel has no window.
        window: a token sees itself and at most this many less one before it; 0 for all.
    """
    if query_THD.stride(0) < query_THD.stride(1):
        query_THD = query_THD.contiguous()  # flash lays its output out as its queries lie
    result: Tensor = _Documents.apply(query_THD, key_TGD, value_TGE, starts_N, lengths, scale, kernel, window)  # type: ignore[no-untyped-call]
    return result


def takes(kernel: str, width: int, value_width: int, windowed: bool) -> TypeGuard[Kernel]:
    """Return whether ``kernel`` can attend to several documents in one launch, with heads so wide."""
    fits = not (width % WIDTHS or value_width % WIDTHS)
    return fits and (kernel == "flash" or (kernel == "efficient" and not windowed))


def launches(lengths: Sequence[int], kernel: Kernel, row_bytes: int) -> list[slice]:
    """Return which documents each launch takes, where a row of scratch takes ``row_bytes``."""
    most = max(2 * sum(lengths), SCRATCH_BYTES // row_bytes)
    found, first = [], 0
    tokens = longest = 0
    for place, length in enumerate(lengths):
        tokens, longest = tokens + length, max(longest, length)
        if place > first and _rows(place + 1 - first, tokens, longest, kernel) > most:
            found.append(slice(first, place))
            first, tokens, longest = place, length, length
    return [*found, slice(first, len(lengths))]


def kept_sums(lengths: Sequence[int], kernel: Kernel) -> int:
    """Return how many sums of exponentials a launch keeps for each head."""
    return sum(lengths) if kernel == "flash" else len(lengths) * _up(max(lengths), _EFFICIENT_SUMS)


def _rows(count: int, tokens: int, longest: int, kernel: Kernel) -> int:
    return tokens + _FLASH_ROWS * count if kernel == "flash" else count * _up(longest, _EFFICIENT_ROWS)


def _up(number: int, step: int) -> int:
    return -(-number // step) * step


class _Documents(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        starts: Tensor,
        lengths: Lengths,
        scale: float,
        kernel: Kernel,
        window: int,
    ) -> Tensor:
        ctx.launches = launches(lengths, kernel, 4 * query.shape[1] * query.shape[2])
        ctx.starts, ctx.lengths, ctx.settings = starts, lengths, (scale, window, kernel == "flash")
        for_backward = any(ctx.needs_input_grad[:3])
        found = [
            _attention(*states, *where, *ctx.settings, for_backward) for states, where in _parts(ctx, query, key, value)
        ]
        output = found[0][0] if len(found) == 1 else torch.cat([part for part, _ in found])
        ctx.save_for_backward(query, key, value, output, *(sums for _, sums in found))
        return output

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, output, *sums = ctx.saved_tensors
        parts = _parts(ctx, gradient.contiguous(), query, key, value, output)
        found = [
            _attention_backward(*states, sums_HT, *where, *ctx.settings)
            for (states, where), sums_HT in zip(parts, sums, strict=True)
        ]
        gradients = found[0] if len(found) == 1 else [torch.cat(parts) for parts in zip(*found, strict=True)]
        wanted = [part if needed else None for part, needed in zip(gradients, ctx.needs_input_grad, strict=False)]
        return (*wanted, None, None, None, None, None)


def _parts(ctx: Any, *states: Tensor) -> Iterator[tuple[list[Tensor], tuple[Tensor, list[int]]]]:
    """Yield for each launch its part of ``states``, where its documents begin in it, and their lengths."""
    first = 0
    for documents in ctx.launches:
        lengths = list(ctx.lengths[documents])
        end = first + sum(lengths)
        starts = ctx.starts
        if len(ctx.launches) > 1:
            starts = starts[documents.start : documents.stop + 1] - first
        yield [state[first:end] for state in states], (starts, lengths)
        first = end


# The operators: what kernels take and return, on CUDA, in a rehearsal, and on the CPU. PyTorch's own forms for fake tensors are not
# asked: that of the memory-efficient backward leaves out an argument (torch 2.13), and a tensor for the gradient of no bias is booked.


def attention_of_documents(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    flash: bool,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Launch a CUDA kernel; return the output, contiguous [T, H, E], and the sums of exponentials."""
    longest = _longest(lengths)
    if flash:
        output, sums = torch.ops.aten._flash_attention_forward(
            query,
            key,
            value,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            False,
            scale=scale,
            **_window(window),
        )[:2]
        return output, sums
    states = (state[None] for state in (query, key, value))
    output, sums = torch.ops.aten._efficient_attention_forward(
        *states, None, starts, starts, longest, longest, 0.0, _CAUSAL, for_backward, scale=scale
    )[:2]
    return output[0], sums


def attention_of_documents_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    """Launch a CUDA kernel; return the gradients of query, key and value."""
    longest = _longest(lengths)
    nothing = query.new_empty(2, dtype=torch.int64)  # the state of random numbers, of which there are none
    if flash:
        found: tuple[Tensor, Tensor, Tensor] = torch.ops.aten._flash_attention_backward(
            gradient,
            query,
            key,
            value,
            output,
            sums,
            starts,
            starts,
            longest,
            longest,
            0.0,
            True,
            nothing.view(torch.uint64),
            nothing,
            scale=scale,
            **_window(window),
        )
        return found
    states = (state[None] for state in (gradient, query, key, value))
    first, *others = states
    gradients = torch.ops.aten._efficient_attention_backward(
        first,
        *others,
        None,
        output[None],
        starts,
        starts,
        longest,
        longest,
        sums,
        0.0,
        nothing[0],
        nothing[1],
        _CAUSAL,
        False,
        scale=scale,
    )[:3]
    return gradients[0][0], gradients[1][0], gradients[2][0]


def _longest(lengths: Sequence[int]) -> int:
    return max(
        2, *lengths
    )  # flash turns heads into queries where no document has more than one token, and its sums with them


def _window(window: int) -> dict[str, int]:
    return {"window_size_left": window - 1, "window_size_right": 0} if window else {}


def _returned(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    flash: bool,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    """Return new tensors as CUDA's kernels do: sums are [H, T] of flash and [N, H, longest rounded up] of the other."""
    heads = query.shape[1]
    output = query.new_empty(*query.shape[:2], value.shape[2])
    if flash:
        return output, query.new_empty(heads, query.shape[0], dtype=torch.float32)
    sums = _up(max(lengths), _EFFICIENT_SUMS) if for_backward else 0
    return output, query.new_empty(len(lengths), heads, sums, dtype=torch.float32)


def _returned_backward(
    gradient: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any
) -> tuple[Tensor, Tensor, Tensor]:
    query, key, value = (state.new_empty(state.shape) for state in (query, key, value))
    return query, key, value


def _scratch(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    flash: bool,
) -> list[int]:
    """Return what a kernel takes for itself in backward: the queries' gradients in fp32, a number for each query, and for flash keys and
    values of all heads. The memory-efficient kernel rounds to tiles of 64, or of 128 where a newer GPU runs it.
    """
    (tokens, heads, width), rows = (
        query.shape,
        _rows(len(lengths), len(query), max(lengths), "flash" if flash else "efficient"),
    )
    if not flash:
        sums_in_fp32 = 0 if query.dtype == torch.float32 else rows * heads * _up(width, _EFFICIENT_ROWS) * 4
        return [tokens * heads * 4, sums_in_fp32]
    expanded = [] if key.shape[1] == heads else [tokens * heads * width * query.itemsize] * 2
    return [rows * heads * 4, rows * heads * _up(width, 32 if width <= 128 else 64) * 4, *expanded]


def _plainly(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    flash: bool,
    for_backward: bool,
) -> tuple[Tensor, Tensor]:
    output, sums = _returned(query, key, value, starts, lengths, scale, window, flash, for_backward)
    for place, rows in enumerate(_rows_of(starts)):
        scores = _scores(query[rows], key[rows], scale, window)
        summed = scores.logsumexp(-1)
        output[rows] = torch.einsum("hqk,khe->qhe", (scores - summed[..., None]).exp(), _heads(value[rows], query))
        if flash:
            sums[:, rows] = summed
        elif for_backward:
            sums[place, :, : summed.shape[1]] = summed
    return output, sums


def _plainly_backward(
    gradient: Tensor,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    output: Tensor,
    sums: Tensor,
    starts: Tensor,
    lengths: list[int],
    scale: float,
    window: int,
    flash: bool,
) -> tuple[Tensor, Tensor, Tensor]:
    found = _returned_backward(gradient, query, key, value)
    for place, rows in enumerate(_rows_of(starts)):
        q, k, v = query[rows].float(), _heads(key[rows], query), _heads(value[rows], query)
        grad, summed = gradient[rows].float(), sums[:, rows] if flash else sums[place, :, : rows.stop - rows.start]
        weights = (_scores(query[rows], key[rows], scale, window) - summed[..., None]).exp()
        inner = (grad * output[rows]).sum(-1).T[..., None]
        of_scores = weights * (torch.einsum("qhe,khe->hqk", grad, v) - inner) * scale
        found[0][rows] = torch.einsum("hqk,khd->qhd", of_scores, k)
        for state, whole in (
            (found[1], torch.einsum("hqk,qhd->khd", of_scores, q)),
            (found[2], torch.einsum("hqk,qhe->khe", weights, grad)),
        ):
            state[rows] = whole.view(len(whole), state.shape[1], -1, state.shape[2]).sum(2)
    return found


def _rows_of(starts: Tensor) -> list[slice]:
    return [slice(first, end) for first, end in pairwise(starts.tolist())]


def _heads(states: Tensor, query: Tensor) -> Tensor:
    """Return keys or values of one document in fp32, one for each head: [T, H, ...]."""
    return states.float().repeat_interleave(query.shape[1] // states.shape[1], 1)


def _scores(query: Tensor, key: Tensor, scale: float, window: int) -> Tensor:
    """Return the scores of one document, in fp32: [H, T, T]."""
    scores = torch.einsum("qhd,khd->hqk", query.float(), _heads(key, query)) * scale
    tokens = torch.arange(len(query))
    before = tokens[:, None] - tokens
    return scores.masked_fill((before < 0) | (before >= (window or len(query))), -torch.inf)


_STATES = "Tensor query, Tensor key, Tensor value"
_HOW = "Tensor starts, int[] lengths, float scale, int window, bool flash"
_attention = operator(
    "attention_of_documents",
    f"({_STATES}, {_HOW}, bool for_backward) -> (Tensor, Tensor)",
    _plainly,
    _returned,
    kernels=__name__,
)
_attention_backward = operator(
    "attention_of_documents_backward",
    f"(Tensor gradient, {_STATES}, Tensor output, Tensor sums, {_HOW}) -> (Tensor, Tensor, Tensor)",
    _plainly_backward,
    _returned_backward,
    kernels=__name__,
    scratch=_scratch,
)


@register_flop_formula(torch.ops.oomless.attention_of_documents)
def _flops(query: Shape, key: Shape, value: Shape, starts: Shape, lengths: list[int], *how: Any, **_: Any) -> int:
    """Return the operations of two products over the pairs of tokens of which one sees the other."""
    _, window = how[:2]
    return 2 * query[1] * pairs(lengths, window) * (query[2] + value[2])


@register_flop_formula(torch.ops.oomless.attention_of_documents_backward)
def _flops_backward(*given: Any, **_: Any) -> int:
    """Return those of five products."""
    _, query, _, value, _, _, _, lengths, _, window, _ = given
    return int(2 * query[1] * pairs(lengths, window) * (3 * query[2] + 2 * value[2]))


def pairs(lengths: Sequence[int], window: int = 0) -> int:
    """Return how many pairs of tokens are attended to in documents of ``lengths``, at most ``window`` (0: all) of each query."""
    firsts = [min(length, window or length) for length in lengths]  # queries that see all before them
    return sum(
        first * (first + 1) // 2 + (length - first) * first for first, length in zip(firsts, lengths, strict=True)
    )


# Is the kernel of this device right?


@lru_cache(maxsize=64)
def fault(
    device: torch.device, dtype: torch.dtype, kernel: Kernel, width: int, value_width: int, groups: int, windowed: bool
) -> str | None:
    """Return what is wrong with the launch for all documents on ``device``; ``None`` where it does what the plain form does.

    Tried once: documents of several lengths in one launch, forward and gradients, ``groups`` heads to a key-value head.

    Raises:
        torch.OutOfMemoryError: there is no room for it, a few MiB.
    """
    lengths, window = (1, 70, 3, 129, 33), 40 if windowed else 0
    key_heads, generator = 2, torch.Generator().manual_seed(0)
    heads = key_heads * (groups if kernel == "flash" else 1)
    how = {"lengths": list(lengths), "scale": width**-0.5, "window": window, "flash": kernel == "flash"}

    def states(count: int, wide: int) -> Tensor:
        return torch.randn(sum(lengths), count, wide, generator=generator).to(dtype)

    with _disable_current_modes(), torch.inference_mode(False), torch.no_grad():
        starts = starts_of(lengths)
        given = [states(heads, width), states(key_heads, width), states(key_heads, value_width)]
        gradient = states(heads, value_width)
        right = _both(_plainly, _plainly_backward, [state.float() for state in given], gradient.float(), starts, how)
        try:
            here = [state.to(device) for state in given]
            got = _both(_attention, _attention_backward, here, gradient.to(device), starts.to(device), how)
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            return f"{type(error).__name__}: {str(error).strip().splitlines()[0][:200]}"
        for name, ours, plain in zip(("output", *(f"gradient of {n}" for n in _NAMES)), got, right, strict=True):
            off = float((ours.float().cpu() - plain).abs().max() / plain.abs().max())
            if not off <= _TOLERANCE[dtype]:  # NaN too
                return f"its {name} is off by {off:.2g} of the largest number, where rounding explains {_TOLERANCE[dtype]:g}"
    return None


def _both(
    forward: Callable[..., Any],
    backward: Callable[..., Any],
    states: list[Tensor],
    gradient: Tensor,
    starts: Tensor,
    how: dict[str, Any],
) -> list[Tensor]:
    """Return the output, and the gradients of query, key and value."""
    output, sums = forward(*states, starts=starts, for_backward=True, **how)
    return [output, *backward(gradient, *states, output, sums, starts=starts, **how)]
