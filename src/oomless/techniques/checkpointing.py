"""Compute activations twice instead of keeping them (gradient checkpointing, Chen et al. 2016), layer by layer.

Saves: everything that a checkpointed layer keeps for backward except its input. Costs: one more forward of that layer; with
every layer about a third more time. Where memory allows, fewer layers are checkpointed: the first ones, because backward
comes by last there, when what the others kept is gone. The random state is kept and set back only where the model has
dropout, because reading it from a GPU makes the host wait.
"""

from __future__ import annotations

from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from oomless.errors import ConfigError
from oomless.techniques import block_dropout
from oomless.techniques.kinds import body_of


def apply(model: Any, count: int | None = None) -> list[nn.Module]:
    """Have the first ``count`` of the layers that backward runs through keep only their input; return those layers.

    ``None`` means all of them.

    Raises:
        ConfigError: backward runs through fewer layers, or through none.
    """
    layers = layers_of_backward(model)
    if not layers:
        raise ConfigError(
            "gradient_checkpointing has no effect: backward runs through no layer that can be checkpointed; remove it"
        )
    if count is not None and count > len(layers):
        raise ConfigError(
            f"checkpointed_layers must be at most {len(layers)}, the layers that backward runs through; got {count}"
        )
    chosen = layers[:count]
    apply_to(model, chosen)
    return chosen


def apply_to(model: Any, layers: list[Any]) -> None:
    """Have these ``layers`` of ``model`` keep only their input, until their ``gradient_checkpointing`` is set to False."""
    blocks = block_dropout.of(model)
    masks: dict[str, Any] = {} if blocks is None else {"context_fn": blocks.recomputation}
    function = partial(checkpoint, use_reentrant=False, preserve_rng_state=blocks is not None, **masks)
    for layer in layers:
        layer._gradient_checkpointing_func = function
        layer.gradient_checkpointing = True


def decoder_layers(model: Any) -> list[Any]:
    """Return the layers of the body of ``model``, in forward's order."""
    return [module for module in body_of(model).modules() if isinstance(module, GradientCheckpointingLayer)]


def layers_of_backward(model: Any) -> list[Any]:
    """Return the layers that keep something for backward: those that train or lie above something that does."""
    parameters = list(body_of(model).parameters())
    order = {id(parameter): place for place, parameter in enumerate(parameters)}
    lowest = next((place for place, parameter in enumerate(parameters) if parameter.requires_grad), len(order))
    layers = decoder_layers(model)
    return [layer for layer in layers if max((order[id(p)] for p in layer.parameters()), default=-1) >= lowest]
