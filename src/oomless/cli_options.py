"""One command-line option for each setting of ``TrainConfig``, and what was given of them."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from oomless.config import SECTIONS, TrainConfig
from oomless.config.values import field_help, kinds, plain_kind
from oomless.errors import ConfigError
from oomless.units import parse_bytes

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
        text += f" [default: {default}]"
    annotation: Any = bool | None if kind is bool else list[str] | None if name in ("data", "eval_data") else str | None
    option = typer.Option(flag, help=text, rich_help_panel=str(section.__doc__).rstrip("."), show_default=False)
    return inspect.Parameter(
        name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[annotation, option]
    )


def given_settings(settings: dict[str, Any]) -> dict[str, Any]:
    """Return the settings that were given on the command line; ``--data path=0.1,name=old`` carries a weight and a name."""
    given = {name: value for name, value in settings.items() if value is not None and value != []}
    for name in ("data", "eval_data"):
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


def gpus_to_compare(text: str | None) -> list[str]:
    """Return the GPUs in ``gpu=T4,L4``."""
    if text is None:
        return []
    name, _, values = text.partition("=")
    if name.strip() != "gpu" or not values:
        raise ConfigError(f"--what-if compares GPUs, such as --what-if gpu=RTX4090,L4; got {text!r}")
    return [value.strip() for value in values.split(",")]


def host_size(text: str | None) -> int | None:
    """Return the bytes of ``--host-memory``."""
    if text is None:
        return None
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--host-memory: {error}") from error
