"""How many blocks make a step, and how many steps the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from oomless.config.values import Count, Positive
from oomless.errors import ConfigError

if TYPE_CHECKING:
    from oomless.config import TrainConfig

LENGTHS = ("max_steps", "num_train_epochs", "max_tokens")
OF_A_STEP = ("gradient_accumulation_steps", "tokens_per_step", "per_device_train_batch_size", "max_seq_length")
"""What makes a step; the first follows from the others."""


@dataclass(frozen=True, kw_only=True)
class Batch:
    """Batch and length."""

    per_device_train_batch_size: Count = 1
    """Blocks in one forward and backward pass, of each GPU."""

    gradient_accumulation_steps: Count = 1
    """Passes in one optimizer step, of each GPU; the loss is normalised by the tokens of the whole step."""

    tokens_per_step: Count | None = None
    """Tokens in one step of all GPUs, a multiple of max_seq_length; gradient_accumulation_steps follows from it."""

    per_device_eval_batch_size: Count | None = None
    """Blocks in one evaluation pass. [default: per_device_train_batch_size]"""

    max_steps: Count | None = None
    """Length of the run in optimizer steps."""

    num_train_epochs: Positive | None = None
    """Length of the run in passes over the data. [default: 1, where neither steps nor tokens are given]"""

    max_tokens: Count | None = None
    """Length of the run as a budget of training tokens."""

    @property
    def blocks_per_step(self) -> int:
        """Blocks in one optimizer step."""
        return self.per_device_train_batch_size * self.gradient_accumulation_steps


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself, and fill in what follows from the rest."""
    lengths = [name for name in LENGTHS if getattr(run, name) is not None]
    if len(lengths) > 1:
        raise ConfigError(f"the run's length is given once; got {' and '.join(lengths)}: keep one", *lengths)
    if not lengths:
        run.fill("num_train_epochs", 1.0)
    run.fill("per_device_eval_batch_size", run.per_device_train_batch_size)
    if run.tokens_per_step is not None:
        run.put("gradient_accumulation_steps", _passes(run, run.tokens_per_step))


def _passes(run: TrainConfig, tokens: int) -> int:
    pass_tokens = run.per_device_train_batch_size * run.max_seq_length
    if tokens % pass_tokens:
        raise ConfigError(
            "tokens_per_step must be a multiple of per_device_train_batch_size x max_seq_length, "
            f"{run.per_device_train_batch_size} x {run.max_seq_length}; got {tokens}: use "
            f"{max(1, round(tokens / pass_tokens)) * pass_tokens}",
            *OF_A_STEP[1:],
        )
    if run.gradient_accumulation_steps not in (1, tokens // pass_tokens):
        raise ConfigError(
            f"gradient_accumulation_steps follows from tokens_per_step: {tokens} are {tokens // pass_tokens} passes of "
            f"{pass_tokens}; got {run.gradient_accumulation_steps}: remove one of the two",
            *OF_A_STEP,
        )
    return tokens // pass_tokens
