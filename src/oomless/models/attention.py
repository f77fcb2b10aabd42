"""The attention of every model that oomless builds: transformers' interface, served by ``ops.attention``.

transformers lets an attention function be registered under a name and chosen for one model by
``attn_implementation``. A registered function without a mask function of the same name is given no mask at all, so no
T x T mask is ever built; the documents of a packed block arrive as the keyword ``document_lengths``, which the models
hand through to their attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from oomless.memory.allocator import SMALLEST_BLOCK
from oomless.memory.allocator_growth import round_up
from oomless.memory.device import Device
from oomless.models.spec import largest
from oomless.ops import documents
from oomless.ops.attention import choose_kernel, knows_documents, packed_attention
from oomless.techniques import block_dropout

NAME = "oomless"
_ONE_LAUNCH = "_oomless_documents_in_one_launch"


def weigh(model: Any, dtype: torch.dtype, device: torch.device, batch: Sequence[Sequence[int]]) -> int:
    """Return what a layer of ``model`` keeps beside its output of a batch of documents, whose tensors the allocator rounds up.

    It says which batches are heavier than others, not what attention asks for in all.
    """
    heads, groups, width, value_width = _heads(model.config)
    kernel, native_groups = choose_kernel(device, dtype, width, value_width)
    lengths = tuple(chain.from_iterable(batch))
    windowed = 0 < _number(model.config, "sliding_window", 0) < max(lengths)
    if _in_one_launch(model, device) and documents.takes(kernel, width, value_width, windowed):
        launches = documents.launches(lengths, kernel, 4 * heads * width)
        return sum(
            round_up(4 * heads * documents.kept_sums(lengths[part], kernel), SMALLEST_BLOCK) for part in launches
        )
    of_a_token = [heads * value_width * dtype.itemsize]
    if groups != heads and not native_groups:
        of_a_token += [heads * width * dtype.itemsize, *of_a_token]  # keys and values, repeated
    tile = 32 if kernel == "efficient" else 1  # of queries, to whose sums of exponentials it rounds up
    return sum(
        round_up(4 * heads * round_up(length, tile), SMALLEST_BLOCK)
        + sum(round_up(size * length, SMALLEST_BLOCK) for size in of_a_token)
        for length in lengths
    )


def _heads(config: Any) -> tuple[int, int, int, int]:
    """Return how many heads there are, and key-value heads, and how wide keys and values are."""
    heads = _number(config, "num_attention_heads", 1)
    width = _number(config, "qk_head_dim", _number(config, "head_dim", _number(config, "hidden_size", heads) // heads))
    return heads, _number(config, "num_key_value_heads", heads), width, _number(config, "v_head_dim", width)


def _number(config: Any, name: str, otherwise: int) -> int:
    value = largest(config.get_text_config(), name)
    return value if value is not None and value > 0 else otherwise


def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    *,
    document_lengths: tuple[tuple[int, ...], ...] | None = None,
    document_starts: Tensor | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    **unused: Any,
) -> tuple[Tensor, None]:
    """Attend causally inside each document; shapes as in ``packed_attention``.

    Raises:
        ValueError: a mask is given: this attention knows causal documents only.
    """
    if attention_mask is not None:
        raise ValueError("packed attention takes document_lengths, not a mask")
    settings: dict[str, Any] = {
        "document_starts": document_starts,
        "scale": query.shape[-1] ** -0.5 if scaling is None else scaling,
        "sliding_window": sliding_window,
        "softcap": softcap,
        "sinks": s_aux,
        "dropout": dropout,
    }
    blocks = block_dropout.of(module)
    if not dropout or blocks is None:
        # Some classes take a view of what comes back; CUDA's kernels lay it out so anyway.
        return packed_attention(query, key, value, document_lengths=document_lengths, **settings).contiguous(), None
    count = query.shape[0]
    outputs = []
    for block, (mask, *states) in enumerate(
        zip(blocks.each_block(query.device, count), *(torch.split(t, 1) for t in (query, key, value)), strict=True)
    ):
        lengths = None if document_lengths is None else document_lengths[block : block + 1]
        with mask:
            outputs.append(packed_attention(*states, document_lengths=lengths, **settings))
    output = torch.cat(outputs)
    return output, None


def attend_in_one_launch(model: Any, one_launch: bool) -> None:
    """Have ``model`` attend to all documents of its blocks in one launch where its kernel can, or to one after the other."""
    setattr(model, _ONE_LAUNCH, one_launch)


def try_one_launch(model: Any, device: torch.device) -> None:
    """Try the launch for all documents on ``device``, with heads as ``model`` has them.

    Raises:
        RuntimeError: it does not do there what it should.
    """
    heads, groups, width, value_width = _heads(model.config)
    kernel, _ = choose_kernel(device, model.dtype, width, value_width)
    for windowed in (False, True):
        if documents.takes(kernel, width, value_width, windowed):
            fault = documents.fault(device, model.dtype, kernel, width, value_width, heads // groups, windowed)
            if fault is not None:
                raise RuntimeError(fault)


def _in_one_launch(model: Any, device: torch.device) -> bool:
    return getattr(model, _ONE_LAUNCH, False) and knows_documents(device)


def packed(model: Any, lengths: tuple[tuple[int, ...], ...], device: Device) -> dict[str, Any]:
    """Return what ``attention_forward`` is told of blocks whose documents have these ``lengths``: by the names of its arguments."""
    told: dict[str, Any] = {"document_lengths": lengths}
    several = any(len(block) > 1 for block in lengths)
    if (several or _number(model.config, "sliding_window", 0)) and _in_one_launch(model, device.torch_device):
        with device.host():
            starts = documents.starts_of(tuple(chain.from_iterable(lengths)))
        told["document_starts"] = device.put(starts)
    return told


def use_packed_attention(model: Any) -> None:
    """Have ``model``, any Hugging Face model, attend with this function from now on."""
    register()
    model.set_attn_implementation(NAME)


def register() -> None:
    """Make ``attn_implementation="oomless"`` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
