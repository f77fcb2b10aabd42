"""Out of memory in the middle of a run: the same tokens are run again with less memory, and the result is the same.

A step that runs out of memory is dropped (gradients, graph, random state), the cache is emptied, and the same blocks are
run under the next rung: once more as before, then in smaller micro-batches, then with smaller chunks of logits, then with
every layer checkpointed. The loss is divided by the step's tokens whatever the micro-batch, so the update is the one that
the undisturbed step would have made, to rounding; a plain retry gives it bit for bit. Masks of dropout depend on the
micro-batch, so there a smaller one draws others.

Once the optimizer has begun to change weights, running the step again would change them twice. With ``undo_updates`` what
an update is about to change is first copied to host memory and put back; without it such an error ends the run, as before.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor

from oomless.config import TrainConfig
from oomless.data.loader import MicroBatch, micro_batches
from oomless.data.pack import IGNORED, Block
from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.optim.base import MemoryLeanOptimizer
from oomless.techniques import checkpointing
from oomless.training.step import StepResult, TrainingStep

SMALLEST_CHUNK_BYTES = 1 << 20
STEPS_BEFORE_CLIMBING = 50
Result = TypeVar("Result")
Passed = Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]]
_MESSAGES = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|memory mapping failed with OOM", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Rung:
    """One way to run a step."""

    micro_batch: int
    chunk_bytes: int
    checkpoint_all: bool = False

    def __str__(self) -> str:
        return (
            f"micro-batches of {self.micro_batch}, {self.chunk_bytes >> 10} KiB of logits"
            + ", every layer checkpointed" * self.checkpoint_all
        )


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the GPU had no room, in any of the forms that PyTorch gives it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


def ladder(micro_batch: int, chunk_bytes: int, *, can_checkpoint: bool) -> list[Rung]:
    """Return the rungs from the configured step to the one that needs least."""
    rungs = [Rung(micro_batch, chunk_bytes)]
    while rungs[-1].micro_batch > 1:
        rungs.append(Rung(rungs[-1].micro_batch // 2, chunk_bytes))
    while rungs[-1].chunk_bytes // 4 >= SMALLEST_CHUNK_BYTES:
        rungs.append(Rung(1, rungs[-1].chunk_bytes // 4))
    if can_checkpoint:
        rungs.append(Rung(1, rungs[-1].chunk_bytes, checkpoint_all=True))
    return rungs


class UndoLog:
    """Host copies of what an optimizer step is about to change; see ``MemoryLeanOptimizer.before_update``."""

    def __init__(self, optimizer: MemoryLeanOptimizer, step: TrainingStep, device: Device) -> None:
        self.device, self.step = device, step
        self._copies: list[tuple[Tensor, Tensor]] = []
        self._optimizer = optimizer

    def clear(self) -> None:
        """Forget a step, which is done."""
        self._copies.clear()

    def begin(self) -> None:
        """Begin a step with the loss scale; what it updates follows."""
        self.clear()
        if self.step.loss_scale.dynamic:
            self._keep(self.step.loss_scale.tensors().values())

    def remember(self, parameter: Tensor) -> None:
        """Keep ``parameter`` and its state."""
        self._keep((parameter, *self._optimizer.state_tensors(parameter).values()))

    def _keep(self, tensors: Any) -> None:
        for tensor in tensors:
            copy = self.device.pinned_like(tensor)  # unlike fetch also a copy of what lies on the host already
            copy.copy_(tensor.detach())
            self._copies.append((tensor, copy))

    @torch.no_grad()
    def restore(self) -> None:
        """Put everything back, bit for bit."""
        for tensor, copy in self._copies:
            tensor.copy_(copy)


class Guard:
    """Runs steps, evaluations and saves of one run so that running out of memory does not end it."""

    def __init__(
        self,
        step: TrainingStep,
        device: Device,
        say: Callable[[str], None],
        *,
        micro_batch: int,
        undo: bool,
        active: bool = True,
    ) -> None:
        """Begin with micro-batches of ``micro_batch``; one that is not ``active`` lets every error through."""
        self.active = active
        self.step, self.device, self.say = step, device, say
        layers = checkpointing.layers_of_backward(step.model)
        free = [layer for layer in layers if not layer.gradient_checkpointing and "forward" not in vars(layer)]
        self._free_layers = free
        self.rungs = ladder(micro_batch, step.loss_chunk_bytes, can_checkpoint=bool(free))
        self.level = 0
        self.recoveries = 0
        self._good_steps, self._patience = 0, STEPS_BEFORE_CLIMBING
        self._dropout = checkpointing.has_dropout(step.model)
        self._undo = UndoLog(step.optimizer, step, device) if undo else None
        self._changed = False
        if active:
            step.optimizer.before_update = self._before_update

    @classmethod
    def of(cls, config: TrainConfig, step: TrainingStep, device: Device, say: Callable[[str], None]) -> Guard:
        """Return the guard of a run, which is active on one GPU, real or virtual, unless the config turns it off.

        Of several GPUs one that runs out leaves the others in the middle of a collective, from which there is no way back.

        Raises:
            ConfigError: ``undo_updates`` is asked for on a CPU.
        """
        on_gpu = device.capacity_bytes is not None
        if config.undo_updates and not on_gpu:
            raise ConfigError("undo_updates has no effect on a CPU, whose memory is the host's; remove it")
        if on_gpu and config.recover_from_oom and step.ranks.count > 1:
            say("recover_from_oom does nothing with several GPUs: a step that runs out of memory ends the run")
        return cls(
            step,
            device,
            say,
            micro_batch=config.per_device_train_batch_size,
            undo=config.undo_updates,
            active=on_gpu and config.recover_from_oom and step.ranks.count == 1,
        )

    def metrics(self) -> dict[str, int]:
        """Return what belongs in a line of metrics: nothing before the first recovery."""
        return {"oom_recoveries": self.recoveries, "recovery_rung": self.level} if self.recoveries else {}

    def _before_update(self, parameter: Tensor) -> None:
        if self._undo is not None:
            self._undo.remember(parameter)
        self._changed = True

    def run(self, batches: Sequence[MicroBatch], tokens: int | None = None) -> StepResult:
        """Train on ``batches``, which are one optimizer step (of ``tokens``, as in ``TrainingStep.run``), at the rung that fits.

        Raises:
            torch.OutOfMemoryError: no rung fits, or weights had begun to change and nothing undoes it.
        """
        if not self.active:
            return self.step.run(batches, tokens)
        self._climb()
        random_state = self._random_state()
        tried = False
        while True:
            self._changed = False
            if self._undo is not None:
                self._undo.begin()
            try:
                rung = self.rungs[self.level]
                with self.device.host():
                    parts = list(split(batches, rung.micro_batch))
                with self._at(rung):
                    result = self.step.run(parts, tokens)
            except RuntimeError as error:
                if not is_out_of_memory(error) or (self._changed and self._undo is None):
                    raise
                last = tried and self.level == len(self.rungs) - 1
                if last:
                    raise
                _release(error)
            else:
                self._good_steps += 1
                self._changed = False
                if self._undo is not None:
                    self._undo.clear()
                return result
            self._drop(random_state)
            self.recoveries += 1
            if tried:
                self.level += 1
            tried = True
            self._good_steps = 0
            self.say(f"out of memory: the step is run again with {self.rungs[self.level]}")

    def evaluate(self, blocks: Iterable[Block], size: int, passed: Passed = iter) -> tuple[Tensor, int]:
        """Return what ``TrainingStep.evaluate`` does of ``blocks``, ``size`` at a time, or fewer where that does not fit.

        Every batch goes through ``passed``, which may raise.

        Raises:
            torch.OutOfMemoryError: single blocks do not fit.
        """
        sizes = [size, size]
        while sizes[-1] > 1:
            sizes.append(sizes[-1] // 2)
        for attempt, number in enumerate(sizes):
            try:
                return self.step.evaluate(passed(micro_batches(blocks, number)))
            except RuntimeError as error:
                if not self._may_recover(error) or attempt == len(sizes) - 1:
                    raise
                _release(error)
            self._drop(None)
            self.say(f"out of memory: the evaluation is run again in batches of {sizes[attempt + 1]}")
        raise AssertionError("the last size returned or raised")

    def retried(self, action: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
        """Return what ``action``, which may be begun again, returns; once more after memory was freed."""
        try:
            return action(*arguments, **keywords)
        except RuntimeError as error:
            if not self._may_recover(error):
                raise
            _release(error)
        self._drop(None)
        self.say("out of memory while saving or loading: done again after freeing what was cached")
        return action(*arguments, **keywords)

    def _may_recover(self, error: RuntimeError) -> bool:
        return self.active and is_out_of_memory(error)

    def _climb(self) -> None:
        """Try the rung above after enough good steps; twice as many are enough the next time."""
        if self.level > 0 and self._good_steps >= self._patience:
            self.level -= 1
            self._good_steps = 0
            self._patience *= 2
            self.say(f"trying {self.rungs[self.level]} again")

    @contextmanager
    def _at(self, rung: Rung) -> Iterator[None]:
        before = self.step.loss_chunk_bytes
        self.step.loss_chunk_bytes = rung.chunk_bytes
        if rung.checkpoint_all:
            checkpointing.apply_to(self.step.model, self._free_layers)
        try:
            yield
        finally:
            self.step.loss_chunk_bytes = before
            for layer in self._free_layers if rung.checkpoint_all else ():
                layer.gradient_checkpointing = False

    def _random_state(self) -> list[Tensor] | None:
        if not self._dropout:
            return None
        cuda = self.device.torch_device.type == "cuda"
        with self.device.host():
            return [torch.get_rng_state(), *([torch.cuda.get_rng_state(self.device.torch_device)] if cuda else [])]

    def _drop(self, random_state: list[Tensor] | None) -> None:
        """Leave nothing of the failed attempt behind."""
        self.step.abandon()
        gc.collect()
        if self.device.torch_device.type == "cuda":
            torch.cuda.synchronize(
                self.device.torch_device
            )  # copies that were under way must not land after what is put back
        self.device.empty_cache()
        if self._undo is not None and self._changed:
            self._undo.restore()
        self._changed = False
        if random_state is not None:
            torch.set_rng_state(random_state[0])
            for state in random_state[1:]:
                torch.cuda.set_rng_state(state, self.device.torch_device)


def split(batches: Iterable[MicroBatch], size: int) -> Iterator[MicroBatch]:
    """Yield ``batches`` in the same order in parts of at most ``size`` blocks."""
    for batch in batches:
        for start in range(0, len(batch.document_lengths), size):
            part = slice(start, start + size)
            labels = batch.labels[part]
            yield MicroBatch(
                input_ids=batch.input_ids[part],
                labels=labels,
                position_ids=batch.position_ids[part],
                document_lengths=batch.document_lengths[part],
                target_count=int((labels != IGNORED).sum()),
            )


def _release(error: BaseException) -> None:
    """Let go of the tensors that the frames of ``error`` hold."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        following = seen.__cause__ or seen.__context__
        seen.__traceback__ = None
        seen = following
