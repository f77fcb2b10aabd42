"""A causal language model's loss: its body, then its head with the cross-entropy, never all logits."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from typing import Any

import torch
from torch import Tensor

from oomless.memory.device import Device
from oomless.models import body
from oomless.ops import loss_passes
from oomless.ops.gradient_buffer import GradientDestination
from oomless.ops.linear_cross_entropy import linear_cross_entropy
from oomless.techniques import vocabulary_parts
from oomless.techniques.trainable import body_trains
from oomless.techniques.trained_rows import rows_of

CHUNK_BYTES = 64 << 20


def causal_lm_loss(
    model: Any,
    input_ids: Tensor,
    labels: Tensor,
    *,
    position_ids: Tensor | None = None,
    document_lengths: tuple[tuple[int, ...], ...] | None = None,
    scale: Tensor | float = 1.0,
    chunk_bytes: int = CHUNK_BYTES,
) -> Tensor:
    """Return ``scale`` times the summed cross-entropy of ``model``: fp32, 0-dim, for a training loop of one's own.

    Args:
        model: a Hugging Face causal language model.
        input_ids: int64 [B, T], on the model's device.
        labels: int64 [B, T], the token that each input should predict (already shifted), -100 for none.
        position_ids: int64 [B, T]; by default 0 to T - 1.
        document_lengths: for each block the lengths of its documents, none of which sees another; needs a model whose
            attention is oomless's (``oomless.use_packed_attention``).
        scale: a number or a 0-dim tensor, usually 1 / (predicted tokens of the optimizer step).
        chunk_bytes: most bytes of logits held at once.
    """
    packed = None if document_lengths is None else {"document_lengths": document_lengths}
    hidden = hidden_states(model, input_ids, position_ids, packed)
    return head_loss(model, hidden, labels, scale, chunk_bytes)


def hidden_states(
    model: Any,
    input_ids: Tensor,
    position_ids: Tensor | None,
    packed: Mapping[str, Any] | None,
) -> Tensor:
    """Return what the body of ``model`` hands to its head, [B, T, D]; without a graph where the body does not train.

    ``packed`` says how documents lie, as ``models.attention.packed`` does.
    """
    with nullcontext() if body_trains(model) else torch.no_grad():
        return body.run(model, input_ids=input_ids, position_ids=position_ids, **(packed or {}))


def head_loss(
    model: Any,
    hidden: Tensor,
    labels: Tensor,
    scale: Tensor | float,
    chunk_bytes: int,
    destination: GradientDestination = "new",
    **how: Any,
) -> Tensor:
    """Return ``scale`` times the summed cross-entropy of the head of ``model`` on ``hidden``; ``how`` is for ``linear_cross_entropy``."""
    head = model.get_output_embeddings()
    softcap, logit_scale = body.logit_transform(model.config)
    rows, row_ids = rows_of(head)
    parts = vocabulary_parts.of(head)
    weight, bias, tokens_at_once = head.weight, head.bias, hidden[..., 0].numel()
    if parts is not None:
        weight, tokens_at_once = parts.weight, parts.tokens_at_once(chunk_bytes)
        bias = None if bias is None else bias[parts.first :][: len(weight)]
    losses = [
        linear_cross_entropy(
            some,
            weight,
            targets,
            bias=bias,
            rows=rows,
            row_ids=row_ids,
            scale=scale,
            softcap=softcap,
            logit_scale=logit_scale,
            chunk_bytes=chunk_bytes,
            destination=destination,
            parts=parts,
            **how,
        )
        for some, targets in zip(
            torch.split(hidden.flatten(0, -2), tokens_at_once),
            torch.split(labels.flatten(), tokens_at_once),
            strict=True,
        )
    ]
    return losses[0] if len(losses) == 1 else torch.stack(losses).sum()


def try_fused(model: Any, device: Device) -> None:
    """Go over logits such as those of ``model`` in the kernels of a fused loss and in their plain form, on ``device``.

    Raises:
        RuntimeError: the results are not the same to rounding. What a compiler raises goes through.
    """
    dtype = model.get_output_embeddings().weight.dtype
    loss_passes.try_fused(dtype, device.torch_device, *body.logit_transform(model.config))
