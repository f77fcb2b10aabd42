"""Frozen linear layers in 4 bits (QLoRA, Dettmers et al. 2023) or 8, quantised while they are loaded.

Saves: 12 or 8 of the 16 bits of every frozen weight. Costs: the rounding, which no training undoes, and the unpacking of
every weight in forward and backward. Each weight is quantised as it comes from the file, so neither host nor device ever
holds more than the quantised model and one weight. Saved models hold the weights of the file, not the rounded ones.

Quantised are the linear layers of the body that do not train; embeddings, norms and ``lm_head`` are not. Not for
``trainable: full``, which freezes nothing, and not for architectures whose experts are one tensor instead of layers.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ConfigError
from oomless.memory.device import Device
from oomless.ops.frozen_linear import PackedWeight, Quantization, frozen_linear, new_code, pack, packed_shapes

try:  # Imported here and not where used: its modules make tensors, which must be neither fake nor booked.
    import bitsandbytes
except ImportError:
    bitsandbytes = None


class QuantizedLinear(nn.Linear):
    """A frozen linear layer whose weight lies in the buffers that ``packed_shapes`` names; ``weight`` is None."""

    values: Tensor

    def __init__(self, layer: nn.Linear, kind: Quantization) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features, self.kind = layer.in_features, layer.out_features, kind
        self.register_parameter("weight", None)
        self.register_parameter("bias", layer.bias)
        for name, (shape, dtype) in packed_shapes(self.shape, kind).items():
            self.register_buffer(name, torch.empty(shape, dtype=dtype, device="meta"))
        self.code = torch.empty(0)
        self._is_hf_initialized = True

    @property
    def shape(self) -> tuple[int, int]:
        """The shape of the weight."""
        return self.out_features, self.in_features

    @property
    def qweight(self) -> Tensor:
        """The packed numbers, under the name by which peft looks for the device of a quantised layer."""
        return self.values

    @property
    def packed(self) -> PackedWeight:
        """The weight."""
        return PackedWeight(self.kind, self.shape, self.code, **dict(self.named_buffers(recurse=False)))

    def fill(self, weight: Tensor) -> None:
        """Store ``weight``, which lies on the device in the model's dtype."""
        made = pack(weight, self.kind, self.code)
        for name, buffer in self.named_buffers(recurse=False):
            buffer.copy_(getattr(made, name))

    def forward(self, inputs: Tensor) -> Tensor:  # noqa: D102
        return frozen_linear(inputs, self.packed, self.bias)


def replace(model: Any, kind: Quantization, trained: list[nn.Module]) -> None:
    """Put quantised layers, still empty and on the meta device, in the place of those linear ones that do not train.

    Args:
        model: on the meta device.
        kind: how they are stored.
        trained: the modules that train, each with everything inside it.

    Raises:
        ConfigError: bitsandbytes is missing, there is nothing to quantise, or most of the body would stay as it is.
    """
    if bitsandbytes is None:
        raise ConfigError("quantization needs bitsandbytes: install oomless[quantize], or leave it out")
    kept = {child for module in trained for child in module.modules()} | {model.get_output_embeddings()}
    for parent in list(model.modules()):
        for name, layer in list(parent.named_children()):
            if type(layer) is nn.Linear and layer not in kept:
                setattr(parent, name, QuantizedLinear(layer, kind))
    frozen = [p for m in model.base_model.modules() if m not in kept for p in m.parameters(recurse=False)]
    left = sum(p.numel() for p in frozen if p is not model.get_input_embeddings().weight)
    done = parameter_count(model)
    if not done:
        raise ConfigError("quantization has no effect: no linear layer of this model's body is frozen; remove it")
    if left > done:
        raise ConfigError(
            f"quantization would leave {left:,} of this model's frozen weights as they are, against {done:,} quantised: "
            "its experts are not linear layers, which is not supported yet"
        )


def prepare(model: Any, device: Device) -> None:
    """Give the quantised layers of ``model``, now allocated, the one code that they share."""
    layers = [layer for _, layer in quantized_layers(model)]
    if not layers:
        return
    with device.host():
        host = new_code(layers[0].kind)
    code = device.put(host)
    for layer in layers:
        layer.code = code
    device.label([code, *(b for m in layers for n, b in m.named_buffers() if n != "values")], "quantisation")


def rehearse_filling(model: Any, device: Device) -> None:
    """Do what loading does to the quantised layers, with weights of no particular values."""
    for _, layer in quantized_layers(model):
        layer.fill(torch.empty(layer.shape, dtype=model.dtype, device=device.torch_device))


def quantized_layers(model: Any) -> Iterator[tuple[str, QuantizedLinear]]:
    """Yield the quantised layers of ``model`` with their names in the plain model."""
    for name, module in model.named_modules():
        if isinstance(module, QuantizedLinear):
            yield name.removesuffix(".base_layer"), module


def is_quantized(model: Any) -> bool:
    """Return whether ``model`` has quantised layers."""
    return any(True for _ in quantized_layers(model))


def parameter_count(model: Any) -> int:
    """Return how many weights lie in the quantised layers of ``model``."""
    return sum(layer.in_features * layer.out_features for _, layer in quantized_layers(model))
