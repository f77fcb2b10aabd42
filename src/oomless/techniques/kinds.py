"""Kinds of modules and parameters: one name for what every layer has."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


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
