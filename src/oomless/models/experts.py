"""The experts of every mixture that oomless builds: transformers' interface, served by ``ops.grouped_linear``.

transformers lets a function be registered under a name and chosen for one model by ``experts_implementation``; it is given the
module that holds the stacks of the experts' matrices, what the router chose and the weights of its choices. All architectures
whose experts go through that interface are served, whatever their gate, biases and layout; so are those of classes that have not put
theirs there (``_OWN``).
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from oomless.memory.device import Device
from oomless.ops.grouped_linear import Groups, combine, dispatch, even_bounds, grouped_linear
from oomless.techniques import expert_adapters, routes
from oomless.techniques.experts import expert_modules

NAME = "oomless"
_OWN = {"llama4": "llama4_experts", "jetmoe": "jetmoe_experts", "longcat_flash": "longcat_experts"}
"""Architectures, and which file of this room has their experts; imported where it is used, as it imports the architecture."""


def register() -> None:
    """Make ``experts_implementation="oomless"`` known to transformers."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)


def put_behind_interface(model: Any, *, there: bool = True) -> None:
    """Put experts of ``model`` behind transformers' interface that their class has not put there, or back."""
    files = {base.__module__ for kind in set(map(type, model.modules())) for base in kind.__mro__}
    for architecture, ours in _OWN.items():
        if f"transformers.models.{architecture}.modeling_{architecture}" in files:
            routed = import_module(f"oomless.models.{ours}").ROUTED
            kinds = routed if there else {kind: own for own, kind in routed.items()}
            for module in model.modules():
                module.__class__ = kinds.get(type(module), type(module))


def place(model: Any, device: Device) -> None:
    """Tell the experts of ``model``, all behind one interface then, which device they are on."""
    put_behind_interface(model)
    for _, module in expert_modules(model):
        module.device = device
        routes.begin(module)


def experts_forward(module: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """Return for each token the weighted sum of what its experts make of it: [N, D].

    Args:
        module: holds ``gate_up_proj`` or ``up_proj``, and ``down_proj``.
        hidden_states: [N, D].
        top_k_index: int64 [N, K], the experts of each token; the number of experts and more stands for none.
        top_k_weights: [N, K]; of a module that ``weighs_inputs`` they multiply what its experts are given.
    """
    choices = top_k_index.shape[-1]
    sorted_experts, order = top_k_index.reshape(-1).sort(stable=True)
    places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
    places = places.view(-1, choices)
    groups = groups_of(module, sorted_experts)
    rows = dispatch(hidden_states, places, order // choices)
    if getattr(module, "weighs_inputs", False):
        rows = rows * top_k_weights.reshape(-1)[order, None]
        top_k_weights = torch.ones_like(top_k_weights)
    if module.has_gate:
        rows = module._apply_gate(project(module, "gate_up_proj", rows, groups, places))
    else:
        rows = module.act_fn(project(module, "up_proj", rows, groups, places))
    rows = project(module, "down_proj", rows, groups, places)
    if module.has_post_expert_norm:
        rows = module.post_expert_norm(rows)
    return combine(rows, top_k_weights, places).to(hidden_states.dtype)


def groups_of(module: Any, sorted_experts: Tensor) -> Groups:
    """Return which of the rows that go to ``sorted_experts``, int64 [S], are whose, which the host knows then; they are counted."""
    device: Device = module.device
    bounds = torch.searchsorted(sorted_experts, torch.arange(module.num_experts + 1, device=sorted_experts.device))
    groups = Groups(device.numbers(bounds, even_bounds(sorted_experts.numel(), module.num_experts)))
    routes.count(module, groups.bounds)
    return groups


def project(module: Any, name: str, rows: Tensor, groups: Groups, places: Tensor) -> Tensor:
    """Return what the stack ``name`` of ``module`` and its adapter make of ``rows``: [S, out].

    ``places``, int64 [N, K], says which rows are each token's.
    """
    bias = getattr(module, f"{name}_bias") if module.has_bias else None
    projected = grouped_linear(rows, getattr(module, name), groups, bias=bias, transposed=module.is_transposed)
    adapter = expert_adapters.of(module, name)
    return projected if adapter is None else adapter.add(rows, projected, groups, places)
