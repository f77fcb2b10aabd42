"""What a step does with the gradients, and what the loss is."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oomless.config.values import NotNegative, Positive, Range, Share
from oomless.errors import ConfigError, nearest

if TYPE_CHECKING:
    from oomless.config import TrainConfig

Scheduler = Literal["cosine", "linear", "constant", "wsd"]
_ADAM = {"adam_beta1": 0.9, "adam_beta2": 0.999, "adam_epsilon": 1e-8}
OPTIMIZER_DEFAULTS: dict[str, dict[str, Any]] = {
    "adamw": _ADAM,
    "adamw_8bit": _ADAM,
    "adafactor": {},
    "sgd": {"momentum": 0.9},
    "apollo": _ADAM,
    "apollo_mini": _ADAM,
    "galore": _ADAM,
    "muon": {**_ADAM, "momentum": 0.95},
}


@dataclass(frozen=True, kw_only=True)
class Optimizer:
    """Optimizer."""

    optimizer: str = "adamw"
    """adamw, adamw_8bit, adafactor, sgd, apollo, apollo_mini, galore or muon (experimental); docs/optimizers.md compares
    them."""

    learning_rate: Positive | None = None
    """Peak learning rate. [default: by what trains, the optimizer and the model's width]"""

    embedding_learning_rate: Positive | None = None
    """Peak learning rate of embed_tokens and lm_head. [default: learning_rate, a fifth of it beside LoRA]"""

    lr_scheduler_type: Scheduler = "cosine"
    """How the rate falls after warm-up; wsd holds it and falls in the last fifth."""

    warmup_ratio: Share | None = None
    """Share of the steps in which the rate rises. [default: 0.03, in steps 10 to 200, at most a tenth of the run]"""

    weight_decay: NotNegative | None = None
    """Decoupled weight decay of matrices; norms and biases get none. [default: 0.1 where whole layers train, else 0]"""

    max_grad_norm: Annotated[float, Range(least=0, or_infinite=True)] | None = None
    """Global gradient norm above which gradients are scaled down; 0 turns it off. [default: 1, or 0 with
    optimizer_in_backward]"""

    label_smoothing_factor: Share = 0.0
    """Share of each target spread evenly over the vocabulary in training; evaluation is without."""

    z_loss: NotNegative = 0.0
    """Weight of the squared logarithm of the softmax's denominator, added to the training loss: keeps logits small."""

    router_aux_loss_coef: NotNegative | None = None
    """Weight of the loss that balances a mixture's experts, added to the training loss. [default: the model's own where its
    config says output_router_logits, else 0]"""

    adam_beta1: Share | None = None
    """First decay rate of Adam and its kin. [default: 0.9]"""

    adam_beta2: Share | None = None
    """Second decay rate of Adam and its kin. [default: 0.999]"""

    adam_epsilon: Positive | None = None
    """Epsilon of Adam and its kin. [default: 1e-8]"""

    momentum: Share | None = None
    """Momentum of sgd and muon. [default: 0.9, muon 0.95]"""


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself, and fill in what follows from the rest."""
    own = OPTIMIZER_DEFAULTS.get(run.optimizer)
    if own is None:
        known = ", ".join(OPTIMIZER_DEFAULTS)
        raise ConfigError(
            f"optimizer must be one of {known}; got {run.optimizer!r}." + nearest(run.optimizer, OPTIMIZER_DEFAULTS),
            "optimizer",
        )
    for name in sorted({name for defaults in OPTIMIZER_DEFAULTS.values() for name in defaults} - set(own)):
        if getattr(run, name) is not None:
            users = [optimizer for optimizer, defaults in OPTIMIZER_DEFAULTS.items() if name in defaults]
            raise ConfigError(
                f"{name} belongs to the optimizers {', '.join(users)}, and this run's is {run.optimizer}: choose one of "
                f"them, or remove {name}",
                *(name, "optimizer"),
            )
    for name, default in own.items():
        run.fill(name, default)
    run.fill("max_grad_norm", 0.0 if run.optimizer_in_backward else 1.0)
    if run.max_grad_norm and run.optimizer_in_backward:
        raise ConfigError(
            "optimizer_in_backward cannot clip by the global norm, which is known only after the first weights have been "
            f"updated; got max_grad_norm {run.max_grad_norm}: leave it out, or choose adafactor, which clips each update",
            *("optimizer_in_backward", "max_grad_norm"),
        )
