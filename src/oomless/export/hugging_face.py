"""A model in the Hugging Face layout: safetensors in shards, with config and tokenizer as transformers loads them."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from functools import partial
from pathlib import Path
from typing import Any

from oomless.export.merged import Merged
from oomless.export.source import Source
from oomless.export.stream import Piece, Stream
from oomless.models import save
from oomless.models.layout import LateTensor, Savable
from oomless.models.tokenizer import load_tokenizer
from oomless.training import checkpoint


def streams(merged: Merged) -> dict[str, Stream]:
    """Return the weight files of ``merged`` by name."""
    return {name: stream(tensors) for name, tensors in save.weight_files(merged.in_files()).items()}


def stream(tensors: Mapping[str, Savable]) -> Stream:
    """Return the safetensors file of ``tensors``."""
    return Stream(save.header(tensors)[0], [_piece(name, tensor) for name, tensor in tensors.items()])


def _piece(name: str, tensor: Savable) -> Piece:
    assert isinstance(tensor, LateTensor)
    return Piece(name, tensor.numel() * tensor.element_size(), partial(_parts, tensor))


def _parts(tensor: LateTensor) -> Iterator[Any]:
    yield save.bytes_of(tensor.make())


def describe(merged: Merged, folder: Path) -> None:
    """Write what lies beside the weights of ``merged`` to ``folder``."""
    save.save_config(merged.model, folder, merged.source.base.folder)
    save.write_index(save.weight_files(merged.in_files()), folder)
    save_tokenizer(merged.source, folder)


def save_tokenizer(source: Source, folder: Path) -> None:
    """Write the tokenizer of ``source``: that of the run, or of the model that it changes."""
    checkpoint.save_tokenizer(tokenizer_of(source), folder)


def tokenizer_of(source: Source) -> Any:
    """Return the tokenizer of ``source``."""
    own = (source.folder / "tokenizer.json").is_file() or (source.folder / "tokenizer_config.json").is_file()
    place = source.folder if own else source.base.folder
    return load_tokenizer(str(place), trust_remote_code=source.base.trust_remote_code)
