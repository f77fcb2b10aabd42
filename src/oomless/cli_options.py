"""One command-line option for each setting of ``TrainConfig``, and what was given of them."""

from __future__ import annotations

import inspect
import re
import typing
from pathlib import Path
from typing import Annotated, Any

import typer

from oomless.config import TrainConfig
from oomless.config_values import field_help, without_none
from oomless.errors import ConfigError
from oomless.units import parse_bytes

_PANELS = {
    "Model and data": ("model", "cache_dir"),
    "What trains": ("trainable", "use_dora"),
    "Batch and length": ("per_device_train_batch_size", "max_tokens"),
    "Optimizer": ("optimizer", "momentum"),
    "Precision and memory": ("dtype", "loss_chunk_bytes"),
    "Running": ("seed", "tensorboard"),
}
_WEIGHTED = re.compile(r"(.+)=(\d+(?:\.\d+)?)")


def options() -> list[inspect.Parameter]:
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


def given_settings(settings: dict[str, Any]) -> dict[str, Any]:
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
