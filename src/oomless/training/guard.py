"""Out of memory in the middle of a run: the same tokens are run again with less memory, and the result is the same.

A step that runs out of memory is dropped (gradients, graph, random state), the cache is emptied, and the same blocks are
run under the next rung of ``ladder``. The loss is divided by the step's tokens whatever the micro-batch, and masks of dropout
belong to the blocks (``techniques.block_dropout``), so the update is the one that the undisturbed step would have made, to
rounding; a plain retry gives it bit for bit.

Once the optimizer has begun to change weights, running the step again would change them twice. Three things answer that.
Before an ordinary update changes the first weight, what an update asks for, as measured in ``rehearse``, is asked for and
given back, so that a lack shows while nothing is lost. With ``undo_updates`` what an update is about to change is first copied to
host memory and put back. Else the caller is told to go back to the last checkpoint (``GoBack``), from where the next rung
trains the same blocks.

Several processes do all this together. One that runs out ends its connections, so that the others leave their collectives
(``groups``); then all drop the step, meet, and are told what each of them came to. Nobody changes a weight before all have got that
far, and nobody leaves a step before all are through.
"""

from __future__ import annotations

import gc
import re
import traceback
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from types import MappingProxyType
from typing import Any, TypeVar

import torch
from torch import Tensor

from oomless.config import TrainConfig
from oomless.data.loader import MicroBatch, micro_batches
from oomless.data.pack import IGNORED, Block
from oomless.errors import ConfigError
from oomless.memory.device import Device, random_state, set_random_state
from oomless.optim.base import MemoryLeanOptimizer
from oomless.techniques import block_dropout
from oomless.training.distributed import RanOut
from oomless.training.ladder import Ladder, Rung, ladder
from oomless.training.step import StepResult, TrainingStep

STEPS_BEFORE_CLIMBING = 50
SMALL_BYTES = 1 << 20
"""Requests up to this size have a pool of their own in the caching allocator."""
SMALL_RESERVE_BLOCKS = 8
"""So many of them are reserved for an update at most: more than it ever has at a time."""

Result = TypeVar("Result")
Passed = Callable[[Iterable[MicroBatch]], Iterable[MicroBatch]]
_MESSAGES = re.compile(r"out of memory|CUBLAS_STATUS_ALLOC_FAILED|memory mapping failed with OOM", re.IGNORECASE)


class GoBack(Exception):
    """A step ran out of memory after it had changed weights: the run goes on from its last checkpoint."""


@dataclass(slots=True)
class Standing:
    """What a guard has learnt of its run: all of it outlasts that the run is built again."""

    level: int = 0
    """The rung at which steps run."""

    recoveries: int = 0
    good_steps: int = 0
    """Steps since the rung was last changed."""

    patience: int = field(default_factory=lambda: STEPS_BEFORE_CLIMBING)
    """Good steps before the rung above is tried."""

    steps_to_redo: int = 0
    evaluation_level: int = 0
    """The rung of evaluation, which has its own."""


class StartAgain(Exception):
    """The same, where there is no checkpoint yet: the run is built again and begins at its first step."""

    def __init__(self, standing: Standing) -> None:
        """Begin with a guard that stands where this one stood."""
        self.standing = standing


class OutOfMemory(torch.OutOfMemoryError):
    """No way to go on fits; the last that was tried is that of ``config``."""

    def __init__(self, message: str, config: TrainConfig) -> None:
        super().__init__(message)
        self.config = config


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether ``error`` says that the GPU had no room, in any of the forms that PyTorch gives it."""
    if isinstance(error, torch.OutOfMemoryError):
        return True
    return isinstance(error, RuntimeError) and _MESSAGES.search(str(error)) is not None


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
        self.device.wait()  # what the last update brought to the host is copied on the host
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
        may_split: bool = True,
        leaner: bool = False,
    ) -> None:
        """Begin with micro-batches of ``micro_batch``; one that is not ``active`` lets every error through.

        ``may_split`` and ``leaner`` are the ``Ladder``'s.
        """
        self.active, self._recovers = active, active and not device.fake
        self._alone = step.ranks.count == 1
        self.step, self.device, self.say = step, device, say
        self._ladder = Ladder(step, device, micro_batch=micro_batch, may_split=may_split, leaner=leaner)
        self.rungs = self._ladder.rungs
        self.standing = Standing()
        self._dropout = block_dropout.has_dropout(step.model)
        self._undo = UndoLog(step.optimizer, step, device) if undo else None
        self._changed = self._rehearsing = False
        self._reserve_bytes = 0
        if active:
            step.optimizer.before_update = self._before_update

    @classmethod
    def of(cls, config: TrainConfig, step: TrainingStep, device: Device, say: Callable[[str], None]) -> Guard:
        """Return the guard of a run, which is active on GPUs, real or virtual, unless the config turns it off.

        Raises:
            ConfigError: ``undo_updates`` or ``allow_leaner_optimizer`` has no effect.
        """
        on_gpu = device.capacity_bytes is not None
        for name in ("undo_updates", "allow_leaner_optimizer"):
            if getattr(config, name) and not on_gpu:
                raise ConfigError(f"{name} has no effect on a CPU, whose memory is the host's; remove it")
        active = on_gpu and config.recover_from_oom
        asked = active and step.ranks.count == 1  # of several processes all models that do not are refused
        return cls(
            step,
            device,
            say,
            micro_batch=config.per_device_train_batch_size,
            undo=config.undo_updates,
            active=active,
            may_split=not asked or block_dropout.belongs_to_blocks(step.model, device),
            leaner=config.allow_leaner_optimizer,
        )

    @property
    def whole(self) -> bool:
        """Whether weights and state are those after a step, also where the one after it ran out of memory."""
        return not self._changed

    def as_tried(self, config: TrainConfig) -> TrainConfig:
        """Return ``config`` with what the current rung changes."""
        rung = self.rungs[self.standing.level]
        changes: dict[str, Any] = {"loss_chunk_bytes": rung.chunk_bytes}
        if rung.micro_batch < config.per_device_train_batch_size:
            steps = -(-config.blocks_per_step // rung.micro_batch)
            changes |= {"per_device_train_batch_size": rung.micro_batch, "gradient_accumulation_steps": steps}
            changes |= {"tokens_per_step": None, "per_device_eval_batch_size": None}
        if rung.checkpoint_all:
            changes |= {"gradient_checkpointing": True, "checkpointed_layers": None}
        for name in ("offload_activations", "offload_optimizer"):
            if getattr(rung, name):
                changes[name] = True
        try:
            return replace(config, **changes)
        except ConfigError:  # for a model of one layer, say, some of it is no setting
            return config

    def metrics(self) -> dict[str, int]:
        """Return what belongs in a line of metrics: nothing before the first recovery."""
        at = self.standing
        return {"oom_recoveries": at.recoveries, "recovery_rung": at.level} if at.recoveries else {}

    def _before_update(self, parameter: Tensor) -> None:
        if self._undo is not None:
            self._undo.remember(parameter)
        if not self._changed:
            self._reserve()
            if not self._rehearsing:
                self.step.ranks.any(False)  # from here on no process runs out before its first weight changes
        self._changed = not self._rehearsing

    def _reserve(self) -> None:
        """Ask for what an update asks for at once, of either pool; given back it stays cached for the updates."""
        if not self._reserve_bytes:
            return
        small_blocks = min(SMALL_RESERVE_BLOCKS, self._reserve_bytes // SMALL_BYTES)
        for sizes in ([self._reserve_bytes], [SMALL_BYTES] * small_blocks):
            held = [torch.empty(size, dtype=torch.uint8, device=self.device.torch_device) for size in sizes]
            del held

    def run(self, batches: Sequence[MicroBatch], tokens: int | None = None) -> StepResult:
        """Train on ``batches``, which are one optimizer step (of ``tokens``, as in ``TrainingStep.run``), at the rung that fits.

        Raises:
            torch.OutOfMemoryError: no rung fits.
            GoBack: weights had begun to change and nothing undoes it; the rung that comes next is chosen.
        """
        if not self.active:
            return self.step.run(batches, tokens)
        self._climb(batches)
        result = self._recovering(batches, tokens, self.step.run)
        self.standing.good_steps += 1
        self.standing.steps_to_redo = max(0, self.standing.steps_to_redo - 1)
        return result

    def rehearse(self, batches: Sequence[MicroBatch]) -> None:
        """Run ``batches`` as one optimizer step that changes nothing, and so find the rung at which it fits; not on a CPU.

        Raises:
            torch.OutOfMemoryError: no rung fits, or the guard is not active.
        """
        if self.device.capacity_bytes is None:
            return
        random_before = self._random_state()
        self._rehearsing = True
        try:
            self._recovering(batches, None, self._rehearse)
        finally:
            self._rehearsing = False
            self.step.abandon()
            set_random_state(random_before, self.device)

    def _rehearse(self, batches: list[MicroBatch], tokens: int | None) -> None:
        self._reserve_bytes = 0
        beyond = self.step.rehearse(batches, tokens)
        if self.active:
            self._reserve_bytes = beyond
            self._reserve()

    def _recovering(
        self,
        batches: Sequence[MicroBatch],
        tokens: int | None,
        attempt: Callable[[list[MicroBatch], int | None], Result],
    ) -> Result:
        random_before, at = self._random_state(), self.standing
        tried = at.steps_to_redo > 0
        while True:
            self._changed = False
            if self._undo is not None:
                self._undo.begin()
            try:
                rung = self.rungs[at.level]
                with self.device.host():
                    parts = list(split(batches, rung.micro_batch))
                with self._ladder.at(rung):
                    result = self._by_all(attempt, parts, tokens)
            except RuntimeError as error:
                last = tried and at.level == len(self.rungs) - 1
                if not self._survives(error, last):
                    set_random_state(random_before, self.device)
                    raise
                said = _said(error)
                release(error)
            else:
                self._changed = False
                if self._undo is not None:
                    self._undo.clear()
                return result
            spoiled = self._dropped_by_all(said, last, random_before)
            at.recoveries += 1
            at.level += tried
            tried, at.good_steps = True, 0
            if spoiled:
                self.say(f"out of memory after weights had changed: on with {self.rungs[at.level]}")
                raise GoBack
            self.say(f"out of memory: the step is run again with {self.rungs[at.level]}")

    def _by_all(self, attempt: Callable[..., Result], *given: Any) -> Result:
        """Return what ``attempt`` returns, once it is through in all processes."""
        result = attempt(*given)
        self.step.ranks.any(False)
        return result

    def _survives(self, error: RuntimeError, last: bool) -> bool:
        """Return whether the attempt that ``error`` ended may be made again: memory ran out in it, here or in another process.

        ``last`` says that nothing is left to try; several processes find that together, after the attempt.
        """
        if not self._recovers or (last and self._alone):
            return False
        groups = self.step.ranks.groups
        return is_out_of_memory(error) or (groups is not None and groups.is_over())

    def _dropped_by_all(
        self, said: str, last: bool, random_before: Mapping[str, Tensor] = MappingProxyType({})
    ) -> bool:
        """Leave nothing of the failed attempt in any process; return whether it changed weights, and nothing undid that.

        Raises:
            RanOut: it was the ``last``, whose error says in the process that ran out what was ``said``.
        """
        changed = self._changed
        self.step.leave()
        self._drop(random_before)
        told = self.step.meet((said, changed))
        spoiled = self._undo is None and any(changed for _, changed in told)
        if last:
            self._changed = spoiled
            rank, text = next((rank, text) for rank, (text, _) in enumerate(told) if text)
            raise RanOut(rank, len(told), text)
        return spoiled

    def went_back(self, steps: int) -> None:
        """Know that so many steps, the one that ran out of memory among them, are run again."""
        self.standing.steps_to_redo = steps

    def evaluate(self, blocks: Iterable[Block], size: int, passed: Passed = iter) -> tuple[Tensor, int]:
        """Return what ``TrainingStep.evaluate`` does of ``blocks``, ``size`` at a time, or fewer where that does not fit.

        Logits are held as the steps hold them, or fewer too. What fitted is kept for the next evaluation. Every batch goes through ``passed``, which may raise.

        Raises:
            torch.OutOfMemoryError: single blocks and the smallest chunks of logits do not fit.
        """
        rungs = ladder(Rung(size, self.rungs[self.standing.level].chunk_bytes), may_split=True)
        at, tried = self.standing, False
        while True:
            at.evaluation_level = min(at.evaluation_level, len(rungs) - 1)
            rung = rungs[at.evaluation_level]
            try:
                with self._ladder.chunks_of(rung.chunk_bytes):
                    return self._by_all(self.step.evaluate, passed(micro_batches(blocks, rung.micro_batch)))
            except RuntimeError as error:
                last = tried and rung == rungs[-1]
                if not self._survives(error, last):
                    raise
                said = _said(error)
                release(error)
            self._dropped_by_all(said, last)
            at.evaluation_level += tried
            tried = True
            self.say(f"out of memory: the evaluation is run again with {rungs[at.evaluation_level]}")

    def retried(self, action: Callable[..., Result], *arguments: Any, **keywords: Any) -> Result:
        """Return what ``action``, which may be begun again, returns; once more after memory was freed."""
        call = partial(action, *arguments, **keywords)
        if not (self._recovers and self._alone):
            return call()
        said = "out of memory between two steps: what was begun is done again after freeing what was cached"
        return _once_more(call, self._drop, lambda: self.say(said))

    def if_it_fits(self, action: Callable[..., Result], *arguments: Any, otherwise: str) -> Result | None:
        """Return what ``action``, which may be begun again, returns; ``None`` where it does not fit, and then say ``otherwise``."""
        try:
            return self.retried(action, *arguments)
        except RuntimeError as error:
            if not (self._recovers and self._alone and is_out_of_memory(error)):
                raise
            release(error)
        self._drop()
        self.say(otherwise)
        return None

    def _climb(self, batches: Sequence[MicroBatch]) -> None:
        """Try the rung above after enough good steps; twice as many are enough the next time.

        Where a step that runs out of memory would cost all those before it, it is tried on one that changes nothing.
        """
        at = self.standing
        if at.level == 0 or at.good_steps < at.patience:
            return
        at.level, at.good_steps, at.patience = at.level - 1, 0, 2 * at.patience
        self.say(f"trying {self.rungs[at.level]} again")
        if self.step.fused is not None and self._undo is None:
            self.rehearse(batches)

    def _random_state(self) -> Mapping[str, Tensor]:
        return random_state(self.device) if self._dropout else {}

    def _drop(self, random_before: Mapping[str, Tensor] = MappingProxyType({})) -> None:
        """Leave nothing of the failed attempt behind."""
        self.step.abandon()
        self.device.wait()  # copies that were under way must not land after what is put back
        free(self.device)
        if self._undo is not None and self._changed:
            self._undo.restore()
        self._changed = False
        set_random_state(random_before, self.device)


def split(batches: Iterable[MicroBatch], size: int) -> Iterator[MicroBatch]:
    """Yield ``batches`` in the same order in parts of at most ``size`` blocks."""
    for batch in batches:
        if len(batch.document_lengths) <= size:
            yield batch
            continue
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


def _said(error: BaseException) -> str:
    """Return what ``error`` says, if it is that memory ran out here."""
    return str(error) if is_out_of_memory(error) else ""


def release(error: BaseException) -> None:
    """Let go of the tensors that the frames of ``error`` hold."""
    seen: BaseException | None = error
    while seen is not None:
        traceback.clear_frames(seen.__traceback__)
        following = seen.__cause__ or seen.__context__
        seen.__traceback__ = None
        seen = following


def built(make: Callable[[], Result], device: Device, say: Callable[[str], None]) -> Result:
    """Return what ``make`` returns, which is called once more after memory was freed where it runs out."""
    said = "out of memory while the model was built: it is built again after freeing what was cached"
    return _once_more(make, lambda: free(device), lambda: say(said))


def _once_more(action: Callable[[], Result], clean: Callable[[], None], say: Callable[[], None]) -> Result:
    """Return what ``action`` returns; where it runs out of memory, what it does when called again after ``clean``."""
    try:
        return action()
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        release(error)
    clean()
    say()
    return action()


def free(device: Device) -> None:
    """Give back what only garbage holds, and what is cached."""
    gc.collect()
    device.empty_cache()
