"""Linear layers that a class ties to each other are one layer, at several places.

Zamba runs one transformer block at several depths: its class makes the block anew at each of them and ties the matrices, which files
hold once. What stands in the place of such a layer (a matrix in fewer bits, one on the host, an adapter) is likewise one at all
of its places; two adapters could not be merged into one matrix.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D


def join(model: Any) -> None:
    """Have linear layers of ``model`` whose matrix is the same be the same layer."""
    first: dict[tuple[int, int], nn.Module] = {}
    for owner in model.modules():
        for name, layer in owner.named_children():
            if isinstance(layer, (nn.Linear, Conv1D)):
                setattr(owner, name, first.setdefault((id(layer.weight), id(layer.bias)), layer))


def replace(model: Any, made: Mapping[nn.Module, nn.Module]) -> None:
    """Put what was ``made`` of layers of ``model`` in their places, at each of them."""
    for owner in list(model.modules()):
        for name, layer in list(owner._modules.items()):
            if layer in made and made[layer] is not owner:
                setattr(owner, name, made[layer])
