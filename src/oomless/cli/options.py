"""One command-line option for each setting of ``TrainConfig``, and what was given of them."""

from __future__ import annotations

import inspect
import re
import sys
import typing
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryFile
from typing import Annotated, Any

import typer

from oomless.cli.voice import aside
from oomless.config import SECTIONS, TrainConfig, outrank
from oomless.config.data import SOURCES
from oomless.config.stages import STAGES, Stage, stages_of
from oomless.config.values import Texts, field_help, kinds, load_yaml, plain_kind
from oomless.errors import ConfigError
from oomless.planning.strategies import CHOSEN

_WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d+)?)")
_SETTING = re.compile(r"(.+),(\w+)=([^,]*)")


def options() -> list[inspect.Parameter]:
    """One option for each setting of ``TrainConfig``, by section; its help is the setting's docstring."""
    return [_option(section, name) for section in SECTIONS for name in kinds(section)]


def _option(section: type, name: str) -> inspect.Parameter:
    kind, default = plain_kind(kinds(section)[name]), TrainConfig.__dataclass_fields__[name].default
    flag, text = "--" + name.replace("_", "-"), field_help(section)[name]
    if kind is bool:
        flag += f"/--no-{name.replace('_', '-')}"
        text += " [default: on]" if default is True else ""
    if typing.get_origin(kind) is typing.Literal:
        text += f" One of {', '.join(typing.get_args(kind))}."
    if isinstance(default, int | float | str) and kind is not bool:
        text += f" [default: {f'chosen; with --as-given {default}' if name in CHOSEN else default}]"
    several = name in SOURCES or kind == Texts
    annotation: Any = bool | None if kind is bool else list[str] | None if several else str | None
    option = typer.Option(flag, help=text, rich_help_panel=str(section.__doc__).rstrip("."), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def given_settings(config: Path | None, options: dict[str, Any]) -> dict[str, Any]:
    """Return what is given in the file ``config`` and as ``options``, which outrank it.

    ``--data path=0.1,name=old`` carries a weight and a name.
    """
    given = _said(options)
    if config is None:
        return given
    settings = load_yaml(config)
    if STAGES in settings:
        raise ConfigError(
            f"{config} has stages, which oomless train and oomless plan take: give settings of one of them here"
        )
    both, gives_way = outrank(settings, given)
    for weaker, stronger in gives_way.items():
        aside().print(f"{weaker} in {config} gives way to --{stronger.replace('_', '-')}", soft_wrap=True)
    return both


def given_stages(config: Path | None, options: dict[str, Any]) -> tuple[Stage, ...]:
    """Return the stages in the file ``config``, none where it has none; ``options`` outrank the settings of all of them."""
    return () if config is None else stages_of(load_yaml(config), _said(options))


def _said(options: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that are given as ``options``."""
    given = {name: value for name, value in options.items() if value is not None and value != []}
    for name in SOURCES:
        if name in given:
            given[name] = [_source(text) for text in given[name]]
    return given


def _source(text: str) -> dict[str, Any]:
    """Return the source that ``text`` means: a path, which a weight may follow as ``=0.3`` and settings as ``,name=old``."""
    given: dict[str, list[str]] = {}
    while not Path(text).exists() and (match := _SETTING.fullmatch(text)) is not None:
        text = match[1]
        given.setdefault(match[2], []).insert(0, match[3])
    settings: dict[str, Any] = {}
    for name, values in given.items():
        if len(values) > 1 and name != "exclude":
            raise ConfigError(f"{name} is given {len(values)} times for {text}: keep one")
        settings[name] = ",".join(values)
    match = _WEIGHTED.fullmatch(text)
    if match is not None and not Path(text).exists():
        if "weight" in settings:
            raise ConfigError(f"weight is given twice for {match[1]}: keep one")
        text, settings["weight"] = match[1], match[2]
    return {"path": text, **settings}


def models_to_compare(text: str | None) -> list[str]:
    """Return the models in ``a,b``."""
    names = [name.strip() for name in (text or "").split(",")]
    if len(names) > 1 and not all(names):
        raise ConfigError(f"--model compares models, such as --model a,b; got {text!r}, where a name is empty")
    return names


def gpus_to_compare(text: str | None) -> list[str]:
    """Return the GPUs in ``gpu=T4,L4``."""
    if text is None:
        return []
    name, _, values = text.partition("=")
    gpus = [value.strip() for value in values.split(",")]
    if name.strip() != "gpu" or not all(gpus):
        raise ConfigError(f"--what-if compares GPUs, such as --what-if gpu=RTX4090,L4; got {text!r}")
    return gpus


Trained = Annotated[
    Path, typer.Argument(help="The folder of a run, a checkpoint, an adapter or a model.", show_default=False)
]
OfCheckpoint = Annotated[
    str | None,
    typer.Option(
        help="Of a run: the step of a checkpoint, last, best (by evaluation) or final (that of the final model). [default: final, or last "
        "while there is none]",
        show_default=False,
    ),
]
OfBase = Annotated[
    str | None,
    typer.Option(help="The model that an adapter changes, where it is not where it was.", show_default=False),
]

OfGpu = Annotated[
    str,
    typer.Option(help="Where the model lies: auto (a GPU where there is one), cpu, cuda, cuda:1, virtual:2GiB."),
]
Prompts = Annotated[
    list[str] | None,
    typer.Option(help="The text to go on from; may be given again. - reads standard input.", show_default=False),
]


def prompts_of(given: list[str]) -> list[str]:
    """Return the texts of ``--prompt``, with standard input in place of ``-``."""
    if given.count("-") > 1:
        raise ConfigError("--prompt - reads standard input, which can be read once: give it once")
    return [sys.stdin.read() if text == "-" else text for text in given]


def require_writable(path: Path | None) -> None:
    """Check, before anything that takes long, that a file can be written to ``path``."""
    if path is None:
        return
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path} cannot be written: it is no file; name one")
    try:
        with TemporaryFile(dir=path.parent):
            pass
    except OSError as error:
        raise ConfigError(f"{path} cannot be written: {error.strerror}: name a file in a folder of yours") from error


def require_form_of_timeline(path: Path) -> None:
    """Check that a timeline can be written in the form that the name of ``path`` asks for."""
    if path.suffix not in (".html", ".png"):
        raise ConfigError(f"a timeline is written as .html or .png; got {path.name}")
    if path.suffix == ".png" and find_spec("matplotlib") is None:
        raise ConfigError(
            f"a timeline as .png needs matplotlib; got {path.name}: install oomless[plot], or name it .html"
        )
