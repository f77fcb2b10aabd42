"""The model with rows for new tokens, as a folder like any other: its config, its tokenizer, the weights that grew, and links to the rest.

The row of a new token, in each matrix that has one for each token, is the mean of the rows of the old tokens that it stands for, which
keeps what the model knows of them (Hewitt, "Initializing New Word Embeddings for Pretrained Language Models", 2021, on why not by
chance; the mean of the pieces is what Gee et al., "Fast Vocabulary Transfer", 2022, take). Rows without a token are the mean of all.
"""

from __future__ import annotations

import copy
import json
import math
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import layout
from oomless.models.make import without_memory
from oomless.models.save import durable, write_safetensors
from oomless.models.spec import ModelSpec
from oomless.models.weights import Weights, open_file, weight_files
from oomless.vocabulary.learn import Word

MULTIPLE = 128
"""The number of rows stays a multiple of the largest power of two up to this of which it was one."""
_BESIDE = ("generation_config.json", "*processor*config.json", "*.py", "LICENSE*")
"""What goes along; not a tokenizer in another form than tokenizer.json, which has no new token."""


def rows_for(spec: ModelSpec, last: int) -> int:
    """Return how many rows the model of ``spec`` has for tokens up to ``last``."""
    rows = int(spec.config.get_text_config().vocab_size)
    multiple = math.gcd(rows, MULTIPLE)
    return max(rows, -(-(last + 1) // multiple) * multiple)


def shapes_that_grow(spec: ModelSpec, rows: int) -> dict[str, tuple[int, ...]]:
    """Return the parameters of the model that have other shapes with ``rows`` for tokens, by name, tied ones once, as they are.

    Raises:
        ModelError: one does not grow by rows.
    """
    old, new = (
        {name: tuple(tensor.shape) for name, tensor in _tensors(_on_meta(spec, config)).items()}
        for config in (spec.config, config_with(spec, rows))
    )
    changed = {name: shape for name, shape in old.items() if new.get(name) != shape}
    for name, shape in changed.items():
        if name not in new or new[name] != (rows, *shape[1:]):
            raise ModelError(
                f"{name} of {spec.name} does not have a row for each token: its tokenizer cannot be extended"
            )
    return changed


def more_bytes(spec: ModelSpec, rows: int) -> int:
    """Return what the rows that are added to the model of ``spec`` take as weights, in the dtype of its config."""
    held = int(spec.config.get_text_config().vocab_size)
    dtype = getattr(spec.config, "dtype", None) or torch.bfloat16
    grown = sum(math.prod(shape) // held for shape in shapes_that_grow(spec, rows).values())
    return grown * (rows - held) * dtype.itemsize


def stamp(spec: ModelSpec) -> list[tuple[str, int, int]]:
    """Return what tells the weights of ``spec`` from others."""
    files = [] if spec.folder is None else weight_files(spec.folder)
    return [(path.name, path.stat().st_size, path.stat().st_mtime_ns) for path in files]


def config_with(spec: ModelSpec, rows: int) -> Any:
    """Return the config of ``spec`` with so many ``rows``."""
    config = copy.deepcopy(spec.config)
    config.get_text_config().vocab_size = rows
    return config


def _config_file(spec: ModelSpec, rows: int) -> dict[str, Any]:
    """Return the config.json of ``spec`` with so many ``rows``, and all else as it is."""
    assert spec.folder is not None
    config = spec.config
    said: dict[str, Any] = json.loads((spec.folder / "config.json").read_text(encoding="utf-8"))
    of_text = config.get_text_config()
    parts = [name for name in getattr(config, "sub_configs", {}) if getattr(config, name, None) is of_text]
    place = said if of_text is config or not parts else said.setdefault(parts[0], {})
    place["vocab_size"] = rows
    return said


def write(spec: ModelSpec, rows: int, first: int, pieces: Sequence[Word], folder: Path) -> None:
    """Write the model of ``spec`` with ``rows`` to ``folder``, those from ``first`` on made of ``pieces``; all but its tokenizer.

    Raises:
        ModelError: its weights are missing or damaged.
    """
    if spec.folder is None:
        raise ModelError(f"{spec.name} is a config without weights: training needs a folder with safetensors weights")
    for path in sorted(path for pattern in _BESIDE for path in spec.folder.glob(pattern) if path.is_file()):
        shutil.copyfile(path, folder / path.name)
    with durable(folder / "config.json", "w") as file:
        json.dump(_config_file(spec, rows), file, indent=2)
    model = _on_meta(spec, spec.config)
    names = shapes_that_grow(spec, rows)
    weights = Weights(spec.folder, model, list(names), Device())
    setattr(model, layout.NAMES, weights.names_in_files)
    grown: dict[str, Tensor] = {name: _grown(weights.read(name), rows, first, pieces) for name in weights.names}
    files = weight_files(spec.folder)
    places: dict[str, str] = {}
    for number, path in enumerate(files, start=1):
        link = folder / _shard(number, len(files) + 1, path.suffix)
        link.symlink_to(path.resolve())
        places |= dict.fromkeys(open_file(path).keys(), link.name)
    last = _shard(len(files) + 1, len(files) + 1, ".safetensors")  # of two files that hold a tensor, the later counts
    stored = layout.in_files(model, grown, Device())
    write_safetensors(folder / last, stored, Device())
    with durable(folder / "model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {}, "weight_map": places | dict.fromkeys(stored, last)}, file, indent=2)


def _shard(number: int, count: int, suffix: str) -> str:
    return f"model-{number:05d}-of-{count:05d}{suffix}"


def _on_meta(spec: ModelSpec, config: Any) -> Any:
    return without_memory(config, trust_remote_code=spec.trust_remote_code)


def _tensors(model: Any) -> Mapping[str, Tensor]:
    return dict([*model.named_parameters(), *model.named_buffers()])


def _grown(tensor: Tensor, rows: int, first: int, pieces: Sequence[Word]) -> Tensor:
    grown = tensor.new_empty((rows, *tensor.shape[1:]))
    grown[: len(tensor)] = tensor
    grown[len(tensor) :] = tensor.mean(0, dtype=torch.float32)
    for number, ids in enumerate(pieces, start=first):
        if ids:
            grown[number] = tensor[list(ids)].mean(0, dtype=torch.float32)
    return grown
