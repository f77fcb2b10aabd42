"""How a setting's value is read: from YAML, the command line or Python, by the type that its field declares."""

from __future__ import annotations

import ast
import dataclasses
import inspect
import textwrap
import types
import typing
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from oomless.errors import ConfigError, nearest


@dataclass(frozen=True, kw_only=True, slots=True)
class Range:
    """The numbers that a setting may be."""

    least: float | None = None
    above: float | None = None
    below: float = float("inf")
    or_infinite: bool = False

    def __contains__(self, number: float) -> bool:
        if self.or_infinite and number == float("inf"):
            return True
        return (
            (self.least is None or number >= self.least)
            and (self.above is None or number > self.above)
            and number < self.below
        )

    def __str__(self) -> str:
        """Return it as what follows "must be"."""
        words = [
            "" if self.least is None else f"at least {self.least}",
            "" if self.above is None else f"a number above {self.above}",
            "" if self.below == float("inf") else f"below {self.below}",
        ]
        return " and ".join(word for word in words if word) or "a finite number"


Count = Annotated[int, Range(least=1)]
Positive = Annotated[float, Range(above=0)]
NotNegative = Annotated[float, Range(least=0)]
Share = Annotated[float, Range(least=0, below=1)]
Texts = tuple[str, ...]
"""One text, or several."""


def require_kind(what: str, value: object, kind: type, instead: str) -> None:
    """Check that ``value``, which Python code gives for ``what``, is of the ``kind`` that is taken; else it is told ``instead``.

    Raises:
        ConfigError: it is of another kind.
    """
    if not isinstance(value, kind):
        raise ConfigError(f"{what} must be a {kind.__name__}; got {value!r}: {instead}")


def load_yaml(path: Path) -> dict[str, Any]:
    """Return the settings in the YAML file ``path``.

    Raises:
        ConfigError: the file cannot be read, is not YAML, names a setting twice, or is not a mapping of settings.
    """
    import yaml

    try:
        text = path.read_text(encoding="utf-8")
        _refuse_duplicates(path, yaml.compose(text, yaml.SafeLoader))
        mapping = yaml.safe_load(text)
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"the config {path} cannot be read: {error}") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise ConfigError(f"the config {path} is not YAML: {error}") from error
    if not isinstance(mapping, dict):
        raise ConfigError(f"the config {path} must be a mapping of settings to values; got {type(mapping).__name__}")
    return mapping


def _refuse_duplicates(path: Path, node: Any) -> None:
    import yaml

    if isinstance(node, yaml.SequenceNode):
        for child in node.value:
            _refuse_duplicates(path, child)
    elif isinstance(node, yaml.MappingNode):
        seen: dict[str, int] = {}
        for key, child in node.value:
            name, line = str(key.value), key.start_mark.line + 1
            if name in seen:
                raise ConfigError(f"the config {path} gives {name} twice, in lines {seen[name]} and {line}: keep one")
            seen[name] = line
            _refuse_duplicates(path, child)


@cache
def field_help(cls: type) -> dict[str, str]:
    """Return the docstring under each field of the dataclass ``cls`` and of those that it is made of."""
    found: dict[str, str] = {}
    for part in reversed(cls.__mro__):
        if not dataclasses.is_dataclass(part):
            continue
        body = typing.cast(ast.ClassDef, ast.parse(textwrap.dedent(inspect.getsource(part))).body[0]).body
        found |= {
            field.target.id: inspect.cleandoc(doc.value.value).replace("\n", " ")
            for field, doc in zip(body, body[1:], strict=False)
            if isinstance(field, ast.AnnAssign)
            and isinstance(field.target, ast.Name)
            and isinstance(doc, ast.Expr)
            and isinstance(doc.value, ast.Constant)
            and isinstance(doc.value.value, str)
        }
    return found


@cache
def kinds(cls: type) -> dict[str, Any]:
    """Return the type of each field of the dataclass ``cls``, with its range where it has one and without ``None``."""
    return {name: _without_none(kind) for name, kind in typing.get_type_hints(cls, include_extras=True).items()}


def plain_kind(kind: Any) -> Any:
    """Return the type ``kind`` without its range."""
    return typing.get_args(kind)[0] if typing.get_origin(kind) is Annotated else kind


def _without_none(kind: Any) -> Any:
    if typing.get_origin(kind) not in (types.UnionType, typing.Union):
        return kind
    (kind,) = (option for option in typing.get_args(kind) if option is not types.NoneType)
    return kind


def coerce(key: str, value: Any, kind: Any) -> Any:
    """Return ``value`` as ``kind``, one of ``kinds``.

    The command line gives text, and so does YAML for ``2e-5``; YAML gives numbers where ``2024`` is a folder or ``5`` a row.

    Raises:
        ConfigError: it is nothing of this kind, or not in its range.
    """
    limits = next((extra for extra in getattr(kind, "__metadata__", ()) if isinstance(extra, Range)), None)
    kind = plain_kind(kind)
    if typing.get_origin(kind) is Literal:
        choices = typing.get_args(kind)
        if value not in choices:
            raise ConfigError(
                f"{key} must be one of {', '.join(choices)}; got {value!r}.{nearest(str(value), choices)}"
            )
        return value
    if kind == Texts:
        several = value if isinstance(value, list | tuple) else [value]
        if not several:
            raise ConfigError(f"{key} is empty: give a value, or leave {key} out")
        return tuple(coerce(key, one, str) for one in several)
    read = _READERS[kind](value)
    if read is None:
        raise ConfigError(f"{key} must be {_KIND_NAMES[kind]}; got {value!r}")
    if kind is str and not read.strip():
        raise ConfigError(f"{key} is empty: give a value, or leave {key} out")
    if limits is not None and read not in limits:
        raise ConfigError(f"{key} must be {limits}; got {value}")
    return read


def _read_number(value: Any) -> float | None:
    try:
        return float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else None
    except (ValueError, OverflowError):
        return None


def _read_whole(value: Any) -> int | None:
    if isinstance(value, int) and not isinstance(value, bool):
        return value
    if isinstance(value, str):
        with suppress(ValueError):
            return int(value)
    number = _read_number(value)
    return int(number) if number is not None and number.is_integer() else None


def _read_text(value: Any) -> str | None:
    if isinstance(value, str | Path) or (isinstance(value, int) and not isinstance(value, bool)):
        return str(value)
    return None


_READERS: dict[Any, Any] = {
    int: _read_whole,
    float: _read_number,
    bool: lambda value: value if isinstance(value, bool) else None,
    str: _read_text,
}
_KIND_NAMES = {int: "a whole number", float: "a number", bool: "true or false", str: "text"}
