"""Make norms and gated products again in backward, keep everything else.

Saves: of a layer without gradient checkpointing about half of what it keeps, namely the fp32 copies and outputs of its norms
and the activation and product inside its MLP; what backward holds at once of a layer with it. Costs: three elementwise
passes over a layer, next to no time beside its matrix products; gradient checkpointing makes those again as well.
"""

from __future__ import annotations

import weakref
from contextlib import nullcontext
from typing import Any

import torch
from torch import nn

from oomless.errors import ConfigError
from oomless.ops.recompute import recomputing
from oomless.techniques import layer_parts
from oomless.techniques.checkpointing import layers_of_backward
from oomless.techniques.kinds import body_of


def applies(model: Any) -> bool:
    """Return whether ``apply`` finds anything in ``model``."""
    return bool(layers_of_backward(model)) and any(map(layer_parts.is_known, body_of(model).modules()))


def apply(model: Any, *, norm_dtype: torch.dtype | None = None) -> None:
    """Replace the norms and gated MLPs of the body of ``model``; call after its layers were chosen for checkpointing.

    ``norm_dtype`` is what norms give, where that is not what their own forward does (``fp32_residual``).

    Raises:
        ConfigError: backward runs through no layer, or no norm and no MLP was recognised.
    """
    layers = layers_of_backward(model)
    if not (layer_parts.replace(model, norm_dtype=norm_dtype) and layers):
        reason = "no norm or MLP of this model is one that it knows" if layers else "backward runs through no layer"
        raise ConfigError(f"cheap_recompute has no effect: {reason}; remove it")
    for layer in layers:
        if not layer.gradient_checkpointing:
            layer.forward = _Layer(layer)


class _Layer:
    """The forward of one layer that is not checkpointed, or not always: recovery may do so (``training.ladder``)."""

    def __init__(self, layer: nn.Module) -> None:
        self.layer = weakref.ref(layer)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        layer: Any = self.layer()
        with nullcontext() if layer.gradient_checkpointing else recomputing():
            return type(layer).forward(layer, *args, **kwargs)
