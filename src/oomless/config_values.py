"""Settings in files, on the command line and in docstrings: how they are read; and a source of text, which files list."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal

from oomless.errors import ConfigError, nearest


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in the YAML file ``path``.

    Raises:
        ConfigError: the file cannot be read, is not YAML, or is not a mapping of settings.
    """
    import yaml

    try:
        mapping = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config {path} cannot be read: {error}") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"the config {path} is not YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"the config {path} must be a mapping of settings to values; got {type(mapping).__name__}")
    return mapping


@cache
def field_help(cls: type) -> dict[str, str]:
    """Return the docstring under each field of the dataclass ``cls``."""
    body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(cls))).body[0]).body
    return {
        field.target.id: inspect.cleandoc(doc.value.value).replace("\n", " ")
        for field, doc in zip(body, body[1:], strict=False)
        if isinstance(field, ast.AnnAssign)
        and isinstance(field.target, ast.Name)
        and isinstance(doc, ast.Expr)
        and isinstance(doc.value, ast.Constant)
        and isinstance(doc.value.value, str)
    }


def without_none(kind: Any) -> Any:
    """Return ``X`` for the annotation ``X | None``, and any other annotation as it is."""
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
    return kind


def coerce(key: str, value: Any, kind: Any) -> Any:
    """Return ``value`` as ``kind``; YAML's ``2e-5`` is a string and its ``3`` an int where a float is meant."""
    kind = without_none(kind)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}; got {value!r}.{nearest(str(value), choices)}"
            )
        return value
    if kind is float and isinstance(value, int | str) and not isinstance(value, bool):
        try:
            return float(value)
        except ValueError:
            pass
    if kind is int and isinstance(value, float) and value.is_integer():
        return int(value)
    if type(value) is not kind:
        raise ConfigError(f"{key} must be {_KIND_NAMES[kind]}; got {value!r}")
    return value


_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One source of text."""

    path: str
    """A file, a folder (searched recursively) or a glob."""

    weight: float | None = None
    """Share of the training tokens in relation to the other sources' weights. [default: its size, so that an epoch takes
    every source once]"""

    text_field: str = "text"
    """The field of a ``.jsonl`` or ``.parquet`` record that holds the text."""

    name: str | None = None
    """What the source is called in metrics; by default its path's last part."""

    def __post_init__(self) -> None:
        if self.weight is not None and not 0 < self.weight < float("inf"):
            raise ConfigError(f"a data source's weight must be above 0; got {self.weight} for {self.path}")


def sources(key: str, value: Any) -> tuple[DataSource, ...]:
    """Return the sources of text that ``value`` means: a path, a mapping with a path, or several of either."""
    known = [field.name for field in dataclasses.fields(DataSource)]
    found = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, DataSource):
            found.append(item)
            continue
        mapping = {"path": item} if isinstance(item, str) else item
        if not isinstance(mapping, dict) or not isinstance(mapping.get("path"), str):
            raise ConfigError(f"each entry of {key} is a path or a mapping with a path; got {item!r}")
        for name in mapping:
            if name not in known:
                raise ConfigError(f"unknown setting {name!r} in {key}.{nearest(str(name), known)}")
        kinds = typing.get_type_hints(DataSource)
        found.append(DataSource(**{name: coerce(name, entry, kinds[name]) for name, entry in mapping.items()}))
    return tuple(found)
