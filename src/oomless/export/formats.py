"""The forms in which a model leaves: which files each consists of."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from oomless.errors import ConfigError
from oomless.export import hugging_face
from oomless.export.merged import Merged
from oomless.export.source import Source
from oomless.export.stream import Stream
from oomless.models import build
from oomless.models.layout import LateTensor
from oomless.models.weights import adapter_file, open_file
from oomless.training.precision import DTYPES

To = Literal["safetensors", "adapter", "gguf"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Files:
    """What an export consists of."""

    streams: Mapping[str, Stream]
    """The large files by name."""

    describe: Callable[[Path], None]
    """Writes what lies beside them."""

    dtype: str
    """What the numbers are, to a person."""

    parameters: int
    """How many numbers the whole model has."""

    loads: bool = True
    """Whether the library that is asked reads this form of this architecture."""

    notes: tuple[str, ...] = ()
    """What the reader of this form does otherwise."""

    config: Any = None
    """With what transformers reads a GGUF file, of which it takes less than it holds."""


def files(source: Source, to: To, dtype: str | None, quantize: str | None) -> Files:
    """Return the files of ``source`` in the form ``to``.

    Raises:
        ConfigError: what is asked contradicts itself or the source.
        ModelError: the source is damaged, or of an architecture that the form has no place for.
    """
    if quantize is not None and to != "gguf":
        raise ConfigError(f"--quantize is for --to gguf; got --to {to}: leave it out")
    if to == "adapter":
        return _adapter(source, None if dtype is None else DTYPES[dtype])
    if to == "gguf":
        from oomless.export import gguf

        return gguf.files(source, dtype, quantize)
    merged = Merged(source, None if dtype is None else DTYPES[dtype])
    return Files(
        streams=hugging_face.streams(merged),
        describe=partial(hugging_face.describe, merged),
        dtype=str(merged.dtype).removeprefix("torch."),
        parameters=build.parameter_count(source.base),
    )


def _adapter(source: Source, dtype: torch.dtype | None) -> Files:
    if source.kind != "adapter":
        how = "trained whole matrices" if source.run is not None else "is no adapter"
        raise ConfigError(f"{source.folder} {how}, so there is no adapter to export: use --to safetensors")
    if not source.adapter.get("lora_bias"):  # which may be one that cannot be merged
        Merged(source)  # is of this base
    path = adapter_file(source.folder)
    kept = open_file(path)
    tensors = {name: _late(path, name, kept.get_tensor(name), dtype) for name in sorted(kept.keys())}
    settings = dict(source.adapter)

    def describe(folder: Path) -> None:
        settings["base_model_name_or_path"] = source.base.config._name_or_path
        (folder / "adapter_config.json").write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")
        hugging_face.save_tokenizer(source, folder)

    found = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors.values()})
    return Files(
        streams={"adapter_model.safetensors": hugging_face.stream(tensors)},
        describe=describe,
        dtype=", ".join(found),
        parameters=build.parameter_count(source.base),
    )


def _late(path: Path, name: str, tensor: Tensor, dtype: torch.dtype | None) -> LateTensor:
    wanted = dtype if dtype is not None and tensor.is_floating_point() else tensor.dtype

    def make() -> Any:
        return open_file(path).get_tensor(name).to(wanted).contiguous()

    return LateTensor(tuple(tensor.shape), wanted, make)
