"""A whole run: prepare, train, evaluate, save, and leave a run folder that tells all of it."""

from __future__ import annotations

import fcntl
import json
import math
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Any

import torch

from oomless.config import TrainConfig
from oomless.config_values import load_yaml
from oomless.data.encode import check_tokenizer
from oomless.data.loader import Loader, micro_batches
from oomless.data.prepare import PreparedData, prepare
from oomless.errors import CheckpointError, ConfigError, TrainingError
from oomless.memory.device import Device
from oomless.models import save
from oomless.models.spec import load_tokenizer, resolve
from oomless.techniques import frozen_layers, lora, trainable
from oomless.training import checkpoint
from oomless.training.assemble import Assembly, assemble, open_device
from oomless.training.audit import TrainabilityAudit
from oomless.training.guard import Guard
from oomless.training.precision import SMALLEST_SCALE, explain_overflow
from oomless.training.probe import check_architecture
from oomless.training.schedule import learning_rate_factor

MAY_CHANGE_ON_RESUME = {
    *("output_dir", "resume", "per_device_eval_batch_size", "logging_steps", "eval_steps", "save_steps"),
    *("save_total_limit", "tensorboard", "cache_dir", "gpu", "loss_chunk_bytes", "gradient_checkpointing"),
    *("checkpointed_layers", "offload_activations", "offload_optimizer", "cheap_recompute", "mlp_tiles"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "recover_from_oom", "undo_updates"),
}


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


def train(config: TrainConfig, listener: Listener | None = None) -> RunResult:
    """Train as ``config`` says and return what came of it; the run folder holds the rest.

    Raises:
        UserError: what was given cannot work.
        TrainingError: the run went wrong and was stopped.
    """
    run = Path(config.output_dir)
    with checkpoint.clear_disk_errors(f"the run folder {run}"):
        run.mkdir(parents=True, exist_ok=True)
    device = open_device(config.gpu)
    with _locked(run), device.active():
        return Run(config, run, device, listener or Listener()).execute()


class Run:
    """The state of one run while it lasts."""

    def __init__(self, config: TrainConfig, run: Path, device: Device, listener: Listener) -> None:
        self.config, self.folder, self.device, self.listener = config, run, device, listener
        start = self._checkpoint_to_resume()
        torch.manual_seed(config.seed)
        spec = resolve(config.model, trust_remote_code=config.trust_remote_code)
        self.tokenizer = load_tokenizer(config.tokenizer or config.model, trust_remote_code=config.trust_remote_code)
        check_tokenizer(self.tokenizer, spec.config.get_text_config().vocab_size)
        cache_dir = Path(config.cache_dir) if config.cache_dir else run / "token-cache"
        self.data = prepare(config, self.tokenizer, cache_dir, listener.tokenising)
        reload_base = (
            start is None or "lora" in config.trainable_parts or config.quantization is not None or config.stream_frozen
        )
        self.assembly: Assembly = assemble(spec, config, device, fill=reload_base)
        self.guard = self._guard()
        self.source = spec.folder or Path(config.model)
        self.loader = Loader(self.data.train)
        self.total_steps = self._total_steps()
        self.step, self.tokens = 0, 0
        if start is not None:
            self._resume(start, spec)
        else:
            check_architecture(self.assembly.model, config.packing, device)
        checkpoint.write_atomically(run / "config.yaml", config.to_yaml())
        self.interrupted = threading.Event()
        self.result = RunResult(output_dir=run)
        self.writer = _tensorboard(run) if config.tensorboard else None

    def execute(self) -> RunResult:
        """Run to the end, or to the interruption."""
        facts = RunFacts(
            config=self.config,
            table=trainable.table(self.assembly.model),
            data=self.data,
            device=self.device,
            total_steps=self.total_steps,
            first_step=self.step,
        )
        self.listener.prepared(facts)
        self.device.reset_peak()
        self.result.eval_before = self._evaluate()
        with _interruptible(self.interrupted):
            self._train_steps()
        if self.interrupted.is_set():
            self.result.interrupted = True
            self._save()
        else:
            self._finish()
        usage = self.device.usage()
        self.result.steps, self.result.tokens = self.step, self.tokens
        self.result.peak_memory_bytes = usage.peak_allocated_bytes
        return self.result

    # Preparing

    def _checkpoint_to_resume(self) -> checkpoint.Checkpoint | None:
        found = checkpoint.newest_good(self.folder, self.listener.said) if self.config.resume else None
        if not self.config.resume and checkpoint.list_checkpoints(self.folder):
            raise ConfigError(
                f"{self.folder} holds the checkpoints of an earlier run: give --resume to go on with it, or another output_dir"
            )
        if found is not None:
            self._check_same_config(TrainConfig.from_mapping(load_yaml(self.folder / "config.yaml")))
        elif self.config.resume:
            self.listener.said(f"nothing to resume in {self.folder}: starting at step 0")
        return found

    def _check_same_config(self, earlier: TrainConfig) -> None:
        before, now = earlier.to_dict(), self.config.to_dict()
        for key in sorted((before.keys() | now.keys()) - MAY_CHANGE_ON_RESUME):
            if before.get(key) != now.get(key):
                raise ConfigError(
                    f"a resumed run must keep {key}: it began with {before.get(key)!r}, now it is {now.get(key)!r}; "
                    "set it back, or start anew in another output_dir"
                )
        if earlier.blocks_per_step != self.config.blocks_per_step:
            raise ConfigError(
                "a resumed run must keep per_device_train_batch_size x gradient_accumulation_steps at "
                f"{earlier.blocks_per_step}; got {self.config.blocks_per_step}"
            )

    def _guard(self) -> Guard | None:
        config = self.config
        if self.device.capacity_bytes is None:
            if config.undo_updates:
                raise ConfigError("undo_updates has no effect on a CPU, whose memory is the host's; remove it")
            return None
        if not config.recover_from_oom:
            return None
        return Guard(
            self.assembly.step,
            self.device,
            self.listener.said,
            micro_batch=config.per_device_train_batch_size,
            undo=config.undo_updates,
        )

    def _total_steps(self) -> int:
        config = self.config
        if config.max_steps is not None:
            return config.max_steps
        if config.max_tokens is not None:
            return math.ceil(config.max_tokens / (config.blocks_per_step * config.max_seq_length))
        blocks = self.data.train.blocks_per_epoch * (config.num_train_epochs or 1.0)
        return max(1, math.ceil(blocks / config.blocks_per_step))

    def _resume(self, start: checkpoint.Checkpoint, spec: Any) -> None:
        parts = self.assembly
        state = checkpoint.read_state(start)
        checkpoint.restore(
            start,
            model=parts.model,
            spec=spec,
            optimizer=parts.optimizer,
            loss_scale=parts.loss_scale,
            device=self.device,
        )
        self.loader.load_state_dict(state["loader"])
        self.step, self.tokens = start.step, state["tokens"]
        metrics = self.folder / "metrics.jsonl"
        if metrics.is_file():
            kept = [line for line in metrics.read_text(encoding="utf-8").splitlines() if _step_of(line) <= self.step]
            checkpoint.write_atomically(metrics, "".join(f"{line}\n" for line in kept))
        self.listener.said(f"resumed from {start.folder.name}")

    # Training

    def _train_steps(self) -> None:
        config, parts = self.config, self.assembly
        audit = TrainabilityAudit(parts.model, parts.optimizer) if self.step == 0 else None
        began, tokens_before, logged_at = time.perf_counter(), self.tokens, (time.perf_counter(), self.tokens)
        while self.step < self.total_steps and not self.interrupted.is_set():
            factor = learning_rate_factor(config.lr_scheduler_type, self.step, self.total_steps, config.warmup_ratio)
            for group in parts.optimizer.param_groups:
                group["lr"] = group["peak_lr"] * factor
            with self.device.host():
                blocks = self.loader.take(config.blocks_per_step)
                batches = list(micro_batches(blocks, config.per_device_train_batch_size))
            outcome = parts.step.run(batches) if self.guard is None else self.guard.run(blocks)
            self.step += 1
            self.tokens += sum(batch.target_count for batch in batches)
            if audit is not None and not float(outcome.found_inf) and audit.after_step():
                audit = None
            if self.step % config.logging_steps == 0 or self.step == self.total_steps:
                loss = float(outcome.loss)
                self._check_finite(loss, batches)
                now = time.perf_counter()
                speed = (self.tokens - logged_at[1]) / (now - logged_at[0])
                logged_at = (now, self.tokens)
                self._log_step(loss, outcome, speed)
            if self.step < self.total_steps:
                if config.eval_steps and self.step % config.eval_steps == 0:
                    self._evaluate()
                if config.save_steps and self.step % config.save_steps == 0:
                    self._save()
        self.result.tokens_per_second = (self.tokens - tokens_before) / max(1e-9, time.perf_counter() - began)

    def _check_finite(self, loss: float, batches: Any) -> None:
        parts = self.assembly
        if parts.loss_scale.dynamic and float(parts.loss_scale.scale) < SMALLEST_SCALE:
            raise explain_overflow(parts.model, lambda: parts.step.accumulate(batches[:1], 1))
        if not parts.loss_scale.dynamic and not math.isfinite(loss):
            raise TrainingError(
                f"the loss of step {self.step} is {loss}: the run was stopped before it could spoil a checkpoint. Lower "
                "learning_rate and go on with --resume from the last checkpoint."
            )

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
        if self.guard is not None and self.guard.recoveries:
            metrics["oom_recoveries"] = self.guard.recoveries
            metrics["recovery_rung"] = self.guard.level
        self._record(metrics)
        self.listener.stepped(metrics)

    def _evaluate(self) -> dict[str, float]:
        losses = {}
        for name, blocks in self.data.evaluation.items():
            size = self.config.per_device_eval_batch_size or 1
            if self.guard is None:
                total, tokens = self.assembly.step.evaluate(micro_batches(blocks, size))
            else:
                total, tokens = self.guard.evaluate(blocks, size)
            losses[name] = float(total) / tokens
        if losses:
            self._record({"step": self.step, **{f"eval_loss/{name}": loss for name, loss in losses.items()}})
            self.listener.evaluated(self.step, losses)
        return losses

    def _record(self, metrics: dict[str, Any]) -> None:
        with checkpoint.clear_disk_errors("metrics.jsonl"), (self.folder / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(metrics) + "\n")
        if self.writer is not None:
            for key, value in metrics.items():
                if key != "step":
                    self.writer.add_scalar(key, value, metrics["step"])

    # Saving

    def _save(self) -> checkpoint.Checkpoint:
        return self._write_checkpoint() if self.guard is None else self.guard.retried(self._write_checkpoint)

    def _write_checkpoint(self) -> checkpoint.Checkpoint:
        written = checkpoint.save_checkpoint(
            self.folder,
            self.step,
            model=self.assembly.model,
            tokenizer=self.tokenizer,
            optimizer=self.assembly.optimizer,
            loss_scale=self.assembly.loss_scale,
            state={"tokens": self.tokens, "loader": self.loader.state_dict()},
            device=self.device,
            limit=self.config.save_total_limit,
        )
        self.listener.saved(written.folder)
        return written

    def _finish(self) -> None:
        """Evaluate, write the last checkpoint, and the model alone in the Hugging Face layout."""
        self.result.eval_after = self._evaluate()
        last = self._save()
        model = self.assembly.model

        def fill(folder: Path) -> None:
            if frozen_layers.has_frozen_layers(model):
                save.save_model(model, folder, save.original_tensors(model, self.source, self.device), self.device)
                self.tokenizer.save_pretrained(folder)
                return
            if checkpoint.is_adapted(model):
                lora.merge(model)
                save.save_model(model, folder, lora.plain_tensors(model), self.device)
                self.tokenizer.save_pretrained(folder)
                return
            for path in last.folder.iterdir():
                if path.is_file():
                    _link_or_copy(path, folder / path.name)

        with self.device.phase("save"), checkpoint.clear_disk_errors("the final model"):
            checkpoint.write_folder(self.folder / "model", fill)
        self.result.model_dir = self.folder / "model"
        self.listener.saved(self.result.model_dir)


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copy2(source, target)


def _step_of(line: str) -> int:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError):  # the line that a kill cut short
        return 1 << 62


def _tensorboard(run: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as error:
        raise ConfigError("tensorboard is not installed: install oomless[tensorboard] or leave it out") from error
    return SummaryWriter(str(run / "tensorboard"))


@contextmanager
def _locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process alone; the lock goes with the process, however it ends."""
    with checkpoint.clear_disk_errors(f"the run folder {run}"):
        file = (run / ".lock").open("w")
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is writing to {run}: wait for it, or choose another output_dir"
            ) from error
        yield


@contextmanager
def _interruptible(interrupted: threading.Event) -> Iterator[None]:
    """Let Ctrl-C and SIGTERM end the run after the step that it is in; a second Ctrl-C ends it at once."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def handle(number: int, frame: FrameType | None) -> None:
        if interrupted.is_set() and number == signal.SIGINT:
            raise KeyboardInterrupt
        interrupted.set()

    previous = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)
