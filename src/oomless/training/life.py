"""What is alive while a run lasts; what it does with it is told story by story.

``resuming`` and ``script`` begin it, ``steps`` trains, ``evaluation`` measures, ``saving`` keeps. ``loop`` makes one for real.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from oomless.config import TrainConfig
from oomless.data.loader import Loader
from oomless.data.prepare import PreparedData
from oomless.memory.device import Device
from oomless.training import rates
from oomless.training.assemble import Assembly
from oomless.training.bad_loss import BadLoss
from oomless.training.best import Best
from oomless.training.distributed import Ranks
from oomless.training.guard import Guard
from oomless.training.interruption import Interruption
from oomless.training.listening import Listener, RunResult
from oomless.training.watch import MemoryWatch


class Keeper:
    """Keeps what a run leaves; ``saving.RunFolder`` in files."""

    def record(self, metrics: dict[str, Any]) -> None:
        """Keep a line of metrics."""
        raise NotImplementedError

    def prompts(self, life: Life) -> Sequence[Sequence[int]]:
        """Return the tokens of each text of ``sample_prompts``."""
        raise NotImplementedError

    def text(self, tokens: Sequence[int], new: Sequence[int]) -> str:
        """Return how the ``new`` tokens go on after ``tokens``."""
        raise NotImplementedError

    def evaluated(self, step: int) -> dict[str, float]:
        """Return the losses that were recorded of an evaluation after ``step``; empty where there was none."""
        return {}

    def save(self, life: Life) -> None:
        """Keep all that the run needs to go on from this step, if that is not kept yet.

        Raises:
            CheckpointError: it cannot be written; earlier ones are untouched.
        """
        raise NotImplementedError

    def save_on_the_way(self, life: Life) -> None:
        """``save``, and let one failure pass.

        Raises:
            CheckpointError: the save before this one failed too.
        """
        raise NotImplementedError

    def go_back(self, life: Life, leave_out: Iterable[int] = ()) -> str | None:
        """Go back to what was saved last and return its name, ``None`` without any; blocks that were left out still are, and ``leave_out`` too."""
        raise NotImplementedError

    def go_to_best(self, life: Life) -> bool:
        """Make the model what it was at the best evaluation, and return whether that was possible; nothing else changes."""
        return False

    def close(self) -> None:
        """Have everything that was recorded kept, however the run ended."""

    def save_model(self, life: Life) -> Path | None:
        """Keep the model as it is at the end, and return where."""
        raise NotImplementedError


class Life:
    """The state of one run."""

    def __init__(
        self,
        config: TrainConfig,
        device: Device,
        ranks: Ranks,
        listener: Listener,
        *,
        data: PreparedData,
        assembly: Assembly,
        keeper: Keeper,
        result: RunResult,
        interrupted: Interruption | None = None,
    ) -> None:
        total = total_steps(config, data.train.blocks_per_epoch, ranks.count)
        assert total is not None
        self.total_steps = total
        config = rates.resolved(config, assembly.model.config, total)
        self.config, self.device, self.ranks, self.listener = config, device, ranks, listener
        self.data, self.assembly, self.keeper, self.result = data, assembly, keeper, result
        self.guard = Guard.of(config, assembly.step, device, listener.said)
        self.loader = Loader(data.train)
        self.step, self.tokens = 0, 0
        self.unapplied: Tensor
        """In how many steps since the last line of metrics something was not finite; on the device."""
        self.bad_loss = BadLoss(config.on_bad_loss, config.bad_loss_factor, dynamic_scale=assembly.loss_scale.dynamic)
        self.best = Best()
        self.evaluated: tuple[int, dict[str, float]] = (-1, {})
        """The last evaluation: after which step, and its losses by source."""
        self.interrupted = interrupted or Interruption(config.preemption_grace_s, ranks.any)
        assembly.step.before_micro_batch = self.interrupted.check_step
        self.watch = MemoryWatch(
            device,
            self.total_steps,
            listener.said,
            largest_tensor_bytes=max(parameter.nbytes for parameter in assembly.model.parameters()),
            host_reserve_bytes=config.host_reserve_bytes,
        )

    def judge(self, losses: Mapping[str, float]) -> bool:
        """Return whether ``losses`` by source, just measured, are better than all before; what is not learnt has no say."""
        own = {name: loss for name, loss in losses.items() if name not in self.data.general}
        return bool(own) and self.best.judge(self.step, own)

    @property
    def blocks_per_step(self) -> int:
        """How many blocks all processes together train on in a step."""
        return self.config.blocks_per_step * self.ranks.count


def total_steps(config: TrainConfig, blocks_per_epoch: int | None, gpus: int = 1) -> int | None:
    """Return how many steps the run of ``config`` has; ``None`` where that depends on its text, which is not known."""
    blocks_per_step = config.blocks_per_step * gpus
    if config.max_steps is not None:
        return config.max_steps
    if config.max_tokens is not None:
        return math.ceil(config.max_tokens / (blocks_per_step * config.max_seq_length))
    if blocks_per_epoch is None:
        return None
    return max(1, math.ceil(blocks_per_epoch * (config.num_train_epochs or 1.0) / blocks_per_step))
