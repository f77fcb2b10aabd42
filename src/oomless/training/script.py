"""What a run does, in order, once it is made: the heaviest blocks, the steps, what it leaves."""

from __future__ import annotations

from contextlib import suppress
from functools import partial

import torch

from oomless.data.loader import micro_batches
from oomless.errors import DataError
from oomless.models import attention
from oomless.techniques import routes, sharding
from oomless.training import steps
from oomless.training.distributed import RanOut
from oomless.training.evaluation import evaluate
from oomless.training.guard import OutOfMemory, is_out_of_memory
from oomless.training.interruption import Abandoned
from oomless.training.life import Life
from oomless.training.precision import choose_dtype
from oomless.training.probe import check_architecture
from oomless.training.step import passes_of


def probe(life: Life) -> None:
    """Ask the model whether its architecture is one that trains right; see ``probe``."""
    parts = life.assembly
    parts.step.run_whole(lambda: check_architecture(parts.model, life.config.packing, life.device))
    if life.ranks.count > 1:
        parts.step.run_whole(lambda: sharding.check_dropout(parts.model, life.device))


def play(life: Life) -> None:
    """Run to the end, or to the interruption.

    Raises:
        torch.OutOfMemoryError: no way to go on fits; what was trained until then is saved.
        DataError: the text changed; what was trained until then is saved.
    """
    first = life.step
    try:
        _play(life)
    except (RuntimeError, DataError) as error:
        short = is_out_of_memory(error)
        if not short and not isinstance(error, DataError):
            raise
        # Where one of several runs out alone, the others would not save with it.
        together = not short or life.ranks.count == 1 or isinstance(error, RanOut)
        if together and life.guard.whole and life.step > first:
            life.keeper.save(life)
        if not short or life.device.fake or life.ranks.count > 1:
            raise
        raise OutOfMemory(str(error), life.guard.as_tried(life.config)) from error


def _play(life: Life) -> None:
    begin(life)
    life.result.eval_before = life.keeper.evaluated(life.step) or evaluate(life)
    if life.config.on_bad_loss == "rewind":
        life.keeper.save(life)  # so that there is always somewhere to go back to
    life.device.empty_cache()  # so that the first step finds what the heaviest one found
    steps.train(life)
    life.keeper.save(life)
    if not life.interrupted.is_set():
        finish(life)


def begin(life: Life) -> None:
    """Run the heaviest micro-batches that the data can give, and change nothing, so that what does not fit shows now."""
    config = life.config
    life.unapplied = life.guard.retried(torch.zeros, (), device=life.device.torch_device)
    life.device.empty_cache()  # what was cached while the model was built and probed has not its sizes
    dtype = choose_dtype(config.dtype, life.device)
    weigh = partial(attention.weigh, life.assembly.model, dtype, life.device.torch_device)
    for blocks in life.data.train.heaviest(config.per_device_train_batch_size, weigh):
        with life.device.host():
            batches = list(micro_batches(blocks * passes_of(config), config.per_device_train_batch_size))
        life.device.count_work(len(batches))
        with suppress(Abandoned):  # the run was asked to end, and does so before its first step
            life.guard.rehearse(batches)
        life.device.count_work(0)
    routed = routes.take(life.assembly.model, life.ranks.sum_counts)
    if routed is not None:
        life.listener.said(f"in the blocks tried first {routed}; no byte depends on it")


def finish(life: Life) -> None:
    """Evaluate, and keep the model alone in the Hugging Face layout; the last checkpoint is written."""
    step, losses = life.evaluated
    if step != life.step:
        losses = life.keeper.evaluated(life.step) or evaluate(life)
        life.judge(losses)
    life.result.eval_after = losses
    if life.interrupted.is_set():
        return
    if life.config.load_best_model_at_end and life.best.step not in (None, life.step) and life.keeper.go_to_best(life):
        life.result.eval_after = life.keeper.evaluated(life.best.step)
    life.result.model_dir = life.keeper.save_model(life)
