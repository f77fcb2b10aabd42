"""The command line: parse, call, render; no logic."""

from __future__ import annotations

import inspect
import logging
import os
import sys
import time
import typing
from collections.abc import Iterator
from contextlib import contextmanager
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from oomless import __version__
from oomless.cli_options import given_settings, gpus_to_compare, host_size, options
from oomless.config import TrainConfig
from oomless.config.values import load_yaml
from oomless.errors import ConfigError, TrainingError, UserError, nearest

BAR_WIDTH = 20

app = typer.Typer(
    help="Train language models on the GPU you have, and do not run out of memory.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode="rich",
    context_settings={
        "help_option_names": ["-h", "--help"],
        "token_normalize_func": lambda token: token.replace("_", "-"),
    },
)


def train(config: Path | None, as_given: bool, host_memory: str | None, **settings: Any) -> None:
    """Continue pretraining MODEL on DATA; settings come from the YAML, and options outrank it.

    On a GPU the settings of precision and memory that are not given are chosen: the best that fits, as oomless plan says.
    """
    given = {**(load_yaml(config) if config else {}), **given_settings(settings)}
    TrainConfig.from_mapping(given)  # says what is missing or contradictory before anything that takes long is imported

    from torch import OutOfMemoryError

    from oomless.planning.plan import predict
    from oomless.report.choice import print_choice
    from oomless.report.plan import print_plan, print_prediction
    from oomless.report.terminal import TerminalListener, print_result
    from oomless.training.distributed import world_size
    from oomless.training.listening import Listener
    from oomless.training.loop import train as run

    console = Console(quiet=not _speaks())
    choice = None if as_given or world_size() > 1 else _choice_to_train(console, given, host_memory)
    if choice is None:
        resolved = TrainConfig.from_mapping(given)
        predicted = predict(resolved) if _speaks() else None
    else:
        if choice.config is None:
            _explain_nothing_fits(console, given, choice)
        print_choice(console, choice)
        resolved, predicted = choice.config, choice.plan
    if predicted is not None:
        print_plan(console, predicted)
    listener = TerminalListener(console)
    try:
        result = run(resolved, listener if _speaks() else Listener())
    except OutOfMemoryError as error:  # of one process; of several, one says so
        listener.close()
        _print_out_of_memory(console, error, resolved)
        raise TrainingError(
            "the run was out of memory and was stopped; what happened and what cures it stands above"
        ) from error
    finally:
        listener.close()
    print_result(
        console, result, f"{_launcher(world_size())} train --config {resolved.output_dir}/config.yaml --resume"
    )
    if predicted is not None:
        print_prediction(console, predicted, result.peak_memory_bytes)
    if result.interrupted:
        raise typer.Exit(130)


def plan(
    config: Path | None,
    as_given: bool,
    what_if: str | None,
    host_memory: str | None,
    write: Path | None,
    json: bool,
    timeline: Path | None,
    snapshot: Path | None,
    **settings: Any,
) -> None:
    """Choose, before a run and without a GPU, the best training that fits one; every strategy is rehearsed.

    What is given is kept, the rest is chosen. --model a,b and --what-if gpu=T4,L4 compare; --max-seq-length max finds the
    longest sequence.
    """
    from oomless.planning.strategies import UNPLANNED

    if timeline is not None and timeline.suffix not in (".html", ".png"):
        raise ConfigError(f"a timeline is written as .html or .png; got {timeline.name}")
    given = {**(load_yaml(config) if config else {}), **given_settings(settings)}
    models, gpus = str(given.get("model", "")).split(","), gpus_to_compare(what_if) or [str(given.get("gpu", "auto"))]
    host_bytes = host_size(host_memory)
    compares = len(models) > 1 or what_if is not None
    if compares and (as_given or write or timeline or snapshot):
        raise ConfigError(
            "a comparison goes without --as-given, --write, --timeline and --snapshot: plan one of them for these"
        )
    if as_given and (write is not None or host_memory is not None):
        raise ConfigError(
            "--write and --host-memory have no effect with --as-given, where nothing is chosen; remove them"
        )
    if given.get("max_seq_length") != "max":
        TrainConfig.from_mapping({**UNPLANNED, **given})

    from oomless.planning.choose import as_config, choose_training, compare, picked_settings
    from oomless.planning.plan import plan_training
    from oomless.planning.throughput import speed_of
    from oomless.report import choice as report
    from oomless.report.plan import print_plan, write_timeline

    console = Console()
    if compares:
        with _progress(console, quiet=json) as say:
            compared = compare(given, models, gpus, host_bytes=host_bytes, progress=say)
        if json:
            print(dumps(report.compared_to_dict(compared), indent=2))
        else:
            report.print_comparison(console, compared)
        return
    if as_given:
        asked = as_config(given)
        answer, picked = plan_training(asked, snapshot=snapshot is not None), None
        speed = speed_of(answer, asked)
    else:
        with _progress(console, quiet=json) as say:
            picked = choose_training(given, host_bytes=host_bytes, progress=say)
        if picked.config is None or picked.plan is None:
            if json:
                print(dumps(picked.to_dict(), indent=2))
                raise typer.Exit(1)
            report.print_choice(console, picked)
            _explain_nothing_fits(console, given, picked)
        answer = picked.plan
        if snapshot is not None:
            answer = plan_training(picked.config, snapshot=True)
        speed = None  # stands in the table
    if json:
        print(dumps(picked.to_dict() if picked else report.plan_to_dict(answer, speed), indent=2))
    else:
        if picked is not None:
            report.print_choice(console, picked)
        print_plan(console, answer)
        if speed is not None:
            report.print_speed(console, speed, asked, answer.target.gpus)
    if write is not None and picked is not None:
        _write_pick(console, write, picked_settings(picked, given), _launcher(picked.target.gpus))
    if timeline is not None:
        write_timeline(answer.profile, timeline)
    if snapshot is not None:
        from oomless.memory.snapshot import write_snapshot

        assert answer.device is not None
        write_snapshot(answer.device.allocator, snapshot)


def _choice_to_train(console: Console, given: dict[str, Any], host_memory: str | None) -> Any:
    """Return what the planner chooses for a training here; ``None`` where there is no limit, or a run is resumed as it began."""
    from oomless.planning.choose import choose_training
    from oomless.training.assemble import open_device

    device = open_device(str(given.get("gpu", "auto")))
    began = Path(str(given["output_dir"])) / "config.yaml"
    if given.get("resume") and began.is_file():
        for name, value in load_yaml(began).items():
            given.setdefault(name, value)
        return None
    if device.capacity_bytes is None:
        if host_memory is not None:
            raise ConfigError("--host-memory has no effect on a CPU, where nothing is offloaded; remove it")
        return None
    with _progress(console) as say:
        return choose_training(given, host_bytes=host_size(host_memory), progress=say)


def _explain_nothing_fits(console: Console, given: dict[str, Any], choice: Any) -> typing.NoReturn:
    from oomless.models.spec import resolve_for_plan
    from oomless.planning.nearby import smallest_changes
    from oomless.planning.trial import results_folder
    from oomless.report.choice import print_nothing_fits

    spec = resolve_for_plan(str(given["model"]), trust_remote_code=bool(given.get("trust_remote_code")))
    print_nothing_fits(console, choice, smallest_changes(spec, given, choice, results_folder()))
    raise typer.Exit(1)


@contextmanager
def _progress(console: Console, *, quiet: bool = False) -> Iterator[Any]:
    """Show a bar and what is being tried, in one line that goes away; a thread of its own would be in the way of forks."""
    if quiet or not console.is_terminal:
        yield None
        return
    began = time.monotonic()

    def say(text: str, share: float) -> None:
        done = round(share * BAR_WIDTH)
        bar = f"[cyan]{'━' * done}[/][dim]{'━' * (BAR_WIDTH - done)}"
        room = max(0, console.width - BAR_WIDTH - 11)
        console.print(f"\r{bar} {time.monotonic() - began:4.0f} s  {text[:room]}[/]\033[K", end="")

    try:
        yield say
    finally:
        console.print("\r\033[K", end="")


def _write_pick(console: Console, path: Path, settings: dict[str, Any], launcher: str) -> None:
    import yaml

    from oomless.training.checkpoint import write_atomically

    write_atomically(path, yaml.safe_dump(settings, sort_keys=False, allow_unicode=True))
    missing = [f"--{name.replace('_', '-')} ..." for name in ("data", "output_dir") if name not in settings]
    console.print(f"written to {path}: {launcher} train --config {' '.join([str(path), *missing])}", highlight=False)


def explain(
    file: str | None,
    config: Path | None,
    message: str | None,
    snapshot: Path | None,
    tool: str | None,
    mixed_precision: str | None,
    attention: str | None,
    json: bool,
    html: Path | None,
    **settings: Any,
) -> None:
    """Say what an out-of-memory error means: what asked, what held the rest, and which cures, rehearsed, fit.

    FILE is a log, a notebook or a pasted message; - reads what is piped in. What it does not say can be given as settings.
    """
    from oomless.diagnosis.explain import explain as diagnose
    from oomless.diagnosis.explain import read_text
    from oomless.diagnosis.tools import TOOLS
    from oomless.report.diagnosis import print_diagnosis, write_page

    for name, value, known in (
        ("tool", tool, TOOLS),
        ("mixed-precision", mixed_precision, ("fp16", "bf16")),
        ("attention", attention, ("sdpa", "eager")),
    ):
        if value is not None and value not in known:
            raise ConfigError(f"{name} must be one of {', '.join(known)}; got {value!r}.{nearest(value, known)}")
    if file is not None and message is not None:
        raise ConfigError("an error is given as FILE or as --message, not as both")
    text = message or ""
    if file is not None:
        text = sys.stdin.buffer.read().decode(errors="replace") if file == "-" else read_text(file)
    given = {**(load_yaml(config) if config else {}), **given_settings(settings)}
    answer = diagnose(text, given, snapshot=snapshot, tool=tool, mixed_precision=mixed_precision, attention=attention)
    if json:
        print(dumps(answer.to_dict(), indent=2))
    else:
        print_diagnosis(Console(), answer)
    if html is not None:
        write_page(answer, html)


def _print_out_of_memory(console: Console, error: Any, config: TrainConfig) -> None:
    """Explain an out-of-memory error that ended a training."""
    from oomless.diagnosis.explain import explain_error
    from oomless.report.diagnosis import print_diagnosis

    print_diagnosis(console, explain_error(error, config))


def _command(function: Any, *own: tuple[str, Any, Any]) -> None:
    """Add ``function`` as a command with its ``own`` options and one for every setting."""
    parameters = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=annotation)
        for name, annotation, default in own
    ]
    function.__signature__ = inspect.Signature([*parameters, *options()])
    app.command()(function)


_CONFIG = (
    "config",
    Annotated[Path | None, typer.Option("--config", help="YAML with any of the settings below.", show_default=False)],
    None,
)
_AS_GIVEN = (
    "as_given",
    Annotated[
        bool, typer.Option("--as-given", help="Choose nothing: take the settings given, and the defaults for the rest.")
    ],
    False,
)
_HOST_MEMORY = (
    "host_memory",
    Annotated[
        str | None,
        typer.Option(
            "--host-memory",
            help="Memory of the machine, such as 32GiB, for what may be offloaded. \\[default: what is free here]",
            show_default=False,
        ),
    ],
    None,
)
_command(train, _CONFIG, _AS_GIVEN, _HOST_MEMORY)
_command(
    plan,
    _CONFIG,
    _AS_GIVEN,
    (
        "what_if",
        Annotated[str | None, typer.Option("--what-if", help="GPUs to compare: gpu=RTX4090,L4.", show_default=False)],
        None,
    ),
    _HOST_MEMORY,
    (
        "write",
        Annotated[
            Path | None,
            typer.Option("--write", help="Write the pick as YAML for oomless train --config.", show_default=False),
        ],
        None,
    ),
    ("json", Annotated[bool, typer.Option("--json", help="Print the answer as JSON.")], False),
    (
        "timeline",
        Annotated[Path | None, typer.Option("--timeline", help="Write memory over time as .html or .png.")],
        None,
    ),
    (
        "snapshot",
        Annotated[Path | None, typer.Option("--snapshot", help="Write what PyTorch's memory visualiser opens.")],
        None,
    ),
)
_command(
    explain,
    (
        "file",
        Annotated[str | None, typer.Argument(help="A log with the error; - for standard input.", show_default=False)],
        None,
    ),
    _CONFIG,
    ("message", Annotated[str | None, typer.Option("--message", help="The error itself.", show_default=False)], None),
    (
        "snapshot",
        Annotated[
            Path | None,
            typer.Option("--snapshot", help="A file of torch.cuda.memory._dump_snapshot.", show_default=False),
        ],
        None,
    ),
    (
        "tool",
        Annotated[
            str | None,
            typer.Option(
                "--tool",
                help="What ran: trainer, trl, peft, unsloth, axolotl, accelerate, torch or oomless.",
                show_default=False,
            ),
        ],
        None,
    ),
    (
        "mixed_precision",
        Annotated[
            str | None,
            typer.Option(
                "--mixed-precision", help="fp16 or bf16: weights in fp32, arithmetic cast.", show_default=False
            ),
        ],
        None,
    ),
    (
        "attention",
        Annotated[
            str | None, typer.Option("--attention", help="sdpa, or eager with its scores in full.", show_default=False)
        ],
        None,
    ),
    ("json", Annotated[bool, typer.Option("--json", help="Print the diagnosis as JSON.")], False),
    ("html", Annotated[Path | None, typer.Option("--html", help="Also write it as a page.", show_default=False)], None),
)


@app.command()
def demo(
    output_dir: Annotated[
        Path | None, typer.Option(help="Where the demo's files go. \\[default: a new folder under runs/]")
    ] = None,
) -> None:
    """Learn Python's documentation with a small model that knows Python code; no network, two minutes."""
    from oomless.demo import run_demo

    run_demo(Console(), output_dir)


def _version(value: bool) -> None:
    if value:
        print(f"oomless {__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


def main() -> None:
    """Run the command line; what the user got wrong is one message and exit code 2."""
    # bitsandbytes, which peft imports, advises every CPU user to install a package that oomless has no use for.
    logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
    try:
        app()
    except (UserError, TrainingError) as error:
        told = not _speaks() if error.told is None else error.told
        _fail(None if told else str(error), 2 if isinstance(error, UserError) else 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str | None, code: int) -> None:
    if message is not None:
        Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True, markup=True)
    sys.exit(code)


def _speaks() -> bool:
    """Whether this is the one of a run's processes that writes to the terminal."""
    return os.environ.get("RANK", "0") == "0"


def _launcher(gpus: int) -> str:
    return "oomless" if gpus == 1 else f"torchrun --nproc-per-node {gpus} -m oomless"
