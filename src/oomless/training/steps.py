"""The steps of a run, one after the other, and what each of them may lead to: a line of metrics, a look back, an end."""

from __future__ import annotations

import math
import time
from collections.abc import Sequence

from oomless.config import BadLossPolicy
from oomless.data.loader import MicroBatch, micro_batches
from oomless.errors import HostMemoryError, TrainingError
from oomless.memory.device import random_state, set_random_state
from oomless.techniques import routes
from oomless.training.audit import TrainabilityAudit
from oomless.training.bad_loss import MOST_IN_A_ROW, what_to_do
from oomless.training.evaluation import evaluate
from oomless.training.guard import GoBack, StartAgain
from oomless.training.interruption import Abandoned
from oomless.training.life import Life
from oomless.training.precision import SMALLEST_SCALE, START_SCALE, explain_overflow
from oomless.training.schedule import learning_rate_factor
from oomless.training.step import StepResult
from oomless.units import counted


def train(life: Life) -> None:
    """Take the steps that are left, or those until the run is asked to end.

    Raises:
        TrainingError: a step went wrong; nothing of it is in a checkpoint.
        HostMemoryError: the host has no room; a checkpoint was written.
        StartAgain: the run has to begin anew.
    """
    config, parts, device, retried = life.config, life.assembly, life.device, life.guard.retried
    warmup_ratio = config.warmup_ratio or 0.0
    audit = None
    if life.step == 0:
        audit = retried(TrainabilityAudit, parts.model, parts.optimizer, device, life.listener.said, life.ranks.any_of)
    began, tokens_before, logged_at = time.perf_counter(), life.tokens, (time.perf_counter(), life.tokens)
    saved_at = began
    while life.step < life.total_steps and not (_lasts_too_long(life) or life.interrupted.agreed()):
        factor = learning_rate_factor(config.lr_scheduler_type, life.step, life.total_steps, warmup_ratio)
        for group in parts.optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
        outcome = None  # what the last one measured is not held through the next
        batches, tokens = _next_batches(life)
        device.count_work(len(batches) if life.step == life.total_steps - 1 else 0)
        outcome = _run_step(life, batches, tokens)
        device.count_work(0)
        if outcome is None:
            logged_at = (time.perf_counter(), life.tokens)
            continue
        life.step += 1
        life.unapplied += outcome.found_inf
        reason = _judge(life, outcome)
        if reason is None:
            life.tokens += tokens
        elif _answer(life, reason) == "rewind":
            continue
        if audit is not None and not device.number(outcome.found_inf) and retried(audit.after_step):
            audit = None
        saves = _save_is_due(life, saved_at)
        logs = reason is None and (life.step % config.logging_steps == 0 or life.step == life.total_steps)
        if logs or saves:
            loss = device.number(outcome.loss)
            _check_finite(life, loss, device.number(life.unapplied), batches)
            life.unapplied.zero_()
        if logs:
            now = time.perf_counter()
            speed = (life.tokens - logged_at[1]) / (now - logged_at[0])
            logged_at = (now, life.tokens)
            _log_step(life, loss, outcome, speed)
        if life.step < life.total_steps:
            if config.eval_steps and life.step % config.eval_steps == 0:
                losses = evaluate(life)
                saves |= life.judge(losses) and config.load_best_model_at_end
            if saves:
                life.keeper.save_on_the_way(life)
                saved_at = time.perf_counter()
        _watch_host(life)
    life.result.tokens_per_second = (life.tokens - tokens_before) / max(1e-9, time.perf_counter() - began)


def _lasts_too_long(life: Life) -> bool:
    """Return whether the loss has not fallen in as many evaluations as the run has patience for."""
    patience = life.config.early_stopping_patience
    if patience is None or life.best.worse < patience:
        return False
    life.listener.said(
        f"the run ends after step {life.step}: {counted(life.best.worse, 'evaluation')} in a row no better than after step "
        f"{life.best.step} (validation loss {life.best.loss:.4f})"
    )
    return True


def _next_batches(life: Life) -> tuple[Sequence[MicroBatch], int]:
    """Return this process's micro-batches of the next step, and how many tokens the step predicts in all processes."""
    with life.ranks.reading(), life.device.host():
        blocks = life.loader.take(life.blocks_per_step)
        batches = list(micro_batches(blocks, life.config.per_device_train_batch_size))
    return life.ranks.share(batches), sum(batch.target_count for batch in batches)


def _run_step(life: Life, batches: Sequence[MicroBatch], tokens: int) -> StepResult | None:
    """Return what the step measured; ``None`` where it was abandoned, or the run went back to before it."""
    life.assembly.step.limits = life.bad_loss.limits()
    may_abandon = life.config.preemption_grace_s is not None
    random_before = random_state(life.device) if may_abandon else {}
    try:
        with life.interrupted.timing_step():
            return life.guard.run(batches, tokens)
    except GoBack:
        _go_back(life)
        return None
    except Abandoned:
        life.assembly.step.abandon()
        set_random_state(random_before, life.device)
        life.loader.position = life.loader.taken[0]
        life.listener.said(f"step {life.step + 1} was abandoned: it and the save might outlast the grace period")
        return None
    except RuntimeError:  # nothing was learnt from its blocks
        life.loader.position = life.loader.taken[0]
        raise


def _go_back(life: Life) -> None:
    """Undo a step that had changed weights when it ran out of memory, by going back to before it.

    Raises:
        StartAgain: there is no checkpoint yet.
    """
    failed = life.step + 1
    last = life.keeper.go_back(life)
    life.guard.went_back(failed if last is None else failed - life.step)
    if last is None:
        life.listener.said("there is no checkpoint yet: the run begins again at step 1")
        raise StartAgain(life.guard.standing)
    life.listener.said(f"back to {last}")


def _save_is_due(life: Life, saved_at: float) -> bool:
    """Return whether a checkpoint follows this step, where the last one was begun with or written at ``saved_at``."""
    config = life.config
    if config.save_steps and life.step % config.save_steps == 0:
        return True
    if not config.save_minutes:
        return False
    return life.ranks.any(time.perf_counter() - saved_at >= 60 * config.save_minutes)


def _judge(life: Life, outcome: StepResult) -> str | None:
    """Return what is bad about the step just run, where the host looks at every one."""
    if not life.bad_loss.reads_every_step:
        return None
    loss, norm = life.device.number(outcome.loss), life.device.number(outcome.gradient_norm)
    return life.bad_loss.judge(life.step, loss, norm)


def _answer(life: Life, reason: str) -> BadLossPolicy:
    """Do what is configured about a bad step, and return what that was.

    Raises:
        TrainingError: it ends the run.
    """
    policy, bad_step, blocks = life.config.on_bad_loss, life.step, life.loader.taken
    said = f"step {bad_step} is bad: {reason}"
    if policy == "stop" or life.bad_loss.in_a_row >= MOST_IN_A_ROW:
        raise _stopped(life, said + (f" (bad for the {MOST_IN_A_ROW}th time in a row)" if policy != "stop" else ""))
    if policy == "rewind":
        last = life.keeper.go_back(life, leave_out=blocks)
        if last is None:
            raise _stopped(life, f"{said}, and there is no checkpoint to go back to")
        life.listener.said(f"{said}; back to {last}, the step's {counted(len(blocks), 'block')} left out")
    else:
        life.listener.said(f"{said}; it was skipped and changed nothing")
    life.keeper.record({"step": life.step, "bad_step": bad_step, "answer": policy, "reason": reason, "blocks": blocks})
    return policy


def _check_finite(life: Life, loss: float, unapplied: float, batches: Sequence[MicroBatch]) -> None:
    parts = life.assembly
    scale = life.device.number(parts.loss_scale.scale, START_SCALE)
    if parts.loss_scale.dynamic and scale < SMALLEST_SCALE:
        raise explain_overflow(parts.model, lambda: parts.step.accumulate(batches[:1], 1))
    if parts.loss_scale.dynamic or life.bad_loss.reads_every_step:
        return
    if not math.isfinite(loss):
        raise _stopped(life, f"the loss of step {life.step} is {loss}")
    if unapplied:
        raise _stopped(
            life, f"before step {life.step} a loss or gradient was not finite in {counted(round(unapplied), 'step')}"
        )


def _log_step(life: Life, loss: float, outcome: StepResult, tokens_per_second: float) -> None:
    usage = life.device.usage()
    groups = life.assembly.optimizer.param_groups
    body = next((group for group in groups if not group["embedding"]), groups[0])
    metrics = {
        "step": life.step,
        "loss": loss,
        "gradient_norm": life.device.number(outcome.gradient_norm),
        "learning_rate": body["lr"],
        "tokens": life.tokens,
        "tokens_per_second": round(tokens_per_second, 1),
        "memory_bytes": usage.allocated_bytes,
        "peak_memory_bytes": usage.peak_allocated_bytes,
    }
    if life.assembly.loss_scale.dynamic:
        metrics["loss_scale"] = life.device.number(life.assembly.loss_scale.scale)
    metrics |= life.guard.metrics()
    routed = routes.take(life.assembly.model, life.ranks.sum_counts)
    metrics |= routed.metrics if routed is not None else {}
    life.keeper.record(metrics)
    life.listener.stepped(metrics)
    life.watch.device_after(life.step, usage)


def _watch_host(life: Life) -> None:
    failure: HostMemoryError | None = None
    try:
        life.watch.host_after(life.step)
    except HostMemoryError as error:
        failure = error
    if life.ranks.any(failure is not None):
        life.keeper.save(life)
        raise HostMemoryError(
            f"{failure or 'the host is short, says another process'}. A checkpoint was written: make room and go on with --resume"
        ) from failure


def _stopped(life: Life, reason: str) -> TrainingError:
    cure = what_to_do(life.assembly.model, updated=life.step > 1)
    return TrainingError(f"{reason}: the run was stopped before it could spoil a checkpoint. {cure}")
