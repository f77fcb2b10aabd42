"""What of the model trains."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from oomless.config.values import Count, Positive, Share
from oomless.errors import ConfigError

if TYPE_CHECKING:
    from oomless.config import TrainConfig

TiedWeights = Literal["shared", "untied"]
Bias = Literal["none", "lora_only", "all"]
LORA_DEFAULTS: dict[str, Any] = {
    "lora_r": 16,
    "lora_alpha": 32.0,
    "lora_dropout": 0.0,
    "lora_target_modules": "all-linear",
    "use_rslora": False,
    "use_dora": False,
    "bias": "none",
    "merge_lora": True,
}


@dataclass(frozen=True, kw_only=True)
class Trained:
    """What trains."""

    trainable: str = "full"
    """full, lm_head, embed_tokens, lora, or module-name patterns such as `model.layers.3.*`; join several by +."""

    tied_weights: TiedWeights | None = None
    """For a model whose embed_tokens and lm_head are one matrix: train it as one (shared), or part them (untied)."""

    trainable_rows: str | None = None
    """Of the embed_tokens and lm_head that train, train only these rows: token ids and ranges, such as 5,128000-128007, or
    new, those of extend_tokenizer. [default: all]"""

    lora_r: Count | None = None
    """LoRA rank. [default: 16]"""

    lora_alpha: Positive | None = None
    """LoRA scale. [default: 32]"""

    lora_dropout: Share | None = None
    """Dropout before LoRA's first matrix. [default: 0]"""

    lora_target_modules: str | None = None
    """Linear layers that get LoRA: all-linear, name endings joined by commas, or a regular expression that is all of a name.
    [default: all-linear]"""

    use_rslora: bool | None = None
    """Scale LoRA by alpha / sqrt(r) instead of alpha / r. [default: off]"""

    use_dora: bool | None = None
    """Train magnitude and direction apart (DoRA). [default: off]"""

    bias: Bias | None = None
    """Biases of the model that train beside LoRA: none, those of its layers (lora_only), or all. [default: none]"""

    merge_lora: bool | None = None
    """Add LoRA's matrices to the final model's; off: the final model is the adapter alone, as peft loads it. [default: on]"""

    @property
    def trainable_parts(self) -> tuple[str, ...]:
        """The parts of ``trainable``, in the order given."""
        return tuple(part.strip() for part in self.trainable.split("+"))


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself, and fill in what follows from the rest."""
    parts = run.trainable_parts
    if not all(parts):
        raise ConfigError(f"trainable is parts joined by +; got {run.trainable!r}", "trainable")
    if "full" in parts and len(parts) > 1:
        raise ConfigError(
            f"trainable: full already trains everything; got {run.trainable!r}: write full alone", "trainable"
        )
    for name, default in LORA_DEFAULTS.items():
        if "lora" in parts:
            run.fill(name, default)
        elif getattr(run, name) is not None:
            raise ConfigError(
                f"{name} belongs to LoRA, and trainable is {run.trainable}: add --trainable lora, or remove {name}",
                *(name, "trainable"),
            )
