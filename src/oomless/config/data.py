"""The text that is learnt, and how it becomes blocks of tokens."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from oomless.config.values import Count, Positive, Range, Share, coerce, kinds
from oomless.errors import ConfigError, nearest

if TYPE_CHECKING:
    from oomless.config import TrainConfig

Packing = Literal["documents", "best_fit", "concatenate"]
SOURCES = ("data", "eval_data", "general_data", "replay_data")
"""The settings that are sources of text."""

REPLAY = 0.05
BUILTIN = "builtin"
"""The source of general text that comes with oomless."""


@dataclass(frozen=True, kw_only=True, slots=True)
class DataSource:
    """One source of text."""

    path: str
    """A file, a folder (searched recursively), a glob, or a name on the Hugging Face Hub: ``hf:owner/name`` or
    ``hf:owner/name:config``."""

    weight: Positive | None = None
    """Share of the training tokens in relation to the other sources' weights. [default: its size, so that an epoch takes
    every source once]"""

    text_field: str | None = None
    """The field of its records that holds the text. [default: the run's]"""

    encoding: str | None = None
    """How its text is encoded. [default: the run's]"""

    split: str | None = None
    """Of a name on the Hub, or of a folder of splits that ``datasets`` saved, the one to read. [default: train, or the only one]"""

    revision: str | None = None
    """Of a name on the Hub, the commit, branch or tag. [default: main]"""

    exclude: str | None = None
    """Files of a folder or glob that are not read: patterns for names or paths, joined by commas, such as
    ``*.min.js,tests/*``."""

    name: str | None = None
    """What the source is called in metrics. [default: its path's last part]"""

    def __post_init__(self) -> None:
        for key, kind in kinds(DataSource).items():
            value = getattr(self, key)
            if value is not None or key == "path":
                object.__setattr__(self, key, coerce(f"{key} of a source of text", value, kind))
        _check_encoding(self.encoding)


@dataclass(frozen=True, kw_only=True)
class Data:
    """Data."""

    data: tuple[DataSource, ...]
    """Text to learn: files, folders or globs (.txt .md .html .ipynb .pdf .docx, source code, .jsonl .json .csv .parquet .arrow, each also
    .gz or .zst), folders that `datasets` saved, and names on the Hub (hf:owner/name). PATH=0.3 gives a weight; PATH,name=old,text_field=body gives more settings
    of a source."""

    eval_data: tuple[DataSource, ...] = ()
    """Text to evaluate on, instead of text held out from `data`."""

    eval_fraction: Share | None = None
    """Share of the tokens of each source held out for evaluation: whole documents, and the end of one where they are few.
    [default: 0.01, or 0 with eval_data]"""

    general_data: tuple[DataSource, ...] = ()
    """Text whose loss in every evaluation says what is forgotten; it is not learnt, and decides neither which model is best nor when the
    run ends. `builtin` is a small sample in 40 languages that comes with oomless."""

    replay_data: tuple[DataSource, ...] = ()
    """Old text that is mixed into what is learnt, against forgetting. An epoch is still one pass over `data`."""

    replay: Annotated[float, Range(above=0, below=1)] | None = None
    """Share of the training tokens that is taken from `replay_data`. [default: 0.05 with replay_data]"""

    max_eval_blocks: Count | None = None
    """Most blocks of each source in an evaluation, spread evenly over it. [default: all]"""

    max_seq_length: Annotated[int, Range(least=2)] = 1024
    """Tokens in a block."""

    packing: Packing = "documents"
    """documents: packed end to end, none attends to another; best_fit: the same, cut as little as possible, padded;
    concatenate: one plain stream, attention over whole blocks."""

    shuffle: bool = True
    """Shuffle the blocks, the same way for the same seed."""

    text_field: str | None = None
    """The field of a record (.jsonl .json .csv .tsv .parquet .arrow) that holds its text. [default: `text`, where the record is
    no chat: messages, conversations, prompt and completion, or instruction and output]"""

    deduplicate: Literal["exact", "near"] | None = None
    """Leave out documents that are the same as an earlier one of their source, or nearly so (most runs of five tokens shared,
    by MinHash; needs the extra `deduplicate`); how many is said. [default: all are kept]"""

    chat_template: str | None = None
    """How chats become text: plain (roles in words) or chatml, for base models; a file with a Jinja template; or a tokenizer's
    folder or name, whose template is taken. It is saved with the model. [default: the tokenizer's own]"""

    loss_on: Literal["assistant", "completion", "all"] | None = None
    """What is learnt of chats: the assistant's turns, the last of them alone (or what completes a prompt), or everything.
    [default: assistant]"""

    encoding: str = "utf-8"
    """How text files are encoded, such as utf-16 or windows-1252."""

    encoding_errors: Literal["strict", "replace"] = "strict"
    """What bytes are that the encoding does not know: an error that names file and offset, or replaced by U+FFFD."""

    cache_dir: str | None = None
    """Where tokenised text is kept between runs, up to 64 GiB or a quarter of the disk; what was not used for longest goes
    first. [default: `oomless/tokens` in the user's cache folder]"""


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


def _check_encoding(encoding: str | None) -> None:
    try:
        "".encode("utf-8" if encoding is None else encoding)
    except LookupError as error:
        raise ConfigError(
            f"encoding must be the name of a text encoding, such as utf-16 or windows-1252; got {encoding!r}",
            "encoding",
        ) from error


def check(run: TrainConfig) -> None:
    """Refuse what contradicts itself, and fill in what follows from the rest."""
    if not run.data:
        raise ConfigError("data is empty: name at least one file, folder or glob", "data")
    _check_encoding(run.encoding)
    for key in ("data", "replay_data"):
        given = getattr(run, key)
        without = [source.name or source.path for source in given if source.weight is None]
        if without and len(without) < len(given):
            raise ConfigError(
                f"weights are given to all sources of {key} or to none; {', '.join(without)} has none: give it one too, or take "
                "the others away to learn every source once",
                key,
            )
    for key in ("eval_data", "general_data"):
        if any(source.weight is not None for source in getattr(run, key)):
            raise ConfigError(
                f"a weight has no effect in {key}, of which each source is measured whole: remove it", key
            )
    if run.replay_data and run.replay is None:
        run.put("replay", REPLAY)
    elif run.replay is not None and not run.replay_data:
        raise ConfigError(
            f"replay: {run.replay:g} of the training tokens are to be old text: name it as replay_data, or remove replay",
            *("replay", "replay_data"),
        )
    if run.eval_fraction is None:
        run.fill("eval_fraction", 0.0 if run.eval_data else 0.01)
    elif run.eval_data and run.eval_fraction:
        raise ConfigError(
            "give eval_data or eval_fraction, not both: eval_data replaces the held-out documents",
            *("eval_data", "eval_fraction"),
        )
