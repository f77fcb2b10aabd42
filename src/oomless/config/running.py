"""How a run goes: what it writes and how often, what it watches, and what it does when something goes wrong."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Literal

from oomless.config.values import Count, Positive, Range, Texts
from oomless.errors import ConfigError, nearest

if TYPE_CHECKING:
    from oomless.config import TrainConfig

TRACKERS = ("tensorboard", "wandb", "mlflow", "trackio")
BadLossPolicy = Literal["stop", "skip", "rewind"]


@dataclass(frozen=True, kw_only=True)
class Running:
    """Running."""

    output_dir: str
    """The run folder: config, metrics, checkpoints and the final model."""

    seed: Annotated[int, Range(least=0, below=1 << 63)] = 0
    """Seed of shuffling, held-out documents, LoRA's start and dropout."""

    logging_steps: Count = 1
    """Steps between lines of metrics."""

    eval_steps: Count | None = None
    """Steps between evaluations; one at the start and one at the end are always made. [default: none between]"""

    sample_prompts: Texts | None = None
    """Texts that the model goes on from at each evaluation, the likeliest token each time, so that what it learns can be read on
    the way. As an option it may be given again."""

    sample_tokens: Count | None = None
    """Tokens that it writes of each. [default: 32 with sample_prompts, at most half of max_seq_length]"""

    save_steps: Count | None = None
    """Steps between checkpoints; one at the end is always made. [default: by save_minutes alone]"""

    save_minutes: Annotated[float, Range(least=0)] | None = None
    """Minutes after which a step is followed by a checkpoint, counted from the one before; 0: never. [default: 15, or 0 with
    save_steps]"""

    save_total_limit: Count = 2
    """Checkpoints kept; the oldest go first. With load_best_model_at_end the best is kept beside them."""

    load_best_model_at_end: bool = False
    """Keep the checkpoint of the evaluation with the lowest loss (the mean over its sources), and make the final model of it."""

    early_stopping_patience: Count | None = None
    """Evaluations in a row that are not better than the best before them, after which the run ends. [default: it goes on]"""

    resume: bool = False
    """Go on from the newest good checkpoint in output_dir."""

    report_to: str = "none"
    """What else is told the metrics, each through its own library: tensorboard (event files in output_dir/tensorboard), wandb, mlflow,
    trackio, or several of them joined by commas."""

    @property
    def trackers(self) -> tuple[str, ...]:
        """Those that ``report_to`` names."""
        named = tuple(name.strip() for name in self.report_to.split(","))
        return () if named == ("none",) else named


@dataclass(frozen=True, kw_only=True)
class Recovery:
    """When something goes wrong."""

    recover_from_oom: bool = True
    """On a GPU: run a step or evaluation that ran out of memory again, with less memory and the same result, instead of ending
    the run; where weights had begun to change, from the last checkpoint or step 1. Loading and saving are tried once more, on
    one GPU."""

    undo_updates: bool = False
    """Copy weights and state to host memory before each update, so that running out of memory after the first one of a step
    costs no step, where the run otherwise goes back to its last checkpoint; all of them cross the bus once a step."""

    allow_leaner_optimizer: bool = False
    """Where nothing else helps against running out of memory, keep AdamW's moments in 8 bits from then on; this alone changes
    the result."""

    on_bad_loss: BadLossPolicy = "stop"
    """What a step is whose loss or gradient is not finite: the end of the run; a step that changes nothing; or the way back to
    the last checkpoint, from where its blocks are left out. Five in a row always end the run."""

    bad_loss_factor: Annotated[float, Range(above=1)] | None = None
    """A step is bad as well where its loss or gradient norm reaches this many times the median of the last 100 steps.
    [default: only where not finite]"""

    preemption_grace_s: Positive | None = None
    """Seconds between SIGTERM and SIGKILL: where the step in progress might not leave enough of them to save, it is
    abandoned. [default: it is finished]"""

    host_reserve_bytes: Annotated[int, Range(least=0)] | None = None
    """Host memory that must stay available, or the run writes a checkpoint and stops; 0: it is not watched. [default: a
    fiftieth of what the machine or its control group has, and twice the largest tensor]"""


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself."""
    for name in run.trackers:
        if name not in TRACKERS or run.trackers.count(name) > 1:
            raise ConfigError(
                f"report_to is none, or of {', '.join(TRACKERS)} one or several, each once, joined by commas; got {run.report_to!r}."
                + nearest(name, TRACKERS),
                "report_to",
            )
    if run.on_bad_loss == "skip" and run.optimizer_in_backward:
        raise ConfigError(
            "on_bad_loss: skip needs the whole gradient before the first update, which optimizer_in_backward never has: "
            "choose rewind or stop",
            *("on_bad_loss", "optimizer_in_backward"),
        )
    for name in ("load_best_model_at_end", "early_stopping_patience"):
        if getattr(run, name) and not (run.eval_steps and (run.eval_fraction or run.eval_data)):
            raise ConfigError(
                f"{name} goes by evaluations on the way: set eval_steps, and eval_data or eval_fraction, or remove {name}",
                *(name, "eval_steps"),
            )
    if run.sample_prompts:
        run.fill("sample_tokens", min(32, run.max_seq_length // 2))
        if run.sample_tokens is not None and run.sample_tokens >= run.max_seq_length:
            raise ConfigError(
                f"sample_tokens is below max_seq_length ({run.max_seq_length}), so that a text to go on from has room; "
                f"got {run.sample_tokens}",
                *("sample_tokens", "max_seq_length"),
            )
    elif run.sample_tokens:
        raise ConfigError(
            "sample_tokens has no effect without sample_prompts: give a text to go on from, or remove sample_tokens",
            *("sample_tokens", "sample_prompts"),
        )
    run.fill("save_minutes", 0.0 if run.save_steps else 15.0)
    for name in ("undo_updates", "allow_leaner_optimizer"):
        if getattr(run, name) and not run.recover_from_oom:
            raise ConfigError(
                f"{name} has no effect without recover_from_oom: turn that on, or remove {name}",
                *(name, "recover_from_oom"),
            )
