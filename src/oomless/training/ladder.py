"""The ways to run a step with less memory, from the configured one to the one that needs least, and how to go from one to another.

Each rung is the step above it and one thing more: smaller micro-batches, smaller chunks of logits, every layer checkpointed,
the layers' inputs on the host, the optimizer's state on the host. None of them changes what the step computes, except to
rounding. Only where it is allowed there is a last one that does: moments of 8 bits.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.optim.adamw import AdamW
from oomless.techniques import checkpointing, offload_activations, sharding
from oomless.training.step import TrainingStep
from oomless.units import format_bytes

SMALLEST_CHUNK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to run a step."""

    micro_batch: int
    chunk_bytes: int
    checkpoint_all: bool = False
    offload_activations: bool = False
    offload_optimizer: bool = False
    leaner_optimizer: bool = False

    def __str__(self) -> str:
        return (
            f"micro-batches of {self.micro_batch}, {format_bytes(self.chunk_bytes)} of logits"
            + ", every layer checkpointed" * self.checkpoint_all
            + ", its inputs on the host" * self.offload_activations
            + ", the optimizer's state on the host" * self.offload_optimizer
            + ", moments of 8 bits" * self.leaner_optimizer
        )


class Ladder:
    """The rungs of one run's step."""

    def __init__(
        self, step: TrainingStep, device: Device, *, micro_batch: int, may_split: bool = True, leaner: bool = False
    ) -> None:
        """Begin with micro-batches of ``micro_batch``, which without ``may_split`` are never cut.

        Raises:
            ConfigError: a ``leaner`` optimizer is allowed, but nothing of this one can be, or a part would end inside a block.
        """
        self.step, self.device = step, device
        layers: list[Any] = checkpointing.layers_of_backward(step.model)
        self._free_layers = [layer for layer in layers if not layer.gradient_checkpointing]
        self._offloading = (
            offload_activations.Offloading(layers, device)
            if len(layers) > 1 and not any(offload_activations.is_offloaded(layer) for layer in layers)
            else None
        )
        optimizer = step.optimizer
        if leaner and not step.ranks.any(isinstance(optimizer, AdamW) and optimizer.can_be_leaner()):
            raise ConfigError(
                "allow_leaner_optimizer has no effect: only AdamW's moments of 32 bits can become leaner, and this run has none; "
                "remove it"
            )
        if leaner:
            sharding.check_blocks(step.model, "allow_leaner_optimizer", "remove it")
        self.rungs = ladder(
            Rung(micro_batch, step.loss_chunk_bytes),
            may_split=may_split,
            checkpoint_all=bool(self._free_layers),
            offload_activations=self._offloading is not None,
            offload_optimizer=step.ranks.any(optimizer.movable_bytes() > 0),
            leaner_optimizer=leaner,
        )

    @contextmanager
    def at(self, rung: Rung) -> Iterator[None]:
        """Run a step inside at ``rung``; where the optimizer keeps its state stays as it is until the next step's."""
        optimizer = self.step.optimizer
        if rung.offload_optimizer:
            optimizer.offload_state(self.device)
        elif self.rungs[-1].offload_optimizer:  # else it lies where the config wants it
            optimizer.fetch_state()
        if rung.leaner_optimizer and isinstance(optimizer, AdamW):
            optimizer.make_leaner(self.device)
        if rung.checkpoint_all:
            checkpointing.apply_to(self.step.model, self._free_layers)
        try:
            with self.chunks_of(rung.chunk_bytes):
                if rung.offload_activations and self._offloading is not None:
                    with self._offloading.on():
                        yield
                else:
                    yield
        finally:
            for layer in self._free_layers if rung.checkpoint_all else ():
                layer.gradient_checkpointing = False

    @contextmanager
    def chunks_of(self, bytes_: int) -> Iterator[None]:
        """Hold at most so many bytes of logits inside."""
        before, self.step.loss_chunk_bytes = self.step.loss_chunk_bytes, bytes_
        try:
            yield
        finally:
            self.step.loss_chunk_bytes = before


def ladder(first: Rung, *, may_split: bool, **further: bool) -> list[Rung]:
    """Return the rungs from the configured step to the one that needs least; ``further`` says which last ones there are."""
    rungs = [first]
    while may_split and rungs[-1].micro_batch > 1:
        rungs.append(replace(rungs[-1], micro_batch=rungs[-1].micro_batch // 2))
    while rungs[-1].chunk_bytes // 4 >= SMALLEST_CHUNK_BYTES:
        rungs.append(replace(rungs[-1], chunk_bytes=rungs[-1].chunk_bytes // 4))
    for name, possible in further.items():
        if possible:
            rungs.append(replace(rungs[-1], **{name: True}))
    return rungs
