"""Frozen linear layers in 4 bits (QLoRA, Dettmers et al. 2023) or 8, quantised while they are loaded.

Saves: 12 or 8 of the 16 bits of every frozen weight. Costs: the rounding, which no training undoes, and the unpacking of
every weight in forward and backward. Each weight is quantised as it comes from the file, so neither host nor device ever
holds more than the quantised model and one weight. Saved models hold the weights of the file, not the rounded ones.

Quantised are the linear layers of the body that do not train, and experts (``experts.py``); embeddings, norms, routers and
``lm_head`` are not. Not for ``trainable: full``, which freezes nothing.

``mxfp4`` rounds nothing: it is for checkpoints whose experts are in that form, which keep it; linear layers stay as they are.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.memory.tracker import import_unbooked
from oomless.ops import packing_shapes
from oomless.ops.frozen_linear import Quantization, RowLayout, new_code
from oomless.techniques import experts, frozen_layers
from oomless.techniques.experts import FrozenExperts
from oomless.techniques.frozen_layers import FrozenLinear
from oomless.techniques.peers import Peers


class QuantizedLinear(FrozenLinear):
    """A frozen linear layer whose weight lies in few bits, or of ``peers`` each one's part of it."""

    def __init__(self, layer: nn.Linear | Conv1D, kind: Quantization, peers: Peers | None = None) -> None:
        super().__init__(layer)
        self.kind: Quantization = kind
        self.form = kind
        self.peers = peers
        self.layout = RowLayout(self.shape, kind, layer.weight.dtype, apart=True)
        self.values: Tensor
        self.scales: Tensor
        for name, whole in zip(("values", "scales"), self.layout.sizes, strict=True):
            size = whole if peers is None else peers.part(whole)
            self.register_buffer(name, torch.empty(size, dtype=torch.uint8, device="meta"))
        self.code = torch.empty(0)

    @property
    def own_rows(self) -> list[Tensor]:
        """What this process keeps of each row of bytes where each of several keeps a part."""
        return [self.values, self.scales]

    @property
    def whole_sizes(self) -> list[int]:
        """The bytes of each whole row."""
        return self.layout.sizes

    def unpack_stored(self, dtype: torch.dtype) -> Tensor:  # noqa: D102
        rows = self.own_rows if self.peers is None else self.peers.whole(self)
        return self.layout.unpack(rows, dtype, self.code)

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, piece: None = None) -> None:  # noqa: D102
        if host is None:
            weight = torch.empty(self.shape, dtype=dtype, device=device.torch_device)
        else:
            weight = device.put(host, dtype)
        if self.peers is None:
            self.layout.write(weight, self.own_rows, self.code)
            return
        rows = [torch.empty(size, dtype=torch.uint8, device=device.torch_device) for size in self.whole_sizes]
        self.layout.write(weight, rows, self.code)
        for row, own in zip(rows, self.own_rows, strict=True):
            self.peers.keep(row, own)


def missing(kind: str | None) -> str | None:
    """Return the command that installs what training in the form ``kind`` needs and is not here; a plan does without."""
    if kind is None or kind == "mxfp4":
        return None
    try:
        import_unbooked("bitsandbytes")
    except ImportError:
        return "pip install 'bitsandbytes>=0.46'"
    return None


def replace(
    model: Any,
    kind: Quantization,
    trained: list[nn.Module],
    *,
    rehearsed: bool = False,
    peers: Peers | None = None,
) -> None:
    """Put quantised layers, still empty and on the meta device, in the place of those linear ones that do not train.

    Args:
        model: on the meta device.
        kind: how they are stored.
        trained: the modules that train, each with everything inside it.
        rehearsed: shapes are all that will be asked of the layers.
        peers: of whom each keeps a part of every weight; by default all of it is here.

    Raises:
        ConfigError: bitsandbytes is missing, there is nothing to quantise, or most of the body would stay as it is.
    """
    if kind == "mxfp4":
        experts.replace(model, kind, None, {child for module in trained for child in module.modules()}, peers)
        if not any(isinstance(module, FrozenExperts) for module in model.modules()):
            raise ConfigError(
                "quantization mxfp4 has no effect: this model has no frozen experts; remove it, or use nf4"
            )
        return
    command = missing(kind)
    if command is not None and rehearsed:
        packing_shapes.define()
    elif command is not None:
        raise ConfigError(f"to train with quantization bitsandbytes is needed, and is not here: {command}")
    frozen_layers.replace(
        model,
        lambda layer: QuantizedLinear(layer, kind, peers),
        trained,
        key="quantization",
        kind=kind,
        peers=peers,
    )


def prepare(model: Any, device: Device) -> None:
    """Give the quantised layers and experts of ``model``, now allocated, the one code that they share."""
    layers: list[QuantizedLinear | FrozenExperts] = []
    for module in model.modules():
        if isinstance(module, QuantizedLinear) or (isinstance(module, FrozenExperts) and module.kind is not None):
            layers.append(module)
    if not layers or layers[0].kind is None:
        return
    with device.host():
        host = new_code(layers[0].kind)
    code = device.put(host)
    for layer in layers:
        layer.code = code
    device.label([code], "quantisation")
