"""Text that the model of a run writes on the way, from the run's own prompts.

A token is a pass of the step's own forward over a whole row (``TrainingStep.write``), so that it works wherever a step does: with
weights that are streamed, packed, or cut among GPUs. How long a row is is known without a tokenizer, since a token is a byte at
least: so a plan knows its memory.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.training.life import Life

SPECIAL = 4
"""So many tokens that stand for no byte may begin a text."""


def write_samples(life: Life) -> list[dict[str, str]]:
    """Return what the model writes after each prompt; it may raise ``Abandoned`` between two."""
    step, new = life.assembly.step, life.config.sample_tokens or 0
    samples = []
    for prompt, tokens in life.interrupted.until_set(
        zip(life.config.sample_prompts or (), life.keeper.prompts(life), strict=True)
    ):
        with life.device.host():
            row = torch.zeros(_room(life.config, prompt), dtype=torch.long)
            row[: len(tokens)] = torch.tensor(tokens)
        written = life.guard.retried(step.write, row, len(tokens), new)
        samples.append({"prompt": prompt, "text": life.keeper.text(tokens, written)})
    return samples


def tokens_of(config: TrainConfig, tokenizer: Any) -> list[list[int]]:
    """Return the tokens of each prompt of ``config``, as a text begins that goes on.

    Raises:
        ConfigError: there is no room for one and for what follows.
    """
    found = []
    for prompt in config.sample_prompts or ():
        tokens: list[int] = tokenizer(prompt)["input_ids"]
        if tokens and tokens[-1] == tokenizer.eos_token_id:
            tokens.pop()
        room = _room(config, prompt) - (config.sample_tokens or 0)
        if not 0 < len(tokens) <= room:
            raise ConfigError(
                f"a text of sample_prompts has 1 to {room} tokens here, beside the {config.sample_tokens} of sample_tokens; "
                f"{prompt[:40]!r} has {len(tokens)}: shorten it, or lower sample_tokens"
            )
        found.append(tokens)
    return found


def text_after(tokenizer: Any, tokens: Sequence[int], new: Sequence[int]) -> str:
    """Return the text of the ``new`` tokens after ``tokens``, as far as the end of its document."""
    if tokenizer.eos_token_id in new:
        new = new[: new.index(tokenizer.eos_token_id)]
    before, both, alone = tokenizer.batch_decode([[*tokens], [*tokens, *new], [*new]])
    return str(
        both[len(before) :] if both.startswith(before) else alone
    )  # which lacks a space at its beginning, as some decode


def _room(config: TrainConfig, prompt: str) -> int:
    """Return how many tokens the row of ``prompt`` has."""
    return min(config.max_seq_length, SPECIAL + len(prompt.encode()) + (config.sample_tokens or 0))
