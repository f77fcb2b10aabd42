"""The attention of every model that oomless builds: transformers' interface, served by ``ops.attention``.

transformers lets an attention function be registered under a name and chosen for one model by
``attn_implementation``. A registered function without a mask function of the same name is given no mask at all, so no
T x T mask is ever built; the documents of a packed block arrive as the keyword ``document_lengths``, which the models
hand through to their attention.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from oomless.memory.allocator import SMALLEST_BLOCK
from oomless.memory.allocator_growth import round_up
from oomless.models.spec import largest
from oomless.ops.attention import choose_kernel, packed_attention
from oomless.techniques import block_dropout

NAME = "oomless"


def weigh(config: Any, dtype: torch.dtype, device: torch.device, documents: Sequence[int]) -> int:
    """Return what a layer of ``config``'s model keeps of a block of ``documents``, whose tensors the allocator rounds up.

    It says which blocks are heavier than others, not what attention asks for in all.
    """
    heads = _number(config, "num_attention_heads", 1)
    groups = _number(config, "num_key_value_heads", heads)
    width = _number(config, "qk_head_dim", _number(config, "head_dim", _number(config, "hidden_size", heads) // heads))
    value_width = _number(config, "v_head_dim", width)
    kernel, native_groups = choose_kernel(device, dtype, width, value_width)
    of_a_token = [heads * value_width * dtype.itemsize]
    if groups != heads and not native_groups:
        of_a_token += [heads * width * dtype.itemsize, *of_a_token]  # keys and values, repeated
    tile = 32 if kernel == "efficient" else 1  # of queries, to whose sums of exponentials it rounds up
    return sum(
        round_up(4 * heads * round_up(length, tile), SMALLEST_BLOCK)
        + sum(round_up(size * length, SMALLEST_BLOCK) for size in of_a_token)
        for length in documents
    )


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


def use_packed_attention(model: Any) -> None:
    """Have ``model``, any Hugging Face model, attend with this function from now on."""
    register()
    model.set_attn_implementation(NAME)


def register() -> None:
    """Make ``attn_implementation="oomless"`` known to transformers."""
    AttentionInterface.register(NAME, attention_forward)
