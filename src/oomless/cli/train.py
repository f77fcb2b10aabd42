"""``oomless train``."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from oomless.cli.command import AS_GIVEN, CONFIG, HOST_MEMORY, PREFER
from oomless.cli.options import given_settings, given_stages
from oomless.config import REQUIRED, TrainConfig, outrank, read, require
from oomless.config.stages import Stage, same_stages, stages_of
from oomless.config.values import load_yaml
from oomless.errors import ConfigError, TrainingError, UnplannableError
from oomless.planning.given import LONGEST, host_size, read_given, require_length, wish_of
from oomless.training import run_files

if TYPE_CHECKING:
    from oomless.planning.choice import Choice
    from oomless.planning.plan import Plan
    from oomless.report.screen import Screen
    from oomless.training.listening import Listener, RunResult

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
    stages = given_stages(config, settings)
    given = stages[0].settings if stages else given_settings(config, settings)
    wish = wish_of(prefer)
    chooses = not as_given and given.get("gpu") != "cpu"
    if wish and not chooses:
        raise ConfigError("--prefer has no effect with --as-given or on a CPU, where nothing is chosen; remove it")
    for stage in stages:
        with stage.named():
            _read(stage.settings, chooses)
    given = _read(given, chooses)

    if given.get("resume") and config is not None:
        _require_place(config, Path(given["output_dir"]))
    from oomless.cli.voice import out

    began = Path(given["output_dir"]) / run_files.CONFIG
    goes_on = bool(given.get("resume")) and not as_given and began.is_file()
    if goes_on and wish:
        raise ConfigError("--prefer has no effect with --resume, which goes on as the run began; remove it")
    settler = Settler(out(), as_given or goes_on, wish, host_memory)
    if stages:
        from oomless.cli.stages import train_stages

        train_stages(settler, _go_on_with_stages(began, stages) if goes_on else stages)
    else:
        _train_one(settler, _go_on(began, given) if goes_on else given)


def _read(given: dict[str, Any], chooses: bool) -> dict[str, Any]:
    """Return ``given`` as its fields declare it, checked as far as that is possible before what is left open is chosen."""
    if chooses:
        settings = dict(read_given(given))
        require(settings, *REQUIRED)
    else:
        require_length(given)
        settings = read(given)
        TrainConfig.from_mapping(settings)
    return settings


def _require_place(config: Path, output_dir: Path) -> None:
    """Check that a run that was moved is gone on with where it lies now.

    Raises:
        ConfigError: it is not.
    """
    folder = config.resolve().parent
    if not output_dir.exists() and all((folder / name).is_file() for name in (run_files.CONFIG, run_files.LENGTH)):
        raise ConfigError(
            f"the run lies in {folder}, and its output_dir is {output_dir}, which is not there: give --output-dir {quote(str(folder))}",
            "output_dir",
        )


def _go_on(began: Path, given: dict[str, Any]) -> dict[str, Any]:
    """Return the settings of the run that ``began``, which those ``given`` now outrank."""
    return outrank(load_yaml(began), _without_longest(given))[0]


def _go_on_with_stages(began: Path, stages: Sequence[Stage]) -> Sequence[Stage]:
    """Return the stages of the run that ``began``, whose settings those given now outrank."""
    earlier = stages_of(load_yaml(began))
    same_stages(earlier, stages)
    return [
        replace(stage, settings=outrank(one.settings, _without_longest(stage.settings))[0])
        for one, stage in zip(earlier, stages, strict=True)
    ]


def _without_longest(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` without a length that was found when the run began."""
    return {name: value for name, value in given.items() if (name, value) != ("max_seq_length", LONGEST)}


@dataclass(frozen=True, slots=True)
class Settler:
    """Settles what a run trains with."""

    screen: Screen
    as_given: bool
    wish: dict[str, Any]
    host_memory: str | None

    def settle(self, given: dict[str, Any]) -> tuple[TrainConfig, Plan | None]:
        """Return ``given`` with what is chosen where it leaves something open, and its plan where there is one; both are printed."""
        from oomless.cli.searching import explain_nothing_fits
        from oomless.cli.voice import speaks
        from oomless.report.choice import print_choice
        from oomless.report.plan import print_plan
        from oomless.training.distributed import world_size

        choice = None if self.as_given or world_size() > 1 else _choice_to_train(self, given)
        if choice is None:
            require_length(given)
            config = TrainConfig.from_mapping(given)
            plan = _predict(self.screen, config) if speaks() else None
        else:
            if choice.config is None:
                explain_nothing_fits(self.screen, choice)
            print_choice(self.screen, choice)
            config, plan = choice.config, choice.plan
        if plan is not None:
            print_plan(self.screen, plan)
        return config, plan


def _train_one(settler: Settler, given: dict[str, Any]) -> None:
    """Train what is ``given``."""
    from oomless.training.loop import train as run

    config, plan = settler.settle(given)
    with heard(settler.screen, config) as listener:
        result = run(config, listener, None if plan is None else plan.to_dict())
    print_end(settler.screen, result, plan, config.output_dir)
    if config.general_data:
        print_learnt(settler.screen, config.output_dir)
    if result.interrupted:
        raise typer.Exit(130)


@contextmanager
def heard(screen: Screen, config: TrainConfig) -> Iterator[Listener]:
    """Give who tells ``screen`` of a run; where it is out of memory, say why."""
    from torch import OutOfMemoryError

    from oomless.cli.voice import speaks
    from oomless.report.terminal import TerminalListener
    from oomless.training.listening import Listener

    listener = TerminalListener(screen)
    try:
        yield listener if speaks() else Listener()
    except OutOfMemoryError as error:  # of one process; of several, one says so
        listener.close()
        _print_out_of_memory(screen, error, config)
        raise TrainingError(
            "the run was out of memory and was stopped; what happened and what cures it stands above"
        ) from error
    finally:
        listener.close()


def print_end(screen: Screen, result: RunResult, plan: Plan | None, output_dir: str) -> None:
    """Print what the run in ``output_dir`` came to."""
    from oomless.report.choice import launcher
    from oomless.report.plan import print_prediction
    from oomless.report.terminal import print_result
    from oomless.training.distributed import local_world_size, machine_count

    resume_from = quote(f"{output_dir}/config.yaml")
    command = f"{launcher(local_world_size(), machine_count())} train --config {resume_from} --resume"
    print_result(screen, result, command)
    if plan is not None and plan.fits:  # else it went on with less than was planned
        print_prediction(screen, plan, result.peak_memory_bytes)


def print_learnt(screen: Screen, output_dir: str) -> None:
    """Print what the run in ``output_dir`` learnt and forgot."""
    from oomless.report.knowledge import print_knowledge
    from oomless.report.run import read_run

    print_knowledge(screen, read_run(Path(output_dir)))


def _predict(screen: Any, config: TrainConfig) -> Any:
    """Return the plan of a run that is about to start; ``None`` where there is no limit or no plan can be made."""
    from oomless.planning.plan import predict

    try:
        return predict(config)
    except UnplannableError as error:
        screen.print(f"no plan: {error}")
        return None


def _choice_to_train(settler: Settler, given: dict[str, Any]) -> Choice | None:
    """Return what the planner chooses for a training here; ``None`` where there is no limit."""
    from oomless.cli.searching import searching
    from oomless.planning.choose import choose_training
    from oomless.training.assemble import open_device

    device = open_device(given.get("gpu", "auto"))
    if device.capacity_bytes is None:
        if settler.host_memory is not None:
            raise ConfigError("--host-memory has no effect on a CPU, where nothing is offloaded; remove it")
        return None
    with searching(settler.screen) as say:
        return choose_training(given, **settler.wish, host_bytes=host_size(settler.host_memory), progress=say)


def _print_out_of_memory(screen: Any, error: Any, config: TrainConfig) -> None:
    """Explain an out-of-memory error that ended a training."""
    from oomless.cli.searching import searching
    from oomless.diagnosis.explain import explain_error
    from oomless.report.diagnosis import print_diagnosis
    from oomless.training.guard import OutOfMemory

    with searching(screen) as say:
        answer = explain_error(error, error.config if isinstance(error, OutOfMemory) else config, say)
    print_diagnosis(screen, answer)
