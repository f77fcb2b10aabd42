"""The balancing loss of routers (Switch Transformers, Fedus et al. 2021): tokens are to be spread over the experts.

Saves no memory; costs a softmax for each layer. It is the sum over experts of (share of the choices) x (mean probability), taken
over all layers together, times the number of experts and ``router_aux_loss_coef``: transformers' own. transformers collects every
layer's logits and computes it after the forward; under checkpointing these have no graph, so it would train nothing. Here
only the shares are kept, one number for each layer and expert, and the gradient, which needs no more than these and a layer's
own logits, is added where backward comes through the router. The reported loss is the cross-entropy alone.

Each micro-batch is balanced by itself, weighted by its share of the step's predicted tokens.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.techniques.kinds import body_of


class Balance:
    """The balancing loss of ``model``, hooked into its routers: ``coefficient`` times transformers' loss."""

    def __init__(self, model: Any, coefficient: float, device: Device) -> None:
        self.coefficient = coefficient
        self.weight: Tensor | float = 0.0
        """What the loss of the micro-batch that runs counts in all."""

        self.choices = int(model.num_experts_per_tok)
        routers = list(_routers(model))
        self.shares = torch.zeros(len(routers), int(model.num_experts), device=device.torch_device)
        device.label([self.shares], "logits and loss")
        for place, (router, index) in enumerate(routers):
            router.register_forward_hook(_hook(self, place, index))

    def begin(self, weight: Tensor | float) -> None:
        """Begin a micro-batch whose balancing loss counts ``weight`` times the coefficient."""
        self.weight = weight * self.coefficient


def of(model: Any, coefficient: float | None, device: Device) -> Balance | None:
    """Return the balancing loss of ``model``; without ``coefficient`` as its config says, which may be not at all.

    Raises:
        ConfigError: a coefficient is given, and the architecture has no such loss.
    """
    config = model.config.get_text_config()
    has_loss = hasattr(model, "router_aux_loss_coef") and any(_routers(model))
    if coefficient is None and has_loss and getattr(config, "output_router_logits", False):
        coefficient = float(config.router_aux_loss_coef)
    if not coefficient:
        return None
    if not has_loss:
        raise ConfigError(
            f"router_aux_loss_coef has no effect: {type(model).__name__} has no balancing loss of its routers; remove it",
            "router_aux_loss_coef",
        )
    if not any(parameter.requires_grad for parameter in body_of(model).parameters()):
        raise ConfigError(
            "router_aux_loss_coef has no effect: nothing before lm_head trains; remove it, or set it to 0",
            "router_aux_loss_coef",
        )
    return Balance(model, coefficient, device)


def _routers(model: Any) -> Iterator[tuple[nn.Module, int]]:
    """Yield what in ``model`` computes routers' logits, with the place of these in what it returns."""
    for part in model.modules():
        recorder: Any = (getattr(part, "_can_record_outputs", None) or {}).get("router_logits")
        target = getattr(recorder, "target_class", None)
        if target is None:
            continue
        ending = recorder.layer_name or ""
        yield from (
            (m, recorder.index) for name, m in part.named_modules() if type(m) is target and name.endswith(ending)
        )
        return


def _hook(balance: Balance, place: int, index: int) -> Any:
    def attach(module: nn.Module, inputs: Any, output: Any) -> Any:
        outputs = list(output) if isinstance(output, tuple) else [output]
        if not (torch.is_grad_enabled() and outputs[index].requires_grad):
            return None
        floating = [i for i, part in enumerate(outputs) if i != index and part.is_floating_point()]
        carrier = floating[0] if floating else index
        outputs[carrier] = _Balanced.apply(outputs[carrier], outputs[index], balance, place)  # type: ignore[no-untyped-call]
        return tuple(outputs) if isinstance(output, tuple) else outputs[0]

    return attach


class _Balanced(torch.autograd.Function):
    """Passes ``carrier`` on; in backward adds the balancing loss's gradient to that of ``logits``, [N, E]."""

    @staticmethod
    def forward(ctx: Any, carrier: Tensor, logits: Tensor, balance: Balance, place: int) -> Tensor:
        rows = logits.reshape(-1, logits.shape[-1])
        chosen = rows.topk(balance.choices, dim=-1).indices.flatten()
        counts = torch.zeros_like(balance.shares[place])
        counts.scatter_add_(0, chosen, torch.ones_like(chosen, dtype=counts.dtype))
        balance.shares[place].copy_(counts.div_(rows.shape[0]))
        ctx.save_for_backward(logits)
        ctx.balance = balance
        return carrier.view_as(carrier)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, Tensor, None, None]:
        (logits,) = ctx.saved_tensors
        balance: Balance = ctx.balance
        layers, experts = balance.shares.shape
        probabilities = torch.softmax(logits.reshape(-1, experts).float(), -1)
        of_probabilities = balance.shares.mean(0) * (experts / (layers * probabilities.shape[0]))
        of_logits = probabilities * (of_probabilities - (probabilities * of_probabilities).sum(-1, keepdim=True))
        of_logits *= balance.weight
        return gradient, of_logits.to(logits.dtype).view_as(logits), None, None
