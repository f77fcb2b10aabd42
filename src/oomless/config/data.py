"""The text that is learnt, and how it becomes blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oomless.config.values import Positive, Range, Share, coerce, kinds
from oomless.errors import ConfigError, nearest

if TYPE_CHECKING:
    from oomless.config import TrainConfig

Packing = Literal["documents", "best_fit", "concatenate"]


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One source of text."""

    path: str
    """A file, a folder (searched recursively) or a glob."""

    weight: Positive | None = None
    """Share of the training tokens in relation to the other sources' weights. [default: its size, so that an epoch takes
    every source once]"""

    text_field: str = "text"
    """The field of a ``.jsonl`` or ``.parquet`` record that holds the text."""

    name: str | None = None
    """What the source is called in metrics; by default its path's last part."""

    def __post_init__(self) -> None:
        for key, kind in kinds(DataSource).items():
            value = getattr(self, key)
            if value is not None or key in ("path", "text_field"):
                object.__setattr__(self, key, coerce(f"{key} of a source of text", value, kind))


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data."""

    data: tuple[DataSource, ...]
    """Text to learn: files, folders or globs (.txt .md, source code, .jsonl, .parquet, each also .gz or .zst)."""

    eval_data: tuple[DataSource, ...] = ()
    """Text to evaluate on, instead of text held out from `data`."""

    eval_fraction: Share | None = None
    """Share of the tokens of each source held out for evaluation: whole documents, and the end of one where they are few.
    [default: 0.01, or 0 with eval_data]"""

    max_seq_length: Annotated[int, Range(least=2)] = 1024
    """Tokens in a block."""

    packing: Packing = "documents"
    """documents: packed end to end, none attends to another; best_fit: the same, cut as little as possible, padded;
    concatenate: one plain stream, attention over whole blocks."""

    shuffle: bool = True
    """Shuffle the blocks, the same way for the same seed."""

    encoding_errors: Literal["strict", "replace"] = "strict"
    """What invalid UTF-8 is: an error that names file and offset, or replaced by U+FFFD."""

    cache_dir: str | None = None
    """Where tokenised text is kept between runs. [default: `token-cache` in output_dir]"""


def sources(key: str, value: Any) -> tuple[DataSource, ...]:
    """Return the sources of text that ``value`` means: a path, a mapping with a path, or several of either.

    Raises:
        ConfigError: it is none of these.
    """
    found = []
    for item in value if isinstance(value, list | tuple) else [value]:
        if isinstance(item, DataSource):
            found.append(item)
            continue
        mapping = {"path": str(item)} if isinstance(item, str | Path) else item
        if not isinstance(mapping, dict) or not isinstance(mapping.get("path"), str | Path):
            raise ConfigError(f"each entry of {key} is a path or a mapping with a path; got {item!r}")
        for name in mapping:
            if name not in kinds(DataSource):
                raise ConfigError(f"unknown setting {name!r} in {key}.{nearest(str(name), kinds(DataSource))}")
        found.append(DataSource(**{name: entry for name, entry in mapping.items() if entry is not None}))
    return tuple(found)


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself, and fill in what follows from the rest."""
    if not run.data:
        raise ConfigError("data is empty: name at least one file, folder or glob", "data")
    if run.eval_fraction is None:
        run.fill("eval_fraction", 0.0 if run.eval_data else 0.01)
    elif run.eval_data and run.eval_fraction:
        raise ConfigError(
            "give eval_data or eval_fraction, not both: eval_data replaces the held-out documents",
            *("eval_data", "eval_fraction"),
        )
