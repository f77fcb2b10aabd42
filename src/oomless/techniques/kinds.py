"""Kinds of modules and parameters: one name for what every layer has."""

from __future__ import annotations

import inspect
from functools import cache
from typing import Any


def kind_of(name: str) -> str:
    """Return ``name`` with numbers as stars: ``layers.*.mlp.up_proj`` for every layer's."""
    return ".".join("*" if piece.isdigit() else piece for piece in name.split("."))


def owner_using_weight(model: Any, name: str) -> str | None:
    """Return the class that holds the layer ``name`` and also uses its weight by itself, as fused kernels do; else ``None``.

    What stands in the place of such a layer (an adapter, a weight in fewer bits) would not be asked.
    """
    owner, _, own_name = name.rpartition(".")
    kind: Any = type(model.get_submodule(owner))
    return kind.__name__ if f"self.{own_name}.weight" in _source(kind) else None


@cache
def _source(kind: Any) -> str:
    """Return the source of a class, which takes longer to find than a layer takes to rehearse; of one without a file, nothing."""
    try:
        return inspect.getsource(kind)
    except (OSError, TypeError):
        return ""
