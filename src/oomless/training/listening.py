"""What a run tells those who watch it, while it lasts and at its end."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.data.prepare import PreparedData
from oomless.memory.device import Device
from oomless.techniques import trainable


class Listener:
    """Someone who watches a run; this one does nothing with what it hears."""

    def tokenising(self, done_bytes: int, total_bytes: int) -> None:
        """Text is being tokenised."""

    def prepared(self, facts: RunFacts) -> None:
        """Everything is ready; the first step comes next."""

    def stepped(self, metrics: dict[str, Any]) -> None:
        """A line of metrics was written."""

    def evaluated(self, step: int, losses: dict[str, float]) -> None:
        """Validation losses by source were measured after ``step``."""

    def sampled(self, step: int, samples: list[dict[str, str]]) -> None:
        """The model wrote a ``text`` after each ``prompt``, as it is after ``step``."""

    def saved(self, folder: Path) -> None:
        """A checkpoint or the final model was written."""

    def said(self, message: str) -> None:
        """Something happened that a person should know."""


@dataclass(frozen=True, kw_only=True, slots=True)
class RunFacts:
    """What is known before the first step."""

    config: TrainConfig
    table: list[trainable.TrainableRow]
    data: PreparedData
    device: Device
    total_steps: int
    first_step: int
    rates: str
    """How fast it learns, for a person."""

    gpus: int = 1
    """How many train together."""


@dataclass(kw_only=True, slots=True)
class RunResult:
    """What a run came to."""

    output_dir: Path
    model_dir: Path | None = None
    """The final model in the Hugging Face layout; ``None`` where the run was interrupted."""

    steps: int = 0
    tokens: int = 0
    tokens_per_second: float = 0.0
    peak_memory_bytes: int = 0
    eval_before: dict[str, float] = field(default_factory=dict)
    """Mean cross-entropy by source before the first step of this call."""

    eval_after: dict[str, float] = field(default_factory=dict)
    interrupted: bool = False
