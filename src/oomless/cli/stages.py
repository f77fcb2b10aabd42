"""``oomless train`` and ``oomless plan`` of a run in stages."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from json import dumps
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import typer

from oomless.cli.plan import print_as_given, print_next, print_picked, write_page, write_pick
from oomless.cli.searching import searching
from oomless.cli.train import Settler, heard, print_end, print_learnt
from oomless.cli.voice import aside, out, say_notes
from oomless.config import TrainConfig
from oomless.config.stages import Stage, check_form, together
from oomless.models.spec import resolve_for_plan
from oomless.planning.choose import choose_training, picked_settings
from oomless.planning.duration import tokens_to_read
from oomless.planning.given import as_config, read_given
from oomless.planning.plan import Plan, plan_training
from oomless.planning.stages import as_said, check, choice_as_said, dearest, settings_to_plan
from oomless.planning.throughput import speed_of
from oomless.report.charts import page, text
from oomless.report.choice import hours_in_words, hours_to_read, plan_to_dict
from oomless.report.plan_page import choice_parts, plan_parts
from oomless.report.screen import Screen
from oomless.techniques.sharding import shared
from oomless.training import stages as player
from oomless.training.assemble import open_device
from oomless.training.distributed import world_size
from oomless.training.listening import RunResult
from oomless.units import format_bytes

Decide = Callable[[Stage, dict[str, Any]], tuple[TrainConfig, Plan | None]]


@dataclass(frozen=True, kw_only=True, slots=True)
class Settled:
    """A stage with what it trains with."""

    stage: Stage
    config: TrainConfig
    plan: Plan | None

    @property
    def too_large(self) -> bool:
        """Whether it is known not to fit."""
        return self.plan is not None and not self.plan.fits


def settle(stages: Sequence[Stage], decide: Decide) -> list[Settled]:
    """Return what ``decide`` says of each of ``stages``, each for the model that those before it leave."""
    found: list[Settled] = []
    with TemporaryDirectory(prefix="oomless-") as scratch:
        for stage in stages:
            with stage.named():
                planned = settings_to_plan(stage.settings, [one.config for one in found], Path(scratch))
                config, plan = decide(stage, planned)
                found.append(Settled(stage=stage, config=as_said(config, stage.settings), plan=plan))
                check_form([one.config for one in found])
    return found


def decides(settled: Sequence[Settled]) -> tuple[Stage, Plan] | None:
    """Return the stage that needs most, and its plan; ``None`` where none was made."""
    planned = [(one.stage, one.plan) for one in settled if one.plan is not None]
    return planned[dearest([plan for _, plan in planned])] if planned else None


def print_decides(screen: Screen, settled: Sequence[Settled]) -> None:
    """Print which stage decides what fits, or which do not."""
    most = decides(settled)
    too_large = [str(one.stage) for one in settled if one.too_large]
    if too_large:
        screen.say(
            (f"{' and '.join(too_large)}:", "bold"), (" does not fit", "bold red"), ", so that the run does not."
        )
    elif most is not None:
        screen.say((f"{most[0]} decides", "bold"), f": it needs most, {format_bytes(most[1].needed_bytes)}.")


def train_stages(settler: Settler, stages: Sequence[Stage]) -> None:
    """Train ``stages``, where all of them fit.

    Raises:
        typer.Exit: one does not, or the run was interrupted.
    """
    screen, output_dir = settler.screen, str(stages[0].settings["output_dir"])
    limited = open_device(stages[0].settings.get("gpu", "auto")).capacity_bytes is not None

    def decide(stage: Stage, settings: dict[str, Any]) -> tuple[TrainConfig, Plan | None]:
        if limited:
            _title(screen, stage, stages)
        config, plan = settler.settle(settings)
        if plan is None and stage is not stages[0] and world_size() == 1:
            check(config)
        return config, plan

    settled = settle(stages, decide)
    print_decides(screen, settled)
    if any(one.too_large and not (Path(output_dir) / one.stage.folder).exists() for one in settled):
        # One that has begun had to fit, or may recover.
        screen.print("Nothing was begun: leave out --as-given to have settings chosen that fit, or change these.")
        raise typer.Exit(1)
    plans = {one.stage.number: one.plan for one in settled}

    def ended(stage: Stage, result: RunResult) -> None:
        print_end(screen, result, plans[stage.number], output_dir)

    planned = [
        player.Planned(stage=one.stage, config=one.config, prediction=None if one.plan is None else one.plan.to_dict())
        for one in settled
    ]
    with heard(screen, settled[0].config) as listener:
        result = player.train_stages(planned, listener, ended)
    print_learnt(screen, output_dir)
    if result.interrupted:
        raise typer.Exit(130)


class _NothingFits(Exception):
    """No strategy for a stage fits."""


def plan_stages(
    stages: Sequence[Stage],
    as_given: bool,
    wish: dict[str, Any],
    host_bytes: int | None,
    network_bytes_per_s: float | None,
    *,
    why: bool,
    json: bool,
    write: Path | None,
    html: Path | None,
) -> None:
    """Print the plan of each of ``stages`` and which of them decides, ``write`` what is picked, and all of it as ``html``.

    Raises:
        typer.Exit: one does not fit.
    """
    answers: list[dict[str, Any]] = []
    parts: list[str] = []
    picks: list[tuple[Stage, dict[str, Any]]] = []
    hours: list[tuple[float, float] | None] = []
    if model := stages[0].settings.get("model"):
        forms = [stage.settings.get("quantization") for stage in stages]
        spec = resolve_for_plan(model, trust_remote_code=bool(stages[0].settings.get("trust_remote_code")))
        say_notes(spec.notes_with("mxfp4" if "mxfp4" in forms else forms[0]))

    def decide(stage: Stage, settings: dict[str, Any]) -> tuple[TrainConfig, Plan | None]:
        if not json:
            _title(out(), stage, stages)
        parts.append(f"<h2>{text(str(stage))}</h2>")
        if as_given:
            config = as_config(settings)
            plan = plan_training(config, network_bytes_per_s=network_bytes_per_s)
            speed = speed_of(plan, config)
            reading = tokens_to_read(shared(config, plan.target.gpus), plan.target.gpus)
            hours.append(hours_to_read(speed, reading) if speed is not None and reading is not None else None)
            answers.append({"number": stage.number, "name": stage.name, **plan_to_dict(plan, speed)})
            parts.extend(plan_parts(plan))
            if not json:
                print_as_given(out(), plan, speed, config)
            return config, plan
        with searching(aside()) as say:
            found = choose_training(
                read_given(settings),
                **wish,
                host_bytes=host_bytes,
                network_bytes_per_s=network_bytes_per_s,
                progress=say,
            )
        picked = choice_as_said(found, stage.settings)
        answers.append({"number": stage.number, "name": stage.name, **picked.to_dict()})
        parts.extend(choice_parts(picked))
        if not json:
            print_picked(out(), picked, why=why)
        if picked.config is None or picked.plan is None:
            raise _NothingFits
        assert picked.wish is not None
        assert picked.picked is not None
        hours.append(picked.wish.hours_of(picked.picked) if picked.wish.tokens else None)
        picks.append((stage, picked_settings(picked)))
        return picked.config, picked.plan

    settled: list[Settled] = []
    with suppress(_NothingFits):
        settled = settle(stages, decide)
    fits = bool(settled) and not any(one.too_large for one in settled)
    most = decides(settled)
    known = [one for one in hours if one is not None]
    in_all = (sum(fewest for fewest, _ in known), sum(most for _, most in known)) if len(known) == len(stages) else None
    write_page(html, lambda: page("Plan of a run in stages", parts))
    if json:
        name = answers[-1]["name"] if most is None else most[0].name
        out().out(dumps({"fits": fits, "decides": name, "hours": in_all, "stages": answers}, indent=2))
    else:
        print_decides(out(), settled)
        if in_all is not None:
            out().print(f"All stages together take {hours_in_words(in_all)}, predicted.")
        if not as_given and most is not None:
            print_next(out(), most[1].target, why=why, write=write)
    if write is not None and fits and most is not None:
        write_pick(aside() if json else out(), write, together(picks), most[1].target)
    if not fits:
        raise typer.Exit(1)


def _title(screen: Screen, stage: Stage, stages: Sequence[Stage]) -> None:
    screen.say((f"\n{stage} of {len(stages)}", "bold"))
