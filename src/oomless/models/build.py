"""A ready model on the device, one tensor at a time.

The module tree is made on the meta device, then each parameter is allocated on the device in its final dtype and
filled from the checkpoint through the host, one tensor at a time: the device never holds more than the model, the host
never more than one tensor. A rehearsal runs the same code and fills nothing.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers import AutoModelForCausalLM

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import attention, experts
from oomless.models.spec import ModelSpec
from oomless.techniques import frozen_layers, lora, quantization, sharding, trained_rows


def build(
    spec: ModelSpec,
    *,
    device: Device,
    dtype: torch.dtype,
    prepare: Callable[[Any], None] | None = None,
    cut: Callable[[Any, Callable[[nn.Module], None]], None] | None = None,
) -> Any:
    """Return the model of ``spec`` on ``device``, its parameters allocated but not filled, its buffers right.

    ``prepare`` may replace modules of the model while it is on the meta device. ``cut`` may leave a part of each parameter;
    it is given the model, and what allocates the parameters of a module.

    Raises:
        ModelError: transformers cannot build the architecture, or its attention cannot be replaced.
    """
    attention.register()
    experts.register()
    config = copy.deepcopy(spec.config)  # what is done to the model may change its config
    try:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(
                config,
                dtype=dtype,
                attn_implementation=attention.NAME,
                experts_implementation=experts.NAME,
                trust_remote_code=spec.trust_remote_code,
            )
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise ModelError(f"transformers cannot build {spec.name}: {error}") from error
    experts.place(model, device)
    if prepare is not None:
        prepare(model)
    with device.phase("load"):
        if cut is not None:
            cut(model, lambda module: _materialise_parameters(module, device))
        _materialise(model, device)
        quantization.prepare(model, device)
    model.config.use_cache = False
    return model


def parameter_count(spec: ModelSpec) -> int:
    """Return how many parameters the model of ``spec`` has, tied ones counted once; nothing is allocated."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(copy.deepcopy(spec.config), trust_remote_code=spec.trust_remote_code)
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
    model.initialize_weights()
    device.label(model.buffers(), "weights")


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
    """Fill ``model`` from the safetensors in ``spec.folder``.

    Raises:
        ModelError: files are missing or damaged, a parameter is in none of them, or has another shape there.
    """
    if spec.folder is None:
        raise ModelError(f"{spec.name} is a config without weights: training needs a folder with safetensors weights")
    stored = {f"{name}.weight": layer for name, layer in frozen_layers.frozen_layers(model)}
    inside = {id(buffer) for layer in stored.values() for buffer in layer.buffers()}
    wanted = {
        name.replace(".base_layer.", "."): tensor
        for name, tensor in model.state_dict(keep_vars=True).items()
        if id(tensor) not in inside and not trained_rows.is_rows(name) and not lora.is_adapter(name)
    }
    found = set()
    with device.phase("load"), torch.no_grad():
        for name, tensor in checkpoint_tensors(spec.folder, device):
            if name not in wanted:
                continue
            _check_shape(name, tensor, tuple(wanted[name].shape), spec.folder)
            with device.host():
                tensor = tensor.to(wanted[name].dtype)
            sharding.fill(wanted[name], tensor)
            found.add(id(wanted[name]))
        for name, tensor in checkpoint_tensors(spec.folder, device, list(stored)):
            _check_shape(name, tensor, stored[name].shape, spec.folder)
            stored[name].fill(tensor, model.dtype, device)
        trained_rows.take_from_weight(model)
    missing = [name for name, tensor in wanted.items() if id(tensor) not in found and isinstance(tensor, nn.Parameter)]
    if missing:
        _load_through_transformers(wanted, missing, spec, device)


def _check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], folder: Path) -> None:
    if tuple(tensor.shape) != shape:
        raise ModelError(
            f"{name} is {tuple(tensor.shape)} in {folder} but {shape} by its config.json: the two do not belong together"
        )


def weight_files(folder: Path) -> list[Path]:
    """Return the safetensors files of the Hugging Face checkpoint in ``folder``.

    Raises:
        ModelError: there are none, or the index names files that are not there.
    """
    index = folder / "model.safetensors.index.json"
    if index.is_file():
        try:
            names = sorted(set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values()))
        except (ValueError, KeyError, AttributeError) as error:
            raise ModelError(f"{index} is damaged: {error!r}") from error
        absent = [name for name in names if not (folder / name).is_file()]
        if absent:
            raise ModelError(f"{index} names {', '.join(absent)}, which {folder} does not hold: fetch the model again")
        return [folder / name for name in names]
    single = folder / "model.safetensors"
    if not single.is_file():
        hint = ""
        if any(folder.glob("*.bin")):
            hint = " Its .bin files are pickles, which can run code: convert them to safetensors first."
        raise ModelError(f"{folder} holds no model.safetensors.{hint}")
    return [single]


def checkpoint_tensors(
    folder: Path, device: Device, names: Iterable[str] | None = None
) -> Iterator[tuple[str, Tensor]]:
    """Yield names and tensors, on the host, of the checkpoint in ``folder``: all as they lie, or ``names`` in their order.

    Raises:
        ModelError: a file is damaged, or does not hold one of ``names``.
    """
    with ExitStack() as stack:
        places: dict[str, Any] = {}
        for path in weight_files(folder):
            try:
                file = stack.enter_context(safe_open(path, framework="pt"))
            except (SafetensorError, OSError) as error:
                raise ModelError(f"{path} is not a whole safetensors file: {error}") from error
            places |= dict.fromkeys(file.keys(), file)
        for name in places if names is None else names:
            if name not in places:
                raise ModelError(
                    f"{folder} holds no {name}, under this name: quantization and stream_frozen need the layers' own weights"
                )
            with device.host():
                tensor = places[name].get_tensor(name)
            yield name, tensor


def _load_through_transformers(wanted: dict[str, Tensor], missing: list[str], spec: ModelSpec, device: Device) -> None:
    """Fill ``wanted`` from checkpoints that transformers stores under other names (experts by one, older layouts)."""
    with device.host():
        host_model, report = AutoModelForCausalLM.from_pretrained(
            spec.folder, dtype="auto", output_loading_info=True, trust_remote_code=spec.trust_remote_code
        )
        absent = sorted(set(missing) & set(report["missing_keys"]))
        if absent:
            shown = ", ".join(absent[:5]) + (f" and {len(absent) - 5} more" if len(absent) > 5 else "")
            raise ModelError(f"the weights in {spec.folder} lack {shown}")
        source = host_model.state_dict()
        with torch.no_grad():
            for name in missing:
                sharding.fill(wanted[name], source[name].to(wanted[name].dtype))
