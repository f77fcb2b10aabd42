"""``oomless plan``."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from json import dumps
from pathlib import Path
from shlex import quote
from typing import TYPE_CHECKING, Any

import typer

from oomless.cli.command import AS_GIVEN, CONFIG, HOST_MEMORY, PREFER, own
from oomless.cli.options import (
    given_settings,
    given_stages,
    gpus_to_compare,
    models_to_compare,
    require_form_of_timeline,
    require_writable,
)
from oomless.config.stages import STAGES
from oomless.errors import ConfigError
from oomless.planning.given import as_config, host_size, network_rate, read_given, wish_of
from oomless.planning.strategies import UNPLANNED

if TYPE_CHECKING:
    from oomless.config import TrainConfig
    from oomless.planning.choice import Choice
    from oomless.planning.plan import Plan, Target
    from oomless.planning.throughput import Throughput
    from oomless.report.screen import Screen

OPTIONS = (
    CONFIG,
    AS_GIVEN,
    own("tokens", str, "How much text the run reads, such as 100M. [default: what the files of --data hold]"),
    own("hours", str, "How many hours there are for the run, such as 24."),
    PREFER,
    own("why", bool, "Show what was compared, what does not fit and why, and what the figures rest on."),
    own("what_if", str, "GPUs to compare: gpu=RTX4090,L4."),
    HOST_MEMORY,
    own("network", str, "Rate of each machine's network, such as 100Gbit, for several machines. [default: assumed]"),
    own("write", Path, "Write the pick as YAML for oomless train --config."),
    own("json", bool, "Print the answer as JSON."),
    own("html", Path, "Write the answer as one page to look at or to mail."),
    own("timeline", Path, "Write memory over time as .html or .png."),
    own("snapshot", Path, "Write what PyTorch's memory visualiser opens."),
)
FIRST = (
    *("model", "gpu", "max_seq_length", "tokens_per_step", "trainable", "tied_weights", "quantization"),
    *("optimizer", "weight_precision", "dtype"),
)
EXAMPLES = """
# what should I train on it, with so much text, this weekend?
oomless plan --model meta-llama/Llama-3.2-1B --gpu T4 --tokens 50M --hours 48
# which GPU?
oomless plan --model gemma-7b --what-if gpu=RTX4090,L4,A100-40G
# and on two machines with eight GPUs each?
oomless plan --model meta-llama/Llama-3.1-8B --gpu 2x8xH100 --network 100Gbit
# how long may a sequence be?
oomless plan --model gemma-7b --gpu L4 --max-seq-length max
"""


def plan(
    config: Path | None,
    as_given: bool,
    tokens: str | None,
    hours: str | None,
    prefer: str | None,
    why: bool,
    what_if: str | None,
    host_memory: str | None,
    network: str | None,
    write: Path | None,
    json: bool,
    html: Path | None,
    timeline: Path | None,
    snapshot: Path | None,
    **settings: Any,
) -> None:
    """Choose a training that fits a GPU: for so much text, in so many hours. It needs no GPU; every strategy is rehearsed.

    What is given is kept, the rest is chosen. --model a,b and --what-if gpu=T4,L4 compare; --max-seq-length max finds the
    longest sequence. Ctrl-C takes the best that was found so far.
    """
    for file in (write, html, timeline, snapshot):
        require_writable(file)
    if timeline is not None:
        require_form_of_timeline(timeline)
    if stages := given_stages(config, settings):
        if tokens or hours or what_if or timeline or snapshot:
            raise ConfigError(
                "a run in stages goes without --tokens, --hours, --what-if, --timeline and --snapshot: say in each stage how long it is, "
                "and plan one of them for the others"
            )
        from oomless.cli.stages import plan_stages

        _require_choice(as_given, why, write=write, host_memory=host_memory, prefer=prefer)
        wish, host_bytes, rate = wish_of(prefer), host_size(host_memory), network_rate(network)
        plan_stages(stages, as_given, wish, host_bytes, rate, why=why, json=json, write=write, html=html)
        return
    given = given_settings(config, settings)
    models, gpus = models_to_compare(given.get("model")), gpus_to_compare(what_if)
    host_bytes, rate = host_size(host_memory), network_rate(network)
    wish = wish_of(prefer, tokens, hours, given)
    compares = len(models) > 1 or bool(gpus)
    if compares and (as_given or write or html or timeline or snapshot):
        raise ConfigError(
            "a comparison goes without --as-given, --write, --html, --timeline and --snapshot: plan one of them for these"
        )
    if compares and why:
        raise ConfigError("--why is about one plan: leave it out, or plan one model on one GPU")
    about_choosing = {"write": write, "host_memory": host_memory, "prefer": prefer, "tokens": tokens, "hours": hours}
    _require_choice(as_given, why, **about_choosing)
    given = as_config(given).to_dict() if as_given else read_given(given)

    from oomless.cli.voice import say_notes
    from oomless.models.spec import resolve_for_plan
    from oomless.planning.layout import with_new_tokens

    for model in filter(None, models):
        spec = resolve_for_plan(model, trust_remote_code=bool(given.get("trust_remote_code")))
        with with_new_tokens(spec, {**UNPLANNED, **given, "model": model}) as (grown, _):
            say_notes(grown.notes_with(given.get("quantization")))
    if compares:
        _compare(given, models, gpus or [given.get("gpu", "auto")], wish, host_bytes, rate, json)
        return
    if as_given:
        answer = _as_given(as_config(given), rate, json, html, recorded=snapshot is not None)
    else:
        answer = _choose(given, wish, host_bytes, rate, json, write, html, why=why, recorded=snapshot is not None)
    if timeline is not None:
        from oomless.report.plan import write_timeline

        write_timeline(answer.profile, timeline)
    if snapshot is not None:
        from oomless.memory.snapshot import write_snapshot

        assert answer.device is not None
        write_snapshot(answer.device.allocator, snapshot)
    if not answer.fits:
        raise typer.Exit(1)


def _require_choice(as_given: bool, why: bool, **of_a_choice: object) -> None:
    """Check that what is about choosing is not given where nothing is chosen."""
    given = " and ".join(f"--{name.replace('_', '-')}" for name, value in of_a_choice.items() if value is not None)
    if as_given and given:
        raise ConfigError(f"--as-given chooses nothing, so that {given} would have no effect: remove {given}")
    if as_given and why:
        raise ConfigError("--why has no effect with --as-given, which shows everything; remove it")


def _compare(
    given: dict[str, Any],
    models: Sequence[str],
    gpus: Sequence[str],
    wish: dict[str, Any],
    host_bytes: int | None,
    network_bytes_per_s: float | None,
    json: bool,
) -> None:
    """Print what is picked for each of ``models`` on each of ``gpus``."""
    from oomless.cli.searching import searching
    from oomless.cli.voice import aside, out
    from oomless.planning.choose import compare
    from oomless.report.choice import compared_to_dict, print_comparison

    with searching(aside()) as say:
        compared = compare(
            given, models, gpus, **wish, host_bytes=host_bytes, network_bytes_per_s=network_bytes_per_s, progress=say
        )
    if json:
        out().out(dumps(compared_to_dict(compared), indent=2))
    else:
        print_comparison(out(), compared)


def _as_given(
    config: TrainConfig, network_bytes_per_s: float | None, json: bool, html: Path | None, *, recorded: bool
) -> Plan:
    """Print the plan of ``config``, of which nothing is chosen, write it to ``html``, and return it; ``recorded`` for a snapshot."""
    from oomless.cli.voice import out
    from oomless.planning.plan import plan_training
    from oomless.planning.throughput import speed_of
    from oomless.report.choice import plan_to_dict
    from oomless.report.plan_page import plan_page

    answer = plan_training(config, network_bytes_per_s=network_bytes_per_s, snapshot=recorded)
    speed = speed_of(answer, config)
    write_page(html, lambda: plan_page(answer, speed))
    if json:
        out().out(dumps(plan_to_dict(answer, speed), indent=2))
    else:
        print_as_given(out(), answer, speed, config)
    return answer


def print_as_given(screen: Screen, answer: Plan, speed: Throughput | None, config: TrainConfig) -> None:
    """Print the plan of ``config``, of which nothing is chosen."""
    from oomless.report.choice import print_speed
    from oomless.report.plan import print_plan

    print_plan(screen, answer)
    screen.print(answer.rates)
    if speed is not None:
        print_speed(screen, speed, config, answer.target.gpus)


def _choose(
    given: dict[str, Any],
    wish: dict[str, Any],
    host_bytes: int | None,
    network_bytes_per_s: float | None,
    json: bool,
    write: Path | None,
    html: Path | None,
    *,
    why: bool,
    recorded: bool,
) -> Plan:
    """Print what is picked, and ``why``, ``write`` it, also as ``html``, and return its plan; ``recorded`` for a snapshot.

    Raises:
        typer.Exit: nothing fits.
    """
    from oomless.cli.searching import searching
    from oomless.cli.voice import aside, out
    from oomless.planning.choose import choose_training, picked_settings
    from oomless.planning.plan import plan_training
    from oomless.report.plan_page import choice_page

    with searching(aside()) as say:
        picked = choose_training(
            given, **wish, host_bytes=host_bytes, network_bytes_per_s=network_bytes_per_s, progress=say
        )
    write_page(html, lambda: choice_page(picked))
    if json:
        out().out(dumps(picked.to_dict(), indent=2))
    else:
        print_picked(out(), picked, why=why)
    if picked.config is None or picked.plan is None:
        raise typer.Exit(1)
    if not json:
        print_next(out(), picked.target, why=why, write=write)
    if write is not None:
        write_pick(aside() if json else out(), write, picked_settings(picked), picked.target)
    if not recorded:
        return picked.plan
    return plan_training(picked.config, network_bytes_per_s=network_bytes_per_s, snapshot=True)


def print_picked(screen: Screen, picked: Choice, *, why: bool) -> None:
    """Print what is picked, and ``why``.

    Raises:
        typer.Exit: nothing fits.
    """
    from oomless.cli.searching import explain_nothing_fits
    from oomless.report.choice import of_replay, print_choice, print_why
    from oomless.report.plan import print_plan

    print_choice(screen, picked)
    if picked.config is None or picked.plan is None:
        explain_nothing_fits(screen, picked)
    screen.print(picked.rates)
    if said := of_replay(picked):
        screen.print(said)
    if why:
        print_why(screen, picked)
        print_plan(screen, picked.plan)


def print_next(screen: Screen, target: Target, *, why: bool, write: Path | None) -> None:
    """Print what one may ask next, and how to train on ``target``."""
    from oomless.report.choice import launcher

    if not why:
        screen.print("--why says what does not fit, and what the figures rest on.", style="dim")
    if write is None:
        command = f"{launcher(target.gpus_of_machine, target.machines)} train --config run.yaml"
        screen.print(f"To train it, add --write run.yaml here; then{_where(target)}: {command}", style="dim")


def write_page(path: Path | None, made: Callable[[], str]) -> None:
    """Write the page that is ``made`` to ``path``, where one is asked for."""
    if path is None:
        return
    from oomless.cli.voice import aside
    from oomless.training.checkpoint import write_atomically

    write_atomically(path, made())
    aside().print(f"written to {path}", soft_wrap=True)


def write_pick(screen: Screen, path: Path, settings: dict[str, Any], target: Target) -> None:
    """Write the ``settings`` of a pick for ``target`` as YAML for ``oomless train --config``."""
    import yaml

    from oomless.report.choice import launcher
    from oomless.training.checkpoint import write_atomically

    write_atomically(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    said = [settings, *settings.get(STAGES, ())]
    missing = [
        f"--{name.replace('_', '-')} ..." for name in ("data", "output_dir") if not any(name in part for part in said)
    ]
    command = (
        f"{launcher(target.gpus_of_machine, target.machines)} train --config {' '.join([quote(str(path)), *missing])}"
    )
    screen.print(f"written to {path}{_where(target)}: {command}", soft_wrap=True)


def _where(target: Target) -> str:
    """Return where a command that trains on ``target`` is started."""
    return ", on each machine, of which HOST is one" if target.machines > 1 else ""
