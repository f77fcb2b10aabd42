"""Layers, experts and tables whose frozen weights are stored in another form (``quantization``) or elsewhere (``stream_frozen``).

What they share: which of them may be replaced, that their weights come from the files one at a time, and that saved models
hold the weights of the files.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.frozen_linear import Quantization, frozen_linear
from oomless.techniques import experts, tied_layers
from oomless.techniques.embeddings_on_host import HostEmbedding
from oomless.techniques.experts import FrozenExperts
from oomless.techniques.kinds import body_of, is_linear, kind_of, owner_using_weight
from oomless.techniques.peers import Peers


class FrozenLinear(nn.Linear):
    """A frozen linear layer without a ``weight``: made of ``layer``, which is on the meta device and may be GPT-2's ``Conv1D``."""

    form: str
    on_host: Device | None = None
    """Beside which device the weight lies on the host, if it does."""

    pieces = (None,)
    """A weight comes from the files in one piece; experts come one by one."""

    def __init__(self, layer: nn.Linear | Conv1D) -> None:
        nn.Module.__init__(self)
        self.transposed = isinstance(layer, Conv1D)
        rows, columns = layer.weight.shape
        self.shape: tuple[int, int] = (rows, columns)
        """Of the weight as the files have it: [out, in], or [in, out] where it is ``transposed``."""

        self.out_features, self.in_features = (columns, rows) if self.transposed else (rows, columns)
        self.register_parameter("weight", None)
        self.register_parameter("bias", layer.bias)
        self._is_hf_initialized = True

    @property
    def qweight(self) -> Tensor:
        """What has the device of the weight, under the name by which peft looks for it."""
        for buffer in self.buffers():
            return buffer
        return torch.empty(0)

    def unpack(self, dtype: torch.dtype) -> Tensor:
        """Return the weight, [out, in], in ``dtype`` on the device, to be dropped after the product."""
        stored = self.unpack_stored(dtype)
        return stored.t() if self.transposed else stored

    def unpack_stored(self, dtype: torch.dtype) -> Tensor:
        """Return the weight as the files have it."""
        raise NotImplementedError

    def fill(self, host: Tensor | None, dtype: torch.dtype, device: Device, piece: None = None) -> None:
        """Store ``host``, the weight as the file has it, as one of ``dtype``; ``None`` rehearses it, of no particular values."""
        raise NotImplementedError

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return frozen_linear(inputs, self, self.bias)


def replace(
    model: Any,
    make: Callable[[nn.Linear | Conv1D], FrozenLinear],
    trained: list[nn.Module],
    *,
    key: str,
    kind: Quantization | None = None,
    host: Device | None = None,
    peers: Peers | None = None,
) -> None:
    """Put what ``make`` makes in the place of the linear layers of the body that do not train, and frozen experts likewise.

    Args:
        model: on the meta device.
        make: makes a layer, still empty.
        trained: the modules that train, each with everything inside it.
        key: the setting that asked for it.
        kind: how experts are stored; by default in the model's dtype.
        host: the device beside which experts lie on the host; by default they are on it.
        peers: of whom each keeps a part of every expert; by default all of them are here.

    Raises:
        ConfigError: there is nothing to replace, or most of the body would stay as it is.
    """
    kept = {child for module in trained for child in module.modules()} | {model.get_output_embeddings()}
    exact = set() if kind is None else experts.routing_layers(model)
    made = {
        layer: make(layer)
        for name, layer in model.named_modules()
        if is_linear(layer) and layer not in kept and name not in exact and owner_using_weight(model, name) is None
    }
    tied_layers.replace(model, made)
    experts.replace(model, kind, host, kept, peers)
    # No product reads them.
    tables = {id(module.weight) for module in model.modules() if isinstance(module, nn.Embedding)}
    stay: Counter[str] = Counter()
    for name, module in body_of(model).named_modules():
        if module not in kept:
            for own, parameter in module.named_parameters(recurse=False):
                stay[kind_of(f"{name}.{own}")] += parameter.numel() * (id(parameter) not in tables)
    left = stay.total()
    done = sum(math.prod(layer.shape) for _, layer in frozen_layers(model))
    if not done:
        raise ConfigError(f"{key} has no effect: this model's body has no frozen nn.Linear; remove it")
    if left > done:
        largest = ", ".join(name for name, _ in stay.most_common(3))
        raise ConfigError(
            f"{key} would leave {left:,} of this model's frozen weights as they are, against {done:,}, above all {largest}: it is for "
            "linear layers whose weights no other module reads, and for experts behind transformers' interface"
        )


def frozen_layers(
    model: Any, *, everywhere: bool = False
) -> Iterator[tuple[str, FrozenLinear | FrozenExperts | HostEmbedding]]:
    """Yield what was replaced in ``model``, with its names in the plain model; what is tied once, or ``everywhere``."""
    for name, module in model.named_modules(remove_duplicate=not everywhere):
        if isinstance(module, FrozenLinear | FrozenExperts | HostEmbedding):
            yield name.removesuffix(".base_layer"), module


def frozen_weights(model: Any, *, everywhere: bool = False) -> dict[str, FrozenLinear | FrozenExperts | HostEmbedding]:
    """Return what ``frozen_layers`` yields by the name of its parameter in the plain model."""
    return {
        name if isinstance(layer, FrozenExperts) else f"{name}.weight": layer
        for name, layer in frozen_layers(model, everywhere=everywhere)
    }


def has_frozen_layers(model: Any) -> bool:
    """Return whether ``model`` has replaced layers."""
    return any(True for _ in frozen_layers(model))


def rehearse_filling(model: Any, device: Device) -> None:
    """Do what loading does to the replaced layers, with weights of no particular values."""
    for _, layer in frozen_layers(model):
        for piece in layer.pieces:
            fill = partial(layer.fill, None, model.dtype, device, piece)  # type: ignore[arg-type]
            device.repeating(("filling", layer.form, layer.shape), fill)
