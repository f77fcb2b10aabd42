"""The command line: parse, call, render; no logic."""

from __future__ import annotations

import inspect
import logging
import re
import sys
import typing
from json import dumps
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

from oomless import __version__
from oomless.config import TrainConfig
from oomless.config_values import field_help, load_yaml, without_none
from oomless.errors import ConfigError, TrainingError, UserError, nearest

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

_PANELS = {
    "Model and data": ("model", "cache_dir"),
    "What trains": ("trainable", "use_dora"),
    "Batch and length": ("per_device_train_batch_size", "max_tokens"),
    "Optimizer": ("optimizer", "momentum"),
    "Precision and memory": ("dtype", "loss_chunk_bytes"),
    "Running": ("seed", "tensorboard"),
}
_WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d+)?)")


def _options() -> list[inspect.Parameter]:
    """One option for each setting of ``TrainConfig``; its help is the setting's docstring."""
    options = []
    kinds = typing.get_type_hints(TrainConfig)
    texts = field_help(TrainConfig)
    panel = iter(_PANELS.items())
    title, (_, last) = next(panel)
    for name in kinds:
        kind = without_none(kinds[name])
        flag = "--" + name.replace("_", "-")
        help_text = texts[name]
        default = TrainConfig.__dataclass_fields__[name].default
        if kind is bool:
            help_text += " [default: on]" if default is True else ""
            annotation: Any = bool | None
            flags = [f"{flag}/--no-{name.replace('_', '-')}"]
        else:
            annotation = list[str] | None if name in ("data", "eval_data") else str | None
            flags = [flag]
            if typing.get_origin(kind) is typing.Literal:
                help_text += f" One of {', '.join(typing.get_args(kind))}."
            if isinstance(default, int | float | str):
                help_text += f" [default: {default}]"
        help_text = help_text.replace("[", r"\[")
        option = typer.Option(*flags, help=help_text, rich_help_panel=title, show_default=False)
        options.append(
            inspect.Parameter(
                name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
            )
        )
        if name == last:
            title, (_, last) = next(panel, (title, ("", "")))
    return options


def _given(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given on the command line; ``--data path=0.1`` carries a weight."""
    given = {name: _number(value) for name, value in settings.items() if value is not None and value != []}
    for name in ("data", "eval_data"):
        if name in given:
            given[name] = [_source(text) for text in given[name]]
    return given


def _source(text: str) -> dict[str, Any]:
    match = _WEIGHTED.fullmatch(text)
    if match is None or Path(text).exists():
        return {"path": text}
    return {"path": match[1], "weight": float(match[2])}


def _number(value: Any) -> Any:
    """Return a whole number as an int; the config turns what it needs into floats."""
    return int(value) if isinstance(value, str) and re.fullmatch(r"-?\d+", value) else value


def train(config: Path | None, **settings: Any) -> None:
    """Continue pretraining MODEL on DATA; settings come from the YAML, and options outrank it."""
    from torch import OutOfMemoryError

    from oomless.planning.plan import predict
    from oomless.report.plan import print_plan, print_prediction
    from oomless.report.terminal import TerminalListener, print_result
    from oomless.training.loop import train as run

    console = Console()
    resolved = TrainConfig.from_mapping({**(load_yaml(config) if config else {}), **_given(settings)})
    predicted = predict(resolved)
    if predicted is not None:
        print_plan(console, predicted)
    listener = TerminalListener(console)
    try:
        result = run(resolved, listener)
    except OutOfMemoryError as error:
        listener.close()
        _print_out_of_memory(console, error, resolved)
        raise TrainingError(
            "the run was out of memory and was stopped; what happened and what cures it stands above"
        ) from error
    finally:
        listener.close()
    print_result(console, result, f"oomless train --config {resolved.output_dir}/config.yaml --resume")
    if predicted is not None:
        print_prediction(console, predicted, result.peak_memory_bytes)
    if result.interrupted:
        raise typer.Exit(130)


def plan(config: Path | None, json: bool, timeline: Path | None, snapshot: Path | None, **settings: Any) -> None:
    """Say before a run, and without a GPU, whether it fits one: the training step, rehearsed."""
    from oomless.planning.plan import plan_training
    from oomless.report.plan import print_plan, write_timeline

    if timeline is not None and timeline.suffix not in (".html", ".png"):
        raise ConfigError(f"a timeline is written as .html or .png; got {timeline.name}")
    least = {"data": "-", "output_dir": "-"}
    resolved = TrainConfig.from_mapping({**least, **(load_yaml(config) if config else {}), **_given(settings)})
    answer = plan_training(resolved, snapshot=snapshot is not None)
    if json:
        print(dumps(answer.to_dict(), indent=2))
    else:
        print_plan(Console(), answer)
    if timeline is not None:
        write_timeline(answer.profile, timeline)
    if snapshot is not None:
        from oomless.memory.snapshot import write_snapshot

        write_snapshot(answer.device.allocator, snapshot)


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
    given = {**(load_yaml(config) if config else {}), **_given(settings)}
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
    function.__signature__ = inspect.Signature([*parameters, *_options()])
    app.command()(function)


_CONFIG = (
    "config",
    Annotated[Path | None, typer.Option("--config", help="YAML with any of the settings below.", show_default=False)],
    None,
)
_command(train, _CONFIG)
_command(
    plan,
    _CONFIG,
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
    except UserError as error:
        _fail(str(error), 2)
    except TrainingError as error:
        _fail(str(error), 1)
    except KeyboardInterrupt:
        _fail("interrupted", 130)


def _fail(message: str, code: int) -> None:
    Console(stderr=True).print(f"[bold red]error:[/] {message}", highlight=False, soft_wrap=True, markup=True)
    sys.exit(code)
