"""Frozen tables of embeddings in pinned host memory: only the rows of a pass's tokens come to the GPU.

Saves: every frozen table that tokens are looked up in and that is not the head's matrix too, such as 1.0 GiB of Llama 3.1 8B or the
4.4 GiB of embeddings for each layer of Gemma 3n E4B, in 16 bits. Costs: as much pinned host memory, the rows of a pass's tokens over
the bus, and the host waits for their ids at the beginning of each pass. Of several GPUs each has all of it on its host.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ConfigError
from oomless.memory.device import Device


class HostEmbedding(nn.Module):
    """``table``, an embedding on the meta device, whose rows lie on the host and are looked up there, as its class does it."""

    form = "on the host"
    pieces = (None,)
    """A table comes from the files in one piece."""

    def __init__(self, table: nn.Embedding, device: Device) -> None:
        super().__init__()
        self.shape: tuple[int, int] = (table.num_embeddings, table.embedding_dim)
        self.on_host = device
        empty = table.weight.detach()
        del table.weight
        table.weight = empty
        self.table = table

    @property
    def weight(self) -> Tensor:
        """The table, [V, D]; on the host."""
        return self.table.weight

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, piece: None = None) -> None:
        """Store ``host``, the table as the file has it, in ``dtype``; ``None`` rehearses it, of no particular values."""
        with device.host():
            rows = torch.empty(self.shape, dtype=dtype) if host is None else host.to(dtype)
        self.table.weight = device.pinned_like(rows)
        with device.host():
            self.table.weight.copy_(rows)
        for name, buffer in self.table.named_buffers():
            self.table.register_buffer(name, device.fetch(buffer), persistent=False)

    def forward(self, ids: Tensor) -> Tensor:  # noqa: D102
        with self.on_host.host():
            rows = self.table(self.on_host.fetch(ids))
        return self.on_host.put(rows)


def tables(model: Any, trained: list[nn.Module]) -> Iterator[tuple[str, nn.Embedding]]:
    """Yield the names and tables of ``model`` that tokens are looked up in and nothing else needs; ``trained`` are left out."""
    kept = {child for module in trained for child in module.modules()}
    vocabulary = model.get_input_embeddings().weight.shape[0]
    head = model.get_output_embeddings()
    for name, module in model.named_modules():
        of_tokens = isinstance(module, nn.Embedding) and 2 * module.num_embeddings >= vocabulary
        if of_tokens and module not in kept and (head is None or module.weight is not head.weight):
            yield name, module


def replace(model: Any, device: Device, trained: list[nn.Module]) -> None:
    """Have the frozen tables of ``model``, which is on the meta device, on the host beside ``device``.

    Raises:
        ConfigError: the device is the plain CPU, or there is no such table.
    """
    if device.capacity_bytes is None:
        raise ConfigError("embeddings_on_host has no effect on a CPU, whose memory is the host's; remove it")
    found = list(tables(model, trained))
    if not found:
        raise ConfigError(
            "embeddings_on_host has no effect: the embeddings of this model train, or are one matrix with lm_head in its files, which "
            "the GPU needs whole; remove it"
        )
    for name, table in found:
        model.set_submodule(name, HostEmbedding(table, device))
