"""Causal attention inside each document of a packed block, without a mask.

Replaces scaled dot-product attention with a block-diagonal T x T mask. Nothing of size T x T exists, and no time goes into
pairs that may not see each other. All documents of all blocks are one launch (``documents.py``) where the kernel is one that knows
where they begin and the caller says so; else documents are attended to one by one, and where there is one per block it is one
batched call.

What no fused kernel does (soft-capped scores, attention sinks, a sliding window shorter than the document without flash) is
computed from plain products over chunks of queries, document by document. Only queries, keys and values are kept, and a chunk is computed again in backward: three
more products than the two forward and five backward of a fused kernel. A chunk's scores, in all their copies, take at
most ``SCORE_BYTES`` (more only where one query's alone do).

Shapes in names: B blocks, H heads, G key-value heads, T tokens, D width of a head.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from functools import partial
from itertools import chain
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.autograd.function import once_differentiable

from oomless.ops import documents
from oomless.ops.random_state import random_states, random_states_set
from oomless.ops.repeating import repeating, slices

Kernel = Literal["auto", "flash", "efficient", "math"]
SCORE_BYTES = 192 << 20
SCORE_COPIES = 6
WIDEST_FLASH_HEAD = 256

_kernel: ContextVar[Kernel] = ContextVar("attention_kernel", default="auto")


@contextmanager
def attention_kernel(kernel: Kernel) -> Iterator[None]:
    """Have attention call the named CUDA kernel's own op, also on fake CPU tensors, so that a rehearsal books it.

    ``auto`` leaves the choice to PyTorch.
    """
    token = _kernel.set(kernel)
    try:
        yield
    finally:
        _kernel.reset(token)


def kernel_for(capability: tuple[int, int], dtype: torch.dtype, head_width: int = 0) -> Kernel:
    """Return the kernel that PyTorch takes on a CUDA GPU for causal attention without a mask.

    Flash needs compute capability 8.0, 16-bit inputs and heads of at most 256; the memory-efficient kernel takes the
    rest. (cuDNN's kernel on compute capability 9.0 keeps the same tensors as flash.) Without ``head_width``, which may differ
    between a model's layers, ``choose_kernel`` has the last word at each.
    """
    if capability >= (8, 0) and dtype in (torch.float16, torch.bfloat16) and head_width <= WIDEST_FLASH_HEAD:
        return "flash"
    return "efficient"


def choose_kernel(device: torch.device, dtype: torch.dtype, width: int, value_width: int) -> tuple[Kernel, bool]:
    """Return the kernel, where it is not left to the CPU, and whether it takes fewer key-value heads than heads."""
    kernel = _kernel.get()
    if kernel == "auto" and device.type == "cuda":
        kernel = kernel_for(torch.cuda.get_device_capability(device), dtype, width)
    if kernel == "flash" and (width != value_width or width > WIDEST_FLASH_HEAD):
        kernel = "efficient"  # flash wants queries, keys and values of one width, which latent attention has not
    return kernel, kernel == "flash"


def packed_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    document_lengths: tuple[tuple[int, ...], ...] | None = None,
    document_starts: Tensor | None = None,
    scale: float,
    sliding_window: int | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
    dropout: float = 0.0,
) -> Tensor:
    """Return causal attention within documents: [B, T, H, D].

    Args:
        query: [B, H, T, D].
        key: [B, G, T, D] with H a multiple of G.
        value: as ``key``.
        document_lengths: for each block, the lengths of its documents in order; None means one document per block.
        document_starts: where they begin, ``documents.starts_of`` of all lengths on the device of ``query``: attends to all
            documents in one launch where the kernel can. None for one by one.
        scale: multiplies the products of queries and keys.
        sliding_window: a token sees itself and at most this many less one before it.
        softcap: scores become ``softcap * tanh(scores / softcap)``.
        sinks: [H], a learnt score per head that takes part in the softmax and has no value.
        dropout: probability of dropping an attention weight.

    Raises:
        ValueError: there are not as many tuples of lengths as blocks, or one's are not positive or do not sum to T.
    """
    blocks, _, length, _ = query.shape
    if document_lengths is not None:
        if len(document_lengths) != blocks:
            raise ValueError(f"there must be document lengths for all {blocks} blocks; got {len(document_lengths)}")
        for lengths in document_lengths:
            if sum(lengths) != length or min(lengths) < 1:
                raise ValueError(f"document lengths must be positive and sum to {length} tokens; got {lengths}")
    alone = document_lengths is None or all(len(lengths) == 1 for lengths in document_lengths)
    plain = softcap is None and sinks is None and not dropout
    if document_starts is not None and document_lengths is not None and plain:
        lengths = tuple(chain.from_iterable(document_lengths))
        window = sliding_window if sliding_window is not None and sliding_window < max(lengths) else 0
        if (window or not alone) and (kernel := _for_documents(query, key, value, window)):
            return _in_one_launch(query, key, value, document_starts, lengths, scale, kernel, window)
    if document_lengths is None or alone:
        return _document(query, key, value, scale, sliding_window, softcap, sinks, dropout)
    rows = []
    # Not slices: the gradient of each would be a tensor of the whole block, mostly zeros.
    for lengths, *states in zip(document_lengths, *(torch.split(t, 1) for t in (query, key, value)), strict=True):
        each = zip(*(torch.split(t, lengths, dim=2) for t in states), strict=True)
        parts = [_document(q, k, v, scale, sliding_window, softcap, sinks, dropout) for q, k, v in each]
        rows.append(torch.cat(parts, dim=1))
    return torch.cat(rows)


def knows_documents(device: torch.device) -> bool:
    """Return whether the kernel that is chosen on ``device`` can attend to several documents in one launch."""
    kernel = _kernel.get()
    return kernel in ("flash", "efficient") or (kernel == "auto" and device.type == "cuda")


def _for_documents(query: Tensor, key: Tensor, value: Tensor, window: int) -> documents.Kernel | None:
    """Return the kernel that attends to several documents in one launch; ``None`` where none does."""
    width, value_width = query.shape[3], value.shape[3]
    kernel, _ = choose_kernel(query.device, query.dtype, width, value_width)
    if not documents.takes(kernel, width, value_width, window > 0):
        return None
    if isinstance(query, FakeTensor):
        return kernel  # a rehearsal is of a GPU on which it works
    heads = (width, value_width, query.shape[1] // key.shape[1])
    fault = documents.fault(query.device, query.dtype, kernel, *heads, window > 0)
    if fault is None:
        return kernel
    warnings.warn(f"documents are attended to one by one by heads {width} wide: in one launch {fault}", stacklevel=2)
    return None


def _in_one_launch(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    starts: Tensor,
    lengths: tuple[int, ...],
    scale: float,
    kernel: documents.Kernel,
    window: int,
) -> Tensor:
    """Attention of all documents of all blocks: [B, T, H, D]."""
    groups = 1 if kernel == "flash" else query.shape[1] // key.shape[1]
    rows = _rows(query, 1), _rows(key, groups), _rows(value, groups)
    output = documents.attend(*rows, starts, lengths, scale=scale, kernel=kernel, window=window)
    return output.view(query.shape[0], -1, *output.shape[1:])


def _rows(states: Tensor, groups: int) -> Tensor:
    """Return [B, G, T, D] as [B * T, G * groups, D], with every head ``groups`` times."""
    B, G, T, D = states.shape
    states = states.transpose(1, 2)
    if groups > 1:
        states = states[:, :, :, None].expand(B, T, G, groups, D)
    return states.reshape(B * T, G * groups, D)


def _document(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scale: float,
    window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
    dropout: float,
) -> Tensor:
    """Causal attention over one document per row: [B, T, H, D]."""
    windowed = window is not None and query.shape[2] > window
    if softcap is None and sinks is None and not windowed:
        return _fused(query, key, value, scale, dropout).transpose(1, 2)
    reach = window if window is not None and windowed else query.shape[2]
    per_query = query.shape[0] * query.shape[1] * min(query.shape[2], 2 * reach) * 4 * SCORE_COPIES
    queries = max(1, min(reach, SCORE_BYTES // per_query))
    result: Tensor = _Scored.apply(query, key, value, sinks, queries, reach, scale, softcap, dropout)  # type: ignore[no-untyped-call]
    return result


class _Scored(torch.autograd.Function):
    """Attention from plain products, some queries at a time."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        queries: int,
        reach: int,
        scale: float,
        softcap: float | None,
        dropout: float,
    ) -> Tensor:
        ctx.save_for_backward(query, key, value, sinks)
        ctx.chunks, ctx.settings = _chunks(query.shape[2], queries, reach), (reach, scale, softcap, dropout)
        ctx.random_states = random_states(query) if dropout else []
        result = query.new_empty(query.shape[0], query.shape[2], query.shape[1], value.shape[3])

        def attend(rows: slice, seen: slice) -> None:
            states = (query[:, :, rows], key[:, :, seen], value[:, :, seen], sinks)
            result[:, rows] = _scores_attention(*states, rows.start - seen.start, *ctx.settings).transpose(1, 2)

        for chunk in ctx.chunks:
            repeating(_key("forward", chunk, query, key, value, sinks, softcap, dropout), partial(attend, *chunk))
        return result

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, ...]:
        states = query, key, value, sinks = ctx.saved_tensors
        wanted = ctx.needs_input_grad[:4]
        gradients = [torch.zeros_like(state) if wants else None for state, wants in zip(states, wanted, strict=True)]

        def add(rows: slice, seen: slice) -> None:
            places: list[Any] = [(..., rows, slice(None)), (..., seen, slice(None)), (..., seen, slice(None)), ...]
            parts = [
                None if state is None else state[place].detach().requires_grad_(wants)
                for state, place, wants in zip(states, places, wanted, strict=True)
            ]
            with torch.enable_grad():
                output = _scores_attention(*parts, rows.start - seen.start, *ctx.settings)  # type: ignore[arg-type, call-arg]
            leaves = [part for part in parts if part is not None and part.requires_grad]
            found = iter(torch.autograd.grad(output, leaves, gradient[:, rows].transpose(1, 2)))
            for whole, place in zip(gradients, places, strict=True):
                if whole is not None:
                    whole[place].add_(next(found))

        _, _, softcap, dropout = ctx.settings
        with random_states_set(ctx.random_states, query):
            for chunk in ctx.chunks:
                facts = _key("backward", chunk, query, key, value, sinks, softcap, dropout)
                repeating((facts, wanted, gradient.stride()), partial(add, *chunk))
        return (*gradients, None, None, None, None, None)


def _chunks(tokens: int, queries: int, reach: int) -> list[tuple[slice, slice]]:
    """Return the queries of each chunk, and the keys that any of them sees."""
    return [(rows, slice(max(0, rows.start - reach + 1), rows.stop)) for rows in slices(tokens, queries)]


def _key(what: str, chunk: tuple[slice, slice], query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Any:
    """Return what decides which memory ``_scores_attention`` of ``chunk`` asks for."""
    rows, seen = chunk
    sizes = (rows.stop - rows.start, seen.stop - seen.start)
    laid_out = [(state.shape[:2], state.shape[3], state.stride(), state.dtype) for state in (query, key, value)]
    sinks, softcap, dropout = others
    return ("scores attention", what, *sizes, *laid_out, sinks is None or sinks.dtype, softcap is None, dropout > 0)


def _fused(query: Tensor, key: Tensor, value: Tensor, scale: float, dropout: float) -> Tensor:
    groups = query.shape[1] // key.shape[1]
    chosen, native_groups = choose_kernel(query.device, query.dtype, query.shape[3], value.shape[3])
    kernel = chosen if _kernel.get() != "auto" else "auto"
    if groups > 1 and not native_groups:
        key, value = _repeated(key, groups), _repeated(value, groups)
    if kernel == "flash":
        output: Tensor = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, dropout, True, False, scale=scale
        )[0]
        return output
    if kernel == "efficient":
        for_backward = torch.is_grad_enabled() and any(states.requires_grad for states in (query, key, value))
        output = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, None, for_backward, dropout, True, scale=scale
        )[0]
        return output
    if kernel == "math":
        output = torch.ops.aten._scaled_dot_product_attention_math(query, key, value, None, dropout, True, scale=scale)[
            0
        ]
        return output
    return F.scaled_dot_product_attention(
        query, key, value, is_causal=True, scale=scale, dropout_p=dropout, enable_gqa=groups > 1 and native_groups
    )


def _repeated(states: Tensor, groups: int) -> Tensor:
    """Return [B, G, T, D] with every head ``groups`` times: [B, G * groups, T, D]."""
    B, G, T, D = states.shape
    return states[:, :, None].expand(B, G, groups, T, D).reshape(B, G * groups, T, D)


def _scores_attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    sinks: Tensor | None,
    offset: int,
    reach: int,
    scale: float,
    softcap: float | None,
    dropout: float,
) -> Tensor:
    """Attention of some queries from plain products; query i sees keys i + offset - reach + 1 to i + offset."""
    B, H, queries, D = query.shape
    G, keys = key.shape[1:3]
    # A group's queries are rows of one product with its key head, which need not be repeated.
    rows = query.reshape(B, G, H // G * queries, D)
    scores = (rows * (scale if softcap is None else scale / softcap)) @ key.transpose(-1, -2)
    if softcap is not None:
        scores = scores.tanh_() * softcap
    place = torch.arange(queries, device=query.device)[:, None] + offset
    seen = torch.arange(keys, device=query.device)[None]
    hidden = (seen > place) | (seen <= place - reach)
    scores.masked_fill_(hidden.repeat(H // G, 1), -torch.inf)
    if sinks is not None:
        sink_scores = sinks.view(1, G, H // G, 1).expand(B, G, H // G, queries).reshape(B, G, -1, 1)
        scores = torch.cat([scores, sink_scores.to(scores.dtype)], dim=-1)
    exact = torch.promote_types(query.dtype, torch.float32)
    weights = torch.softmax(scores, dim=-1, dtype=exact).to(query.dtype)
    if sinks is not None:
        weights = weights[..., :-1]
    if dropout:
        weights = F.dropout(weights, dropout)
    return (weights @ value).view(B, H, queries, -1)
