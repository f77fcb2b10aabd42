"""Two models side by side: what was found, and where a run keeps it; without torch, for those who only show it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oomless.training.run_files import COMPARISON


@dataclass(frozen=True, kw_only=True, slots=True)
class Side:
    """What one of the two models does."""

    name: str
    losses: Mapping[str, float]
    """By source of text: the mean cross-entropy."""

    tokens: Mapping[str, int]
    """By source: how many are predicted."""

    texts: Sequence[str]
    """How it goes on from each prompt."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Comparison:
    """Two models side by side."""

    base: Side
    trained: Side
    prompts: Sequence[str]
    numbers: str
    """What the numbers of both are."""

    def to_dict(self) -> dict[str, Any]:
        """Return all of this, for a program."""
        return {
            "base": self.base.name,
            "trained": self.trained.name,
            "numbers": self.numbers,
            "held_out": [
                {"source": name, "tokens": count, "base": self.base.losses[name], "trained": self.trained.losses[name]}
                for name, count in self.base.tokens.items()
            ],
            "texts": [
                {"prompt": prompt, "base": base, "trained": trained}
                for prompt, base, trained in zip(self.prompts, self.base.texts, self.trained.texts, strict=True)
            ],
        }


def read(folder: Path) -> Comparison | None:
    """Return the last comparison of the run in ``folder``; ``None`` where there is none that can be read."""
    try:
        kept = json.loads((folder / COMPARISON).read_text(encoding="utf-8"))
        base, trained = (_side(kept[role]) for role in ("base", "trained"))
        prompts, numbers = [str(prompt) for prompt in kept["prompts"]], str(kept["numbers"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, RecursionError):
        return None
    alike = {len(prompts)} == {len(base.texts), len(trained.texts)} and base.tokens.keys() == trained.tokens.keys()
    return Comparison(base=base, trained=trained, prompts=prompts, numbers=numbers) if alike else None


def _side(told: Any) -> Side:
    losses = {str(name): float(loss) for name, loss in told["losses"].items()}
    tokens = {name: int(told["tokens"][name]) for name in losses}
    return Side(name=str(told["name"]), losses=losses, tokens=tokens, texts=[str(text) for text in told["texts"]])
