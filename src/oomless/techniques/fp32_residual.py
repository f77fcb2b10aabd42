"""Sums in fp32 around matrix products in fp16, for models whose hidden states outgrow fp16 (Gemma).

What flows from layer to layer (the embedding's rows and the sum of all layers' outputs) is kept in fp32; each norm reads
it in fp32 and hands fp16 to the matrix products, whose weights stay fp16. fp16 ends at 65,504; Gemma's hidden states,
scaled by the root of their width, pass that.

Saves: the fp32 copies of all weights that autocast makes, or a larger GPU that knows bf16. Costs: 4 bytes instead of 2 for
each number of the stream, which is what checkpointing keeps. By default on for Gemma in fp16 and off elsewhere.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ConfigError


def wanted(model: Any, choice: bool | None) -> bool:
    """Return ``choice``, or where there is none whether ``model`` is one that overflows fp16.

    Raises:
        ConfigError: it is asked for where it has no effect, or the model's norms cannot read fp32.
    """
    if choice is None:
        kind: str = model.config.get_text_config().model_type
        return model.dtype == torch.float16 and kind.startswith("gemma")
    if choice and model.dtype == torch.float32:
        raise ConfigError("fp32_residual has no effect on fp32 weights: remove it, or choose dtype fp16")
    if choice and not _norms(model):
        raise ConfigError(f"fp32_residual is for models with RMSNorm; {type(model).__name__} has none: remove it")
    return choice


def apply(model: Any) -> None:
    """Have the hidden states of ``model`` in fp32 between its layers."""
    dtype = model.dtype
    model.get_input_embeddings().register_forward_hook(lambda module, given, output: output.float())
    for module in _norms(model) + [m for m in model.modules() if type(m).__name__.endswith("RotaryEmbedding")]:
        module.register_forward_hook(lambda module, given, output: _to(output, dtype))


def _norms(model: Any) -> list[nn.Module]:
    return [module for module in model.modules() if type(module).__name__.endswith("RMSNorm")]


def _to(output: Tensor | tuple[Tensor, ...], dtype: torch.dtype) -> Tensor | tuple[Tensor, ...]:
    return output.to(dtype) if isinstance(output, Tensor) else tuple(part.to(dtype) for part in output)
