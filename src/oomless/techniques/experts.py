"""Experts of a mixture, whose matrices are stacks: one parameter for all experts of a layer."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

STACKS = ("gate_up_proj", "up_proj", "down_proj")


def expert_modules(model: Any) -> Iterator[tuple[str, Any]]:
    """Yield the modules of ``model``, with their names, that hold stacks of experts behind transformers' interface."""
    for name, module in model.named_modules():
        if hasattr(module, "is_transposed") and hasattr(module, "has_gate") and hasattr(module, "num_experts"):
            yield name, module
