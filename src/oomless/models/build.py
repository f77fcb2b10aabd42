"""A ready model on the device, one tensor at a time.

The module tree is made on the meta device, then each parameter is allocated on the device in its final dtype and
filled from the checkpoint through the host, one tensor at a time: the device never holds more than the model, the host
never more than one tensor. A rehearsal runs the same code and fills nothing.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import attention, experts, layout, sample
from oomless.models import form as form_of
from oomless.models.form import Form
from oomless.models.make import make, without_memory
from oomless.models.spec import ModelSpec
from oomless.models.weights import Weights
from oomless.techniques import experts as frozen_experts
from oomless.techniques import frozen_layers, lora, quantization, sharding, trained_rows


def build(
    spec: ModelSpec,
    *,
    device: Device,
    dtype: torch.dtype,
    form: Form = Form(),
    prepare: Callable[[Any], None] | None = None,
    cut: Callable[[Any, Callable[[nn.Module], None]], None] | None = None,
) -> Any:
    """Return the model of ``spec`` on ``device``, its parameters allocated but not filled, its buffers right.

    ``form`` says how it is run (``models.form``). ``prepare`` may replace modules of the model while it is on the meta device. ``cut`` may leave a part of each parameter;
    it is given the model, and what allocates the parameters of a module.

    Raises:
        ModelError: transformers cannot build the architecture, or its attention cannot be replaced.
    """
    attention.register()
    experts.register()
    config = copy.deepcopy(spec.config)  # what is done to the model may change its config
    try:
        with torch.device("meta"):
            model = make(
                config,
                dtype=dtype,
                attn_implementation=form.attention,
                experts_implementation=experts.NAME,
                trust_remote_code=spec.trust_remote_code,
            )
    except (ValueError, KeyError, TypeError, AttributeError, ArithmeticError, RuntimeError, ImportError) as error:
        raise ModelError(f"transformers cannot build {spec.name}: {error}") from error
    form_of.apply(model, form)
    experts.place(model, device)
    if prepare is not None:
        prepare(model)
    with device.phase("load"):
        if cut is not None:
            cut(model, lambda module: _materialise_parameters(module, device))
        _materialise(model, device)
        quantization.prepare(model, device)
        frozen_experts.allocate(model)
    return model


def parameter_count(spec: ModelSpec) -> int:
    """Return how many parameters the model of ``spec`` has, tied ones counted once; nothing is allocated."""
    model = without_memory(spec.config, trust_remote_code=spec.trust_remote_code)
    return sum(parameter.numel() for parameter in model.parameters())


def _materialise(model: Any, device: Device) -> None:
    """Allocate every parameter and buffer on ``device``; tied ones stay one."""
    _materialise_parameters(model, device)
    for module in model.modules():
        for name, buffer in list(module.named_buffers(recurse=False, remove_duplicate=False)):
            module._buffers[name] = _empty_like(buffer, device)
    for parameter in model.parameters():
        parameter._is_hf_initialized = True
    device.label(model.parameters(), "weights")
    _compute_buffers(model)
    device.label(model.buffers(), "weights")


def _compute_buffers(model: Any) -> None:
    """Have the classes of ``model`` compute the buffers that no checkpoint holds.

    A module is asked for its own. Those above it are asked only for what is then still unwritten, because some classes initialise
    the weights of their children too, which may be stored otherwise.

    Raises:
        ModelError: nobody computes one.
    """
    layers = frozen_layers.frozen_weights(model).values()
    stored = {id(buffer) for layer in layers for buffer in layer.buffers(recurse=False)}  # which the files fill
    for recurse in (False, True):
        asked = _unwritten(model) if recurse else {id(buffer) for buffer in model.buffers()} - stored
        for module in model.modules():
            module._is_hf_initialized = asked.isdisjoint(map(id, module.buffers(recurse)))
        model.initialize_weights()
    if unwritten := _unwritten(model):
        names = [name for name, buffer in model.named_buffers() if id(buffer) in unwritten]
        raise ModelError(
            f"{type(model).__name__} computes {', '.join(names[:3])} in no _init_weights, as transformers asks since version 5, and "
            "no file holds it: transformers itself loads such a model with random numbers there"
        )


def _unwritten(model: Any) -> set[int]:
    """Return the identities of the buffers that no checkpoint holds and that nothing was written to since they were allocated."""
    return {id(buffer) for _, buffer in model.named_non_persistent_buffers() if not buffer._version and buffer.numel()}


def _materialise_parameters(root: nn.Module, device: Device) -> None:
    """Allocate the parameters inside ``root`` that have no memory yet; tied ones stay one."""
    made: dict[int, nn.Parameter] = {}
    for module in root.modules():
        for name, parameter in module.named_parameters(recurse=False, remove_duplicate=False):
            if not parameter.is_meta:
                continue
            if id(parameter) not in made:
                made[id(parameter)] = nn.Parameter(_empty_like(parameter, device), parameter.requires_grad)
            setattr(module, name, made[id(parameter)])


def _empty_like(tensor: Tensor, device: Device) -> Tensor:
    return torch.empty(tensor.shape, dtype=tensor.dtype, device=device.torch_device)


def load_weights(model: Any, spec: ModelSpec, *, device: Device) -> None:
    """Fill ``model`` from the checkpoint in ``spec.folder``, every parameter and from every tensor of it.

    Raises:
        ModelError: files are missing or damaged; a parameter is in none of them, or has another shape or form there; or they
            hold a tensor that no parameter takes.
    """
    if spec.folder is None:
        raise ModelError(f"{spec.name} is a config without weights: training needs a folder with safetensors weights")
    stored = frozen_layers.frozen_weights(model, everywhere=True)
    inside = {id(buffer) for layer in stored.values() for buffer in layer.buffers()}
    wanted = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in inside and not trained_rows.is_rows(name) and not lora.is_adapter(name)
    }
    with device.phase("load"), torch.no_grad():
        weights = Weights(spec.folder, model, [*wanted, *stored], device)
        weights.check_whole({name: id(holder) for name, holder in (wanted | stored).items()})
        setattr(model, layout.NAMES, weights.names_in_files)
        setattr(model, layout.SOURCE, spec.base or spec.folder)
        filled: dict[int, str] = {}
        embedding = model.get_input_embeddings().weight
        for name in weights.names:
            if name in stored:
                continue
            tensor, parameter = weights.read(name), wanted[name]
            _check_shape(name, tensor, tuple(parameter.shape), spec.folder)
            if id(parameter) in filled:
                _check_tied(name, tensor, filled[id(parameter)], weights)
                continue
            with device.host():
                if parameter is embedding:
                    setattr(model, sample.NAME, sample.of(tensor))
                tensor = tensor.to(parameter.dtype)
            sharding.fill(parameter, tensor)
            filled[id(parameter)] = name
        there = set(weights.names)
        for name, layer in stored.items():
            if name not in there:  # tied to one that is
                continue
            if id(layer) in filled:
                _check_tied(name, weights.read(name), filled[id(layer)], weights)
                continue
            filled[id(layer)] = name
            for piece in layer.pieces:
                tensor = weights.read(name) if piece is None else weights.read_expert(name, piece)
                _check_shape(name, tensor, layer.shape[-2:], spec.folder)
                layer.fill(tensor, model.dtype, device, piece)  # type: ignore[arg-type]
        trained_rows.take_from_weight(model)


def _check_tied(name: str, tensor: Tensor, other: str, weights: Weights) -> None:
    if not torch.equal(tensor, weights.read(other)):
        raise ModelError(
            f"{name} and {other} are one matrix by the config.json in {weights.folder}, whose files hold two that differ: set "
            "tie_word_embeddings to false there"
        )


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], folder: Path) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{name} is {tuple(tensor.shape)} in {folder} but {shape} by its config.json: the two do not belong together"
        )
