"""Llama 4's experts, behind the interface that other mixtures have.

transformers' class sends every token through every expert, the tokens of others multiplied by 0, and its experts have no interface.
An expert makes nothing of 0, so each token's own experts give the same. What the router chose weighs what an expert is given, not
what it makes of it.
"""

from __future__ import annotations

from torch import Tensor
from transformers.models.llama4.modeling_llama4 import Llama4TextExperts, Llama4TextMoe

from oomless.models.experts import experts_forward


class RoutedExperts(Llama4TextExperts):  # type: ignore[misc]
    """The stacks of one layer, as transformers' interface describes them."""

    is_transposed = has_gate = weighs_inputs = True
    has_bias = has_post_expert_norm = False
    is_transposed_for_peft = False
    """As peft, which asks their own class, takes the matrices for [out, in]."""

    def _apply_gate(self, gate_up: Tensor) -> Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        result: Tensor = up * self.act_fn(gate)
        return result


class RoutedMoe(Llama4TextMoe):  # type: ignore[misc]
    """One layer's mixture, in which a token goes to its own experts alone."""

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Return what becomes of [B, T, D], as [B x T, D], and the router's logits."""
        hidden_states = hidden_states.reshape(-1, self.hidden_dim)
        scores, logits = self.router(hidden_states)
        weights, chosen = scores.topk(self.top_k, dim=-1)  # of the others all are 0
        return self.shared_expert(hidden_states) + experts_forward(self.experts, hidden_states, chosen, weights), logits


ROUTED = {Llama4TextMoe: RoutedMoe, Llama4TextExperts: RoutedExperts}
