"""A whole run: prepare, train, evaluate, save, and leave a run folder that tells all of it."""

from __future__ import annotations

import math
import time
from collections.abc import Iterable, Iterator, Sequence
from contextlib import ExitStack, suppress
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oomless.config import BadLossPolicy, TrainConfig
from oomless.data.encode import check_tokenizer
from oomless.data.loader import Loader, MicroBatch, micro_batches
from oomless.data.prepare import prepare
from oomless.errors import CheckpointError, ConfigError, DataError, HostMemoryError, TrainingError
from oomless.memory.device import Device, random_state, set_random_state
from oomless.models.spec import load_tokenizer, resolve
from oomless.techniques import sharding, trainable
from oomless.training import checkpoint, distributed, final_model, guard
from oomless.training.assemble import Assembly, assemble, open_device
from oomless.training.audit import TrainabilityAudit
from oomless.training.bad_loss import MOST_IN_A_ROW, BadLoss
from oomless.training.distributed import Ranks
from oomless.training.guard import GoBack, Guard, StartAgain
from oomless.training.interruption import Abandoned, Interruption
from oomless.training.listening import Listener, RunFacts, RunResult
from oomless.training.precision import SMALLEST_SCALE, explain_overflow
from oomless.training.probe import check_architecture
from oomless.training.run_folder import Metrics, locked, remove_leftovers, tensorboard
from oomless.training.schedule import learning_rate_factor
from oomless.training.step import StepResult, passes_of
from oomless.training.watch import MemoryWatch

MAY_CHANGE_ON_RESUME = {
    *("output_dir", "resume", "per_device_eval_batch_size", "logging_steps", "eval_steps", "save_steps"),
    *("save_total_limit", "tensorboard", "cache_dir", "gpu", "loss_chunk_bytes", "gradient_checkpointing"),
    *("checkpointed_layers", "offload_activations", "offload_optimizer", "cheap_recompute", "mlp_tiles"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_step"),
    *("recover_from_oom", "undo_updates", "allow_leaner_optimizer", "on_bad_loss", "bad_loss_factor"),
    *("preemption_grace_s", "host_reserve_bytes"),
}


def train(config: TrainConfig, listener: Listener | None = None) -> RunResult:
    """Train as ``config`` says and return what came of it; the run folder holds the rest.

    Raises:
        UserError: what was given cannot work.
        TrainingError: the run went wrong and was stopped.
    """
    run = Path(config.output_dir)
    config = sharding.shared(config, distributed.world_size())
    if distributed.world_size() > 1:
        sharding.check(config)
    device = open_device(config.gpu)
    listener, again = listener or Listener(), None
    with distributed.joined(device.torch_device.type) as ranks, ExitStack() as stack:
        with ranks.together("the lock of the run folder"):
            if ranks.first:
                stack.enter_context(locked(run))
        stack.enter_context(device.active())

        def make() -> Run:
            return Run(config, run, device, listener, ranks, again)

        while True:
            try:
                recovers = config.recover_from_oom and device.capacity_bytes is not None and ranks.count == 1
                return (guard.built(make, device, listener.said) if recovers else make()).execute()
            except StartAgain as error:
                again = StartAgain(error.level, error.recoveries, error.steps)
            guard.free(device)


class Run:
    """The state of one run while it lasts."""

    def __init__(
        self,
        config: TrainConfig,
        run: Path,
        device: Device,
        listener: Listener,
        ranks: Ranks = distributed.ALONE,
        again: StartAgain | None = None,
    ) -> None:
        self.config, self.folder, self.device, self.listener, self.ranks = config, run, device, listener, ranks
        self.blocks_per_step = config.blocks_per_step * ranks.count
        start = ranks.from_first(self._checkpoint_to_resume)
        torch.manual_seed(config.seed)
        self.spec = spec = resolve(config.model, trust_remote_code=config.trust_remote_code)
        self.tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
        check_tokenizer(self.tokenizer, spec.config.get_text_config().vocab_size)
        cache_dir = Path(config.cache_dir) if config.cache_dir else run / "token-cache"
        prepared = partial(prepare, config, self.tokenizer, cache_dir, listener.tokenising)
        if ranks.count > 1:
            ranks.from_first(lambda: prepared() is None)  # the others find the cache
        self.data = prepared()
        reload_base = (
            start is None or "lora" in config.trainable_parts or config.quantization is not None or config.stream_frozen
        )
        self.assembly: Assembly = assemble(spec, config, device, fill=reload_base, ranks=ranks)
        self.guard = Guard.of(config, self.assembly.step, device, listener.said)
        if again is not None:
            self.guard.continue_from(again)
        self.source = spec.folder or Path(config.model)
        self.loader = Loader(self.data.train)
        self.total_steps = self._total_steps()
        self.step, self.tokens = 0, 0
        self.saved, self.last_save_failed = start, False
        self.metrics = Metrics(run / "metrics.jsonl", listener.said)
        self.bad_loss = BadLoss(
            config.on_bad_loss, config.bad_loss_factor, dynamic_scale=self.assembly.loss_scale.dynamic
        )
        self.interrupted = Interruption(config.preemption_grace_s, ranks.any)
        self.assembly.step.before_micro_batch = self.interrupted.check_step
        self.watch = MemoryWatch(
            device,
            self.total_steps,
            listener.said,
            largest_tensor_bytes=max(parameter.nbytes for parameter in self.assembly.model.parameters()),
            host_reserve_bytes=config.host_reserve_bytes,
        )
        if start is not None:
            self._restore(start)
            listener.said(f"resumed from {start.folder.name}")
        else:
            self.assembly.step.run_whole(lambda: check_architecture(self.assembly.model, config.packing, device))
        with ranks.together("the run folder"), checkpoint.clear_disk_errors(f"the config of {run}"):
            if ranks.first:
                self.metrics.cut(self.step if start is not None else -1)
                checkpoint.write_atomically(run / "config.yaml", config.to_yaml())
        self.result = RunResult(output_dir=run)
        self.writer = tensorboard(run) if config.tensorboard and ranks.first else None

    def execute(self) -> RunResult:
        """Run to the end, or to the interruption."""
        facts = RunFacts(
            config=self.config,
            table=trainable.table(self.assembly.model),
            data=self.data,
            device=self.device,
            total_steps=self.total_steps,
            first_step=self.step,
            gpus=self.ranks.count,
        )
        with self.interrupted.listening():
            self.listener.prepared(facts)
            self._rehearse_heaviest()
            self.device.reset_peak()
            self.result.eval_before = self._evaluate()
            if self.config.on_bad_loss == "rewind":
                self._save()  # so that there is always somewhere to go back to
            self._train_steps()
            self._save()
            if not self.interrupted.is_set():
                self._finish()
        self.result.interrupted = self.result.model_dir is None
        usage = self.device.usage()
        self.result.steps, self.result.tokens = self.step, self.tokens
        self.result.peak_memory_bytes = usage.peak_allocated_bytes
        return self.result

    # Preparing

    def _checkpoint_to_resume(self) -> checkpoint.Checkpoint | None:
        remove_leftovers(self.folder)
        found = checkpoint.newest_good(self.folder, self.listener.said) if self.config.resume else None
        if not self.config.resume and checkpoint.list_checkpoints(self.folder):
            raise ConfigError(
                f"{self.folder} holds the checkpoints of an earlier run: give --resume to go on with it, or another output_dir"
            )
        if found is not None:
            state = checkpoint.read_state(found)
            self._check_same_config(TrainConfig.from_mapping(state["config"]), state.get("gpus", 1))
        elif self.config.resume:
            self.listener.said(f"nothing to resume in {self.folder}: starting at step 0")
        return found

    def _check_same_config(self, earlier: TrainConfig, gpus: int) -> None:
        before, now = earlier.to_dict(), self.config.to_dict()
        for key in sorted((before.keys() | now.keys()) - MAY_CHANGE_ON_RESUME):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"a resumed run must keep {key}: it began with {before.get(key)!r}, now it is {now.get(key)!r}; "
                    "set it back, or start anew in another output_dir"
                )
        if earlier.blocks_per_step * gpus != self.blocks_per_step:
            raise ConfigError(
                "a resumed run must keep per_device_train_batch_size x gradient_accumulation_steps x processes at "
                f"{earlier.blocks_per_step * gpus}; got {self.blocks_per_step}"
            )

    def _total_steps(self) -> int:
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        if config.max_tokens is not None:
            return math.ceil(config.max_tokens / (self.blocks_per_step * config.max_seq_length))
        blocks = self.data.train.blocks_per_epoch * (config.num_train_epochs or 1.0)
        return max(1, math.ceil(blocks / self.blocks_per_step))

    def _restore(self, start: checkpoint.Checkpoint) -> None:
        """Go to where ``start`` was saved."""
        parts = self.assembly
        state = checkpoint.read_state(start)
        self.guard.retried(
            checkpoint.restore,
            start,
            model=parts.model,
            spec=self.spec,
            optimizer=parts.optimizer,
            loss_scale=parts.loss_scale,
            device=self.device,
        )
        self.loader.load_state_dict(state["loader"])
        self.bad_loss.load_state_dict(state["bad_loss"])
        self.step, self.tokens, self.saved = start.step, state["tokens"], start

    # Training

    def _rehearse_heaviest(self) -> None:
        """Run the heaviest micro-batches that the data can give, and change nothing, so that what does not fit shows now."""
        config = self.config
        for blocks in self.data.train.heaviest(config.per_device_train_batch_size):
            with self.device.host():
                batches = list(micro_batches(blocks * passes_of(config), config.per_device_train_batch_size))
            with suppress(Abandoned):  # the run was asked to end, and does so before its first step
                self.guard.rehearse(batches)

    def _train_steps(self) -> None:
        config, parts, retried = self.config, self.assembly, self.guard.retried
        audit = retried(TrainabilityAudit, parts.model, parts.optimizer, self.ranks.any_of) if self.step == 0 else None
        unapplied = retried(torch.zeros, (), device=self.device.torch_device)
        began, tokens_before, logged_at = time.perf_counter(), self.tokens, (time.perf_counter(), self.tokens)
        while self.step < self.total_steps and not self.interrupted.agreed():
            factor = learning_rate_factor(config.lr_scheduler_type, self.step, self.total_steps, config.warmup_ratio)
            for group in parts.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            batches, tokens = self._next_batches()
            outcome = self._run_step(batches, tokens)
            if outcome is None:
                logged_at = (time.perf_counter(), self.tokens)
                continue
            self.step += 1
            unapplied += outcome.found_inf
            reason = self._judge(outcome)
            if reason is None:
                self.tokens += tokens
            elif self._answer(reason) == "rewind":
                continue
            if audit is not None and not float(outcome.found_inf) and retried(audit.after_step):
                audit = None
            saves = bool(config.save_steps) and self.step % (config.save_steps or 1) == 0
            logs = reason is None and (self.step % config.logging_steps == 0 or self.step == self.total_steps)
            if logs or saves:
                loss = float(outcome.loss)
                self._check_finite(loss, float(unapplied), batches)
                unapplied.zero_()
            if logs:
                now = time.perf_counter()
                speed = (self.tokens - logged_at[1]) / (now - logged_at[0])
                logged_at = (now, self.tokens)
                self._log_step(loss, outcome, speed)
            if self.step < self.total_steps:
                if config.eval_steps and self.step % config.eval_steps == 0:
                    self._evaluate()
                if saves:
                    self._save_on_the_way()
            self._watch_host()
        self.result.tokens_per_second = (self.tokens - tokens_before) / max(1e-9, time.perf_counter() - began)

    def _next_batches(self) -> tuple[Sequence[MicroBatch], int]:
        """Return this process's micro-batches of the next step, and how many tokens the step predicts in all processes."""
        failure: DataError | None = None
        try:
            with self.device.host():
                blocks = self.loader.take(self.blocks_per_step)
                batches = list(micro_batches(blocks, self.config.per_device_train_batch_size))
        except DataError as error:
            failure = error
        if self.ranks.any(failure is not None):
            self._save()
            raise failure or DataError("the text changed for another process")
        return self.ranks.share(batches), sum(batch.target_count for batch in batches)

    def _run_step(self, batches: Sequence[MicroBatch], tokens: int) -> StepResult | None:
        """Return what the step measured; ``None`` where it was abandoned, or the run went back to before it."""
        step = self.assembly.step
        step.limits = self.bad_loss.limits()
        may_abandon = self.config.preemption_grace_s is not None
        random_before = random_state(self.device) if may_abandon else {}
        try:
            with self.interrupted.timing_step():
                return self.guard.run(batches, tokens)
        except GoBack:
            self._go_back()
            return None
        except Abandoned:
            self.assembly.optimizer.zero_grad(set_to_none=True)
            set_random_state(random_before, self.device)
            self.loader.position = self.loader.taken[0]
            self.listener.said(f"step {self.step + 1} was abandoned: it and the save might outlast the grace period")
            return None

    def _go_back(self) -> None:
        """Undo a step that had changed weights when it ran out of memory, by going back to before it.

        Raises:
            StartAgain: there is no checkpoint yet.
        """
        failed = self.step + 1
        last = self._back_to_checkpoint()
        if last is None:
            raise StartAgain(self.guard.level, self.guard.recoveries, failed)
        self.guard.went_back(failed - last.step)
        self.listener.said(f"back to {last.folder.name}")

    def _back_to_checkpoint(self, leave_out: Iterable[int] = ()) -> checkpoint.Checkpoint | None:
        """Go back to the newest checkpoint and return it; blocks that were left out still are, and ``leave_out`` with them."""
        left_out = self.loader.left_out | set(leave_out)
        last = checkpoint.newest_good(self.folder, self.listener.said)
        if last is not None:
            self._restore(last)
            self.metrics.cut(self.step)
            self.loader.left_out |= left_out
        return last

    def _judge(self, outcome: StepResult) -> str | None:
        """Return what is bad about the step just run, where the host looks at every one."""
        if not self.bad_loss.reads_every_step:
            return None
        return self.bad_loss.judge(self.step, float(outcome.loss), float(outcome.gradient_norm))

    def _answer(self, reason: str) -> BadLossPolicy:
        """Do what is configured about a bad step, and return what that was.

        Raises:
            TrainingError: it ends the run.
        """
        policy, bad_step, blocks = self.config.on_bad_loss, self.step, self.loader.taken
        said = f"step {bad_step} is bad: {reason}"
        if policy == "stop" or self.bad_loss.in_a_row >= MOST_IN_A_ROW:
            raise _stopped(said + (f" (bad for the {MOST_IN_A_ROW}th time in a row)" if policy != "stop" else ""))
        if policy == "rewind":
            last = self._back_to_checkpoint(leave_out=blocks)
            if last is None:
                raise _stopped(f"{said}, and there is no checkpoint to go back to")
            self.listener.said(f"{said}; back to {last.folder.name}, the step's {len(blocks)} blocks left out")
        else:
            self.listener.said(f"{said}; it was skipped and changed nothing")
        self._record({"step": self.step, "bad_step": bad_step, "answer": policy, "reason": reason, "blocks": blocks})
        return policy

    def _check_finite(self, loss: float, unapplied: float, batches: Any) -> None:
        parts = self.assembly
        if parts.loss_scale.dynamic and float(parts.loss_scale.scale) < SMALLEST_SCALE:
            raise explain_overflow(parts.model, lambda: parts.step.accumulate(batches[:1], 1))
        if parts.loss_scale.dynamic or self.bad_loss.reads_every_step:
            return
        if not math.isfinite(loss):
            raise _stopped(f"the loss of step {self.step} is {loss}")
        if unapplied:
            raise _stopped(f"before step {self.step} a loss or gradient was not finite in {unapplied:.0f} steps")

    def _log_step(self, loss: float, outcome: Any, tokens_per_second: float) -> None:
        usage = self.device.usage()
        rates = [group["lr"] for group in self.assembly.optimizer.param_groups]
        metrics = {
            "step": self.step,
            "loss": loss,
            "gradient_norm": float(outcome.gradient_norm),
            "learning_rate": rates[0],
            "tokens": self.tokens,
            "tokens_per_second": round(tokens_per_second, 1),
            "memory_bytes": usage.allocated_bytes,
            "peak_memory_bytes": usage.peak_allocated_bytes,
        }
        if self.assembly.loss_scale.dynamic:
            metrics["loss_scale"] = float(self.assembly.loss_scale.scale)
        metrics |= self.guard.metrics()
        self._record(metrics)
        self.listener.stepped(metrics)
        self.watch.device_after(self.step, usage)

    def _watch_host(self) -> None:
        failure: HostMemoryError | None = None
        try:
            self.watch.host_after(self.step)
        except HostMemoryError as error:
            failure = error
        if self.ranks.any(failure is not None):
            self._save()
            raise HostMemoryError(
                f"{failure or 'the host is short, says another process'}. A checkpoint was written: make room and go on with --resume"
            ) from failure

    def _evaluate(self) -> dict[str, float]:
        losses = {}
        try:
            for name, blocks in self.data.evaluation.items():
                blocks.store.check_unchanged()
                found = self.guard.evaluate(blocks, self.config.per_device_eval_batch_size or 1, self._own_batches)
                losses[name] = self.guard.retried(self._mean_loss, *found)
        except Abandoned:
            return {}
        if losses:
            self._record({"step": self.step, **{f"eval_loss/{name}": loss for name, loss in losses.items()}})
            self.listener.evaluated(self.step, losses)
        return losses

    def _own_batches(self, batches: Iterable[MicroBatch]) -> Iterator[MicroBatch]:
        """Return this process's share of ``batches``, to be cut short where the run is asked to end."""
        return self.ranks.share_batches(self.interrupted.until_set(batches))

    def _mean_loss(self, total: Tensor, tokens: int) -> float:
        both = self.ranks.sum(torch.stack([total, torch.full_like(total, tokens)]))
        return float(both[0]) / float(both[1])

    def _record(self, metrics: dict[str, Any]) -> None:
        if not self.ranks.first:
            return
        self.metrics.append(metrics)
        if self.writer is not None:
            for key, value in metrics.items():
                if key != "step":
                    self.writer.add_scalar(key, value, metrics["step"])

    # Saving

    def _save(self) -> checkpoint.Checkpoint:
        """Return the checkpoint of this step, written if it is not there yet.

        Raises:
            CheckpointError: it cannot be written; earlier ones are untouched.
        """
        if self.saved is not None and self.saved.step == self.step:
            return self.saved
        with self.interrupted.timing_save():
            self.saved = self.guard.retried(
                checkpoint.save_checkpoint,
                self.folder,
                self.step,
                model=self.assembly.model,
                tokenizer=self.tokenizer,
                optimizer=self.assembly.optimizer,
                loss_scale=self.assembly.loss_scale,
                state={
                    "config": self.config.to_dict(),
                    "gpus": self.ranks.count,
                    "tokens": self.tokens,
                    "loader": self.loader.state_dict(),
                    "bad_loss": self.bad_loss.state_dict(),
                },
                device=self.device,
                limit=self.config.save_total_limit,
                ranks=self.ranks,
            )
        self.listener.saved(self.saved.folder)
        return self.saved

    def _save_on_the_way(self) -> None:
        """Save, and let one failure pass: a disk that is full now may have room at the next save.

        Raises:
            CheckpointError: the save before this one failed too.
        """
        try:
            self._save()
        except CheckpointError as error:
            if self.last_save_failed:
                raise
            self.last_save_failed = True
            self.listener.said(f"{error} The run goes on; if the next save fails too, it ends.")
        else:
            self.last_save_failed = False

    def _finish(self) -> None:
        """Evaluate, and write the model alone in the Hugging Face layout; the last checkpoint is written."""
        self.result.eval_after = self._evaluate()
        if self.interrupted.is_set():
            return
        target, model = self.folder / "model", self.assembly.model
        write = partial(final_model.write, target, self._save(), model, self.tokenizer, self.source)
        self.guard.retried(write, self.device, self.ranks)
        self.result.model_dir = target
        self.listener.saved(target)


def _stopped(reason: str) -> TrainingError:
    return TrainingError(
        f"{reason}: the run was stopped before it could spoil a checkpoint. Lower learning_rate, or set on_bad_loss to skip or "
        "rewind, and go on with --resume from the last checkpoint."
    )
