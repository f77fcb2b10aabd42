"""LongCat-Flash's experts, behind the interface that other mixtures have.

Some of the experts that its router chooses from hand on what they are given. They have no matrices, so what they make is added here.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.longcat_flash.modeling_longcat_flash import LongcatFlashExperts

from oomless.models.experts import experts_forward


class RoutedExperts(LongcatFlashExperts):  # type: ignore[misc]
    """The stacks of one layer, as transformers' interface describes them."""

    has_gate = True
    is_transposed = has_bias = has_post_expert_norm = False

    @property
    def num_experts(self) -> int:
        """How many have matrices."""
        return int(self.num_routed_experts)

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = self.act_fn(gate) * up
        return result

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """As ``experts_forward``."""
        made = experts_forward(self, hidden_states, top_k_index, top_k_weights)
        handed_on = (top_k_weights * (top_k_index >= self.num_experts)).sum(-1, keepdim=True)
        return made + (hidden_states * handed_on).to(made.dtype)


ROUTED = {LongcatFlashExperts: RoutedExperts}
