"""JetMoE's experts, of its MLPs and of its attention's projections: each stack is a mixture's own module.

transformers' router counts the rows of each expert where a plan cannot know them, and cuts tensors by that; its stacks have no
interface. Here rows are cut as those of other mixtures are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional
from transformers.models.jetmoe.modeling_jetmoe import JetMoeParallelExperts, JetMoeTopKGating

from oomless.models.experts import groups_of, project
from oomless.ops.grouped_linear import Groups


class _Rows:
    """Which rows go to which expert, asked of the device once for both stacks of a mixture."""

    def __init__(self, sorted_experts: Tensor, places: Tensor) -> None:
        self.sorted_experts, self.places = sorted_experts, places
        self.groups: Groups | None = None


class RoutedGating(JetMoeTopKGating):  # type: ignore[misc]
    """The router."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor, Tensor, _Rows, Tensor]:
        """Return of [N, D] how rows are sorted by expert, whose tokens' they are, their weights, where they go, and the logits."""
        logits = self.layer(hidden_states).float()
        chosen, experts = logits.topk(self.top_k, dim=1)
        weights = functional.softmax(chosen, dim=1).type_as(hidden_states)
        sorted_experts, order = experts.flatten().sort(stable=True)
        places = torch.empty_like(order).scatter_(0, order, torch.arange(order.numel(), device=order.device))
        rows = _Rows(sorted_experts, places.view(-1, self.top_k))
        return order, order // self.top_k, weights.flatten()[order], rows, logits


class RoutedStack(JetMoeParallelExperts):  # type: ignore[misc]
    """One stack, as transformers' interface describes it."""

    is_transposed = has_gate = has_bias = False

    def forward(self, inputs: Tensor, rows: Any) -> Tensor:
        """Return what each expert makes of its rows of [S, in]: [S, out]."""
        if rows.groups is None:
            rows.groups = groups_of(self, rows.sorted_experts)
        return project(self, "weight", inputs, rows.groups, rows.places)


ROUTED = {JetMoeTopKGating: RoutedGating, JetMoeParallelExperts: RoutedStack}
