"""A run that goes on from a checkpoint: which one, whether it still is the same run, and how its state comes back."""

from __future__ import annotations

from collections.abc import Callable, Collection
from pathlib import Path

from oomless.config import TrainConfig, adapter
from oomless.config.stages import STAGES
from oomless.config.values import load_yaml
from oomless.errors import ConfigError
from oomless.models.spec import ModelSpec
from oomless.training import checkpoint, machines, rates
from oomless.training.distributed import Ranks
from oomless.training.life import Life
from oomless.training.run_files import CONFIG
from oomless.training.run_folder import remove_leftovers
from oomless.units import counted

LENGTHS = ("max_steps", "num_train_epochs", "max_tokens")
MAY_CHANGE = {
    *("output_dir", "resume", "per_device_eval_batch_size", "logging_steps", "eval_steps", "save_steps"),
    *("sample_prompts", "sample_tokens"),
    *("save_minutes", "save_total_limit", "report_to", "cache_dir", "gpu", "loss_chunk_bytes"),
    *("kernels", "sharding"),
    "gradient_checkpointing",
    *("checkpointed_layers", "offload_activations", "offload_optimizer", "cheap_recompute", "mlp_tiles"),
    *("per_device_train_batch_size", "gradient_accumulation_steps", "tokens_per_step"),
    *("recover_from_oom", "undo_updates", "allow_leaner_optimizer", "on_bad_loss", "bad_loss_factor"),
    *("preemption_grace_s", "host_reserve_bytes", "load_best_model_at_end", "early_stopping_patience", "merge_lora"),
    *LENGTHS,
}
"""What a resumed run need not keep."""


def checkpoint_to_resume(
    config: TrainConfig, folder: Path, ranks: Ranks, say: Callable[[str], None]
) -> checkpoint.Checkpoint | None:
    """Return the checkpoint in ``folder`` from which the run of ``config`` in ``ranks`` goes on; ``None``: it begins.

    Raises:
        ConfigError: the folder holds another run, or this one with other settings.
        CheckpointError: every checkpoint is damaged, or the folder cannot be written.
    """
    found: checkpoint.Checkpoint | None = machines.newest_on_all(
        ranks, folder, lambda: _newest(config, folder, say), say
    )
    if found is not None:
        ranks.from_writer(lambda: _check_goes_on(config, found, ranks.count, say))
    elif config.resume:
        say(f"nothing to resume in {folder}: starting at step 0")
    return found


def _newest(config: TrainConfig, folder: Path, say: Callable[[str], None]) -> checkpoint.Checkpoint | None:
    remove_leftovers(folder)
    if (folder / CONFIG).is_file() and STAGES in load_yaml(folder / CONFIG):
        raise ConfigError(
            f"{folder} holds a run in stages: go on with it by --config {folder / CONFIG} --resume, or give another output_dir"
        )
    if config.resume:
        return checkpoint.newest_good(folder, say)
    require_no_checkpoints(folder)
    return None


def _check_goes_on(config: TrainConfig, found: checkpoint.Checkpoint, gpus: int, say: Callable[[str], None]) -> None:
    state, earlier = checkpoint.read_state(found), config_of(found)
    check_same_config(earlier, config, MAY_CHANGE)
    if any(getattr(earlier, name) != getattr(config, name) for name in LENGTHS):
        say("the run has another length than before; from here on the learning rate goes by that")
    before, now = earlier.blocks_per_step * state.get("gpus", 1), config.blocks_per_step * gpus
    if before != now:
        raise ConfigError(
            "a resumed run must keep per_device_train_batch_size x gradient_accumulation_steps x processes at "
            f"{before}; got {now}"
        )


def require_no_checkpoints(folder: Path) -> None:
    """Check that a run may begin in ``folder``.

    Raises:
        ConfigError: another did.
    """
    if checkpoint.list_checkpoints(folder):
        raise ConfigError(
            f"{folder} holds the checkpoints of an earlier run: give --resume to go on with it, or another output_dir"
        )


def check_same_config(earlier: TrainConfig, config: TrainConfig, may_change: Collection[str]) -> None:
    """Check that ``config`` is what it was ``earlier`` but for what ``may_change``.

    Raises:
        ConfigError: it is not.
    """
    before, now = rates.kept(earlier, earlier).from_anywhere().to_dict(), rates.kept(config, earlier).to_dict()
    for key in sorted((before.keys() | now.keys()) - set(may_change)):
        if before.get(key) != now.get(key):
            raise ConfigError(
                f"a resumed run must keep {key}: it began with {before.get(key)!r}, now it is {now.get(key)!r}; "
                "set it back, or start anew in another output_dir"
            )


def config_of(start: checkpoint.Checkpoint) -> TrainConfig:
    """Return the settings of the run that saved ``start``."""
    settings = checkpoint.read_state(start)["config"]
    return TrainConfig.from_mapping({**settings, "model": adapter.where_now(settings["model"], start.folder)})


def restore(life: Life, spec: ModelSpec, start: checkpoint.Checkpoint) -> None:
    """Go to where ``start``, of the model of ``spec``, was saved."""
    state = checkpoint.read_state(start)
    restore_model(life, spec, start)
    life.loader.load_state_dict(state["loader"])
    life.bad_loss.load_state_dict(state["bad_loss"])
    life.best.load_state_dict(state.get("best", {}))
    life.step, life.tokens = start.step, state["tokens"]
    now = life.assembly.fused
    before = frozenset(state.get("fused", now))
    for changed, form in ((now - before, "fused"), (before - now, "plain")):
        if changed:
            parts = ", ".join(sorted(changed))
            life.listener.said(f"{form} from here on, which it was not before: {parts}; the same but for rounding")
    if life.step > life.total_steps:
        raise ConfigError(
            f"{start.folder} is at step {life.step}, and the run's length is now {counted(life.total_steps, 'step')}: make it "
            "longer, or start anew in another output_dir",
            *LENGTHS,
        )


def restore_model(life: Life, spec: ModelSpec, start: checkpoint.Checkpoint) -> None:
    """Put the weights that ``start`` holds into the model of ``spec``, and the state that belongs to them beside it."""
    parts = life.assembly
    life.guard.retried(
        checkpoint.restore,
        start,
        model=parts.model,
        spec=spec,
        optimizer=parts.optimizer,
        loss_scale=parts.loss_scale,
        device=life.device,
    )
