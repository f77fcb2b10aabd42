"""Compute activations twice instead of keeping them (gradient checkpointing, Chen et al. 2016).

Saves: everything that a layer keeps for backward except its input. Costs: one more forward of every layer, about a
third more time. The random state is kept and set back only where the model has dropout, because reading it from a GPU
makes the host wait.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer


def apply(model: Any) -> None:
    """Have every decoder layer of ``model`` keep only its input."""
    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=has_dropout(model))
    for module in model.modules():
        if isinstance(module, GradientCheckpointingLayer):
            module._gradient_checkpointing_func = function
            module.gradient_checkpointing = True


def has_dropout(model: Any) -> bool:
    """Return whether any dropout of ``model`` is switched on."""
    active = any(isinstance(module, nn.Dropout) and module.p > 0 for module in model.modules())
    return active or bool(getattr(model.config.get_text_config(), "attention_dropout", 0.0))
