"""Kinds of modules and parameters: one name for what every layer has."""

from __future__ import annotations

import copy
import inspect
from functools import cache
from typing import Any

import torch
from torch import nn
from torch.nn import functional
from torch.utils._python_dispatch import _disable_current_modes
from transformers.pytorch_utils import Conv1D


def kind_of(name: str) -> str:
    """Return ``name`` with numbers as stars: ``layers.*.mlp.up_proj`` for every layer's."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def layer_of(name: str) -> str:
    """Return the name of the layer that the module or parameter ``name`` is in; of what is in none, nothing."""
    pieces = name.split(".")
    number = next((place for place, piece in enumerate(pieces[:-1]) if piece.isdigit()), None)
    return "" if number is None else ".".join(pieces[: number + 1])


def kind_in(model: Any, name: str) -> str:
    """Return the kind of a parameter ``name`` of ``model``, among layers of which some have parts that others have not."""
    layer = layer_of(name)
    if not layer:
        return name
    children = ", ".join(child for child, _ in model.get_submodule(layer).named_children())
    return f"{kind_of(name)} beside {children}"


def body_of(model: Any) -> Any:
    """Return what ``lm_head`` is applied to the output of; Llama 4's class takes itself for it."""
    return model.base_model if model.base_model is not model else getattr(model, "model", model)


def is_linear(module: Any) -> bool:
    """Return whether ``module`` is a linear layer and nothing more: an nn.Linear, a Conv1D, or of a class that gives what nn.Linear gives."""
    if type(module) in (nn.Linear, Conv1D):
        return True
    if not isinstance(module, nn.Linear) or module.weight is None or "forward" in vars(module):
        return False
    with _disable_current_modes(), torch.no_grad():
        twin = copy.copy(module)
        weight, x = torch.arange(15.0).sin().view(5, 3), torch.arange(12.0).cos().view(2, 2, 3)
        bias = None if module.bias is None else torch.arange(5.0)
        twin._parameters = {"weight": nn.Parameter(weight), "bias": None if bias is None else nn.Parameter(bias)}
        twin.in_features, twin.out_features = 3, 5
        try:
            given = type(module).forward(twin, x)
        except Exception:  # whatever a forward that takes other inputs raises
            return False
        wanted = functional.linear(x, weight, bias)
        return isinstance(given, torch.Tensor) and given.shape == wanted.shape and torch.allclose(given, wanted)


def owner_using_weight(model: Any, name: str) -> str | None:
    """Return the class above the layer ``name`` that also uses its weight by itself, as fused kernels do; else ``None``.

    What stands in the place of such a layer (an adapter, a weight in fewer bits) would not be asked.
    """
    pieces = name.split(".")
    for place in range(len(pieces) - 1, -1, -1):
        owner: Any = type(model.get_submodule(".".join(pieces[:place])))
        direct = place == len(pieces) - 1
        used = f"self.{pieces[-1]}.weight" if direct else f".{pieces[-2]}.{pieces[-1]}.weight"
        if used in _source(owner):
            return str(owner.__name__)
    return None


@cache
def _source(kind: Any) -> str:
    """Return the source of a class, which takes longer to find than a layer takes to rehearse; of one without a file, nothing."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
