"""What a run leaves in its folder: metrics, checkpoints, the final model."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.errors import CheckpointError
from oomless.models import verify
from oomless.models.spec import ModelSpec
from oomless.training import checkpoint, final_model, machines, resuming, samples
from oomless.training.distributed import Ranks
from oomless.training.life import Keeper, Life
from oomless.training.listening import Listener
from oomless.training.run_files import CONFIG, LENGTH, METRICS, MODEL, PREDICTION
from oomless.training.run_folder import Metrics
from oomless.training.trackers import Trackers


class RunFolder(Keeper):
    """The folder of a run, which is locked.

    Args:
        folder: where it lies.
        config: the run.
        tokenizer: goes beside every model.
        spec: the model as it came.
        ranks: the processes, and which of them write.
        listener: is told what was written.
        saved: the checkpoint from which the run goes on.
        prediction: what was planned for it, as plain values.
    """

    def __init__(
        self,
        folder: Path,
        config: TrainConfig,
        tokenizer: Any,
        spec: ModelSpec,
        ranks: Ranks,
        listener: Listener,
        saved: checkpoint.Checkpoint | None,
        prediction: Mapping[str, Any] | None = None,
    ) -> None:
        self.folder, self.config, self.tokenizer, self.spec = folder, config, tokenizer, spec
        self.ranks, self.listener, self.saved, self.prediction = ranks, listener, saved, prediction
        self.last_save_failed = False
        self.best: checkpoint.Checkpoint | None = None
        self.metrics = Metrics(folder / METRICS, listener.said)
        self.trackers = Trackers(config, folder, listener.said)
        self._prompts = samples.tokens_of(config, tokenizer)

    def open(self, total_steps: int) -> None:
        """Begin to write: the config, what was predicted, how long the run is, and metrics from where it goes on.

        Raises:
            CheckpointError: the folder cannot be written.
        """
        with self.ranks.together("the run folder"), checkpoint.clear_disk_errors(f"the config of {self.folder}"):
            if self.ranks.writes:
                self.metrics.cut(self.saved.step if self.saved is not None else -1)
                checkpoint.write_atomically(self.folder / CONFIG, self.config.to_yaml())
                checkpoint.write_atomically(
                    self.folder / LENGTH, json.dumps({"total_steps": total_steps, "gpus": self.ranks.count})
                )
                if self.prediction is not None:
                    checkpoint.write_atomically(self.folder / PREDICTION, json.dumps(self.prediction))
                else:
                    (self.folder / PREDICTION).unlink(missing_ok=True)
        if self.ranks.first:
            self.trackers.open(self.saved.step if self.saved is not None else None)

    def record(self, metrics: dict[str, Any]) -> None:  # noqa: D102
        if self.ranks.writes:
            self.metrics.append(metrics)
        if self.ranks.first:
            self.trackers.log(metrics)

    def prompts(self, life: Life) -> Sequence[Sequence[int]]:  # noqa: D102
        return self._prompts

    def text(self, tokens: Sequence[int], new: Sequence[int]) -> str:  # noqa: D102
        return samples.text_after(self.tokenizer, tokens, new)

    def evaluated(self, step: int) -> dict[str, float]:  # noqa: D102
        found: dict[str, float] = self.ranks.from_first(lambda: self.metrics.evaluated(step))
        return found

    def save(self, life: Life) -> None:  # noqa: D102
        self._checkpoint(life)

    def _checkpoint(self, life: Life) -> checkpoint.Checkpoint:
        """Return the checkpoint of this step, written if it is not there yet."""
        if self.saved is not None and self.saved.step == life.step:
            return self.saved
        with life.interrupted.timing_save():
            self.saved = life.guard.retried(
                checkpoint.save_checkpoint,
                self.folder,
                life.step,
                model=life.assembly.model,
                tokenizer=self.tokenizer,
                optimizer=life.assembly.optimizer,
                loss_scale=life.assembly.loss_scale,
                state={
                    "config": self.config.to_dict(),
                    "gpus": self.ranks.count,
                    "fused": sorted(life.assembly.fused),
                    "tokens": life.tokens,
                    "loader": life.loader.state_dict(),
                    "bad_loss": life.bad_loss.state_dict(),
                    "best": life.best.state_dict(),
                },
                device=life.device,
                limit=self.config.save_total_limit,
                keep=life.best.step if self.config.load_best_model_at_end else None,
                ranks=self.ranks,
                source=self.spec.folder,
            )
        self.listener.saved(self.saved.folder)
        return self.saved

    def save_on_the_way(self, life: Life) -> None:
        """Save, and let one failure pass: a disk that is full now may have room at the next save."""
        try:
            self.save(life)
        except CheckpointError as error:
            if self.last_save_failed:
                raise
            self.last_save_failed = True
            self.listener.said(f"{error} The run goes on; if the next save fails too, it ends.")
        else:
            self.last_save_failed = False

    def go_back(self, life: Life, leave_out: Iterable[int] = ()) -> str | None:  # noqa: D102
        left_out = life.loader.left_out | set(leave_out)
        say = self.listener.said
        last = machines.newest_on_all(self.ranks, self.folder, lambda: checkpoint.newest_good(self.folder, say), say)
        if last is None:
            return None
        resuming.restore(life, self.spec, last)
        self.saved = last
        if self.ranks.writes:
            self.metrics.cut(life.step)
        if self.ranks.first:
            self.trackers.open(life.step)
        life.loader.left_out |= left_out
        return last.folder.name

    def go_to_best(self, life: Life) -> bool:
        """Make the model what it was at the best evaluation, and return whether that was kept and is undamaged."""
        machines.on_all(self.ranks, self.folder / f"checkpoint-{life.best.step}", self.listener.said)
        found = {one.step: one for one in checkpoint.list_checkpoints(self.folder)}.get(life.best.step or -1)
        problem = self.ranks.from_writer(lambda: "it was not kept" if found is None else checkpoint.damage(found))
        if self.ranks.any(problem is not None):
            problem = problem or "another machine does not have it"
        said = f"the best evaluation was that after step {life.best.step}, with a loss of {life.best.loss:.4f}"
        if found is None or problem is not None:
            self.listener.said(f"{said}; {problem}, and the final model is the last one")
            return False
        resuming.restore_model(life, self.spec, found)
        self.best = found
        self.listener.said(f"{said}; the final model is that one")
        return True

    def close(self) -> None:  # noqa: D102
        self.trackers.close()

    def save_model(self, life: Life) -> Path:  # noqa: D102
        target, source = self.folder / MODEL, self.spec.folder or Path(self.config.model)
        last, merge = self.best or self._checkpoint(life), self.config.merge_lora is not False
        model, device = life.assembly.model, life.device
        not_compared = "the GPU has no room to compare logits of the model that was saved; its weights are those that were trained, bit for bit"
        live = partial(life.guard.if_it_fits, verify.live_logits, model, device, otherwise=not_compared)
        write = partial(final_model.write, target, last, model, self.tokenizer, source, merge)
        life.guard.retried(write, device, self.ranks, live)
        self.listener.saved(target)
        return target
