"""What the form of a plan offers: known models and those in the folders given, GPUs, and the choices of settings."""

from __future__ import annotations

import os
import typing
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from oomless import catalogue
from oomless.config import TrainConfig
from oomless.config.values import field_help, kinds, plain_kind
from oomless.errors import ConfigError
from oomless.planning.strategies import OPTIMIZER_NAMES, PARTS, PREFERENCES
from oomless.units import GiB, format_bytes, short

DEEPEST = 6
"""So many folders below one that was given what is looked for may lie."""

MOST_FOLDERS = 5_000
LENGTHS = [str(1 << power) for power in range(8, 18)]
"""Lengths in tokens at which a slider stops."""

SETTINGS = (
    *("max_seq_length", "trainable", "tokens_per_step", "quantization", "optimizer", "weight_precision", "dtype"),
    "extend_tokenizer",
)
"""Settings that the form has a field for, beside the model and the GPU."""


def folders_below(top: Path) -> Iterator[tuple[Path, list[str], list[str]]]:
    """Yield the folders in ``top`` with the names of what lies in each; links are not followed, nor what is taken from the first list.

    Raises:
        ConfigError: there are too many.
    """
    for looked, (place, folders, files) in enumerate(os.walk(top)):
        path = Path(place)
        if looked >= MOST_FOLDERS:
            raise ConfigError(
                f"{top} has more than {MOST_FOLDERS:,} folders: start oomless studio with one that holds runs"
            )
        deep = len(path.relative_to(top).parts) >= DEEPEST
        folders[:] = [] if deep else sorted(name for name in folders if not name.startswith("."))
        yield path, folders, files


def offers(tops: Sequence[Path]) -> dict[str, Any]:
    """Return what may be chosen, each with what is said of it."""
    known = {
        spelling: short(catalogue.parameters(name))
        for name in catalogue.models()
        for spelling in (name, *catalogue.model(name).also)
    }
    lie = {str(path): "a folder" for top in tops for path in _models(top)}
    texts = field_help(TrainConfig)
    return {
        "model": {**lie, **dict(sorted(known.items(), key=lambda item: item[0].lower()))},
        "gpu": {gpu.name: format_bytes(gpu.usable_bytes) for gpu in catalogue.gpus()},
        "gpus_by_memory": _by_memory(),
        "lengths": LENGTHS,
        "usual_length": str(TrainConfig.max_seq_length),
        "prefer": dict.fromkeys(PREFERENCES, ""),
        "trainable": dict.fromkeys(PARTS, ""),
        "optimizer": OPTIMIZER_NAMES,
        **{name: _values(name) for name in SETTINGS if typing.get_args(plain_kind(kinds(TrainConfig)[name]))},
        "help": {name: texts[name] for name in ("model", *SETTINGS)},
    }


def _by_memory() -> list[str]:
    """Return the GPUs of which each has another number of GiB, the smallest first."""
    sizes: dict[int, str] = {}
    for gpu in sorted(catalogue.gpus(), key=lambda gpu: gpu.usable_bytes):
        sizes.setdefault(round(gpu.usable_bytes / GiB), gpu.name)
    return [*sizes.values()]


def _values(name: str) -> dict[str, str]:
    return {str(value): "" for value in typing.get_args(plain_kind(kinds(TrainConfig)[name]))}


def _models(top: Path) -> Iterator[Path]:
    for path, folders, files in folders_below(top):
        if "config.json" in files and not (path / "config.json").is_symlink():
            yield path
            folders.clear()
        folders[:] = [name for name in folders if not name.startswith("checkpoint-")]
