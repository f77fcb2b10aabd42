"""``oomless train``."""

from __future__ import annotations

from pathlib import Path
from shlex import quote
from typing import Any

import typer

from oomless.cli.command import AS_GIVEN, CONFIG, HOST_MEMORY, PREFER
from oomless.cli.options import given_settings
from oomless.config import REQUIRED, TrainConfig, outrank, read, require
from oomless.config.values import load_yaml
from oomless.errors import ConfigError, TrainingError, UnplannableError
from oomless.planning.given import LONGEST, host_size, read_given, require_length, wish_of

OPTIONS = (CONFIG, AS_GIVEN, PREFER, HOST_MEMORY)
FIRST = (
    *("model", "data", "output_dir", "max_seq_length", "trainable", "learning_rate", "num_train_epochs"),
    *("tokens_per_step", "gpu", "resume"),
)
EXAMPLES = """
# learn a folder of text
oomless train --model my-model --data my-text --output-dir runs/first
# keep old text in mind
oomless train ... --data new-text=0.9 --data old-text=0.1
# go on after an end
oomless train --config runs/first/config.yaml --resume
"""


def train(config: Path | None, as_given: bool, prefer: str | None, host_memory: str | None, **settings: Any) -> None:
    """Continue pretraining a model on your text. Settings come from the YAML, and options outrank it.

    On a GPU the settings of precision and memory that are not given are chosen: the best that fits, as oomless plan says.
    """
    # What is missing or contradictory is said before anything that takes long is imported.
    given = given_settings(config, settings)
    wish = wish_of(prefer)
    if wish and (as_given or given.get("gpu") == "cpu"):
        raise ConfigError("--prefer has no effect with --as-given or on a CPU, where nothing is chosen; remove it")
    if as_given or given.get("gpu") == "cpu":
        require_length(given)
        given = read(given)
        require(given, *REQUIRED)
        TrainConfig.from_mapping(given)
    else:
        given = read_given(given)
        require(given, *REQUIRED)

    from torch import OutOfMemoryError

    from oomless.cli.searching import explain_nothing_fits
    from oomless.cli.voice import out, speaks
    from oomless.report.choice import launcher, print_choice
    from oomless.report.plan import print_plan, print_prediction
    from oomless.report.terminal import TerminalListener, print_result
    from oomless.training.distributed import world_size
    from oomless.training.listening import Listener
    from oomless.training.loop import train as run

    screen = out()
    began = Path(given["output_dir"]) / "config.yaml"
    if given.get("resume") and not as_given and began.is_file():
        if wish:
            raise ConfigError("--prefer has no effect with --resume, which goes on as the run began; remove it")
        if given.get("max_seq_length") == LONGEST:
            del given["max_seq_length"]  # it was found when the run began
        given, as_given = outrank(load_yaml(began), given)[0], True
    choice = None if as_given or world_size() > 1 else _choice_to_train(screen, given, wish, host_memory)
    if choice is None:
        require_length(given)
        resolved = TrainConfig.from_mapping(given)
        predicted = _predict(screen, resolved) if speaks() else None
    else:
        if choice.config is None:
            explain_nothing_fits(screen, choice)
        print_choice(screen, choice)
        resolved, predicted = choice.config, choice.plan
    if predicted is not None:
        print_plan(screen, predicted)
    listener = TerminalListener(screen)
    try:
        prediction = None if predicted is None else predicted.to_dict()
        result = run(resolved, listener if speaks() else Listener(), prediction)
    except OutOfMemoryError as error:  # of one process; of several, one says so
        listener.close()
        _print_out_of_memory(screen, error, resolved)
        raise TrainingError(
            "the run was out of memory and was stopped; what happened and what cures it stands above"
        ) from error
    finally:
        listener.close()
    resume_from = quote(f"{resolved.output_dir}/config.yaml")
    print_result(screen, result, f"{launcher(world_size())} train --config {resume_from} --resume")
    if predicted is not None:
        print_prediction(screen, predicted, result.peak_memory_bytes)
    if result.interrupted:
        raise typer.Exit(130)


def _predict(screen: Any, config: TrainConfig) -> Any:
    """Return the plan of a run that is about to start; ``None`` where there is no limit or no plan can be made."""
    from oomless.planning.plan import predict

    try:
        return predict(config)
    except UnplannableError as error:
        screen.print(f"no plan: {error}")
        return None


def _choice_to_train(screen: Any, given: dict[str, Any], wish: dict[str, Any], host_memory: str | None) -> Any:
    """Return what the planner chooses for a training here; ``None`` where there is no limit."""
    from oomless.cli.searching import searching
    from oomless.planning.choose import choose_training
    from oomless.training.assemble import open_device

    device = open_device(given.get("gpu", "auto"))
    if device.capacity_bytes is None:
        if host_memory is not None:
            raise ConfigError("--host-memory has no effect on a CPU, where nothing is offloaded; remove it")
        return None
    with searching(screen) as say:
        return choose_training(given, **wish, host_bytes=host_size(host_memory), progress=say)


def _print_out_of_memory(screen: Any, error: Any, config: TrainConfig) -> None:
    """Explain an out-of-memory error that ended a training."""
    from oomless.cli.searching import searching
    from oomless.diagnosis.explain import explain_error
    from oomless.report.diagnosis import print_diagnosis
    from oomless.training.guard import OutOfMemory

    with searching(screen) as say:
        answer = explain_error(error, error.config if isinstance(error, OutOfMemory) else config, say)
    print_diagnosis(screen, answer)
