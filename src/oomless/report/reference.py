"""``docs/reference.md``, made from the settings' own docstrings so that the two cannot differ."""

from __future__ import annotations

import typing

from oomless.config import DataSource, TrainConfig
from oomless.config.values import Texts, field_help, kinds, plain_kind


def reference() -> str:
    """Return the page of settings as Markdown."""
    lines = [
        "# Settings",
        "",
        "Every setting is a key of the YAML file that `--config` reads and an option of `oomless train`",
        "(`max_seq_length` is `--max-seq-length`; underscores work too). Options outrank the file. A setting that would",
        "have no effect is an error. This page is made by `scripts/reference`.",
        "",
        *_table(TrainConfig),
        "",
        "## A source of text",
        "",
        "An entry of `data` or `eval_data` is a path, or a mapping of these. On the command line `--data path=0.1` gives a",
        "weight.",
        "",
        *_table(DataSource),
        "",
    ]
    return "\n".join(lines)


def _table(cls: type) -> list[str]:
    types, texts = kinds(cls), field_help(cls)
    rows = ["| setting | values | default | meaning |", "| --- | --- | --- | --- |"]
    for name, field in cls.__dataclass_fields__.items():  # type: ignore[attr-defined]
        text = texts[name].replace("|", "\\|")
        text, _, stated = text.partition(" [default: ")
        default = stated.rstrip("]") or ("" if field.default is None else _shown(field.default))
        rows.append(f"| `{name}` | {_values(plain_kind(types[name]))} | {default} | {text} |")
    return rows


def _shown(default: object) -> str:
    return (
        ""
        if not isinstance(default, bool | int | float | str)
        else str(default).lower()
        if isinstance(default, bool)
        else str(default)
    )


def _values(kind: object) -> str:
    if typing.get_origin(kind) is typing.Literal:
        return ", ".join(map(str, typing.get_args(kind)))
    names: dict[object, str] = {str: "text", Texts: "text, or a list of texts", int: "whole number", float: "number"}
    return {**names, bool: "true, false"}.get(kind, "list of sources")


if __name__ == "__main__":
    print(reference(), end="")
