"""Model files in the Hugging Face layout, written one tensor at a time.

A tensor goes from the device to the host, to the file, and is forgotten: saving needs no second copy of anything on the
device, and of one tensor on the host. The format is safetensors' own: the header's length, a JSON header, the bytes.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import IO, Any

import torch
from torch import Tensor

from oomless.errors import ModelError
from oomless.memory.device import Device
from oomless.models import extension
from oomless.models.layout import SOURCE, LateTensor, Savable, in_files
from oomless.models.make import left_out
from oomless.models.weights import Weights
from oomless.techniques import expert_adapters, frozen_layers, lora, trained_rows
from oomless.techniques.embeddings_on_host import HostEmbedding
from oomless.techniques.experts import FrozenExperts
from oomless.techniques.sharding import Part, is_cut, part

SHARD_BYTES = 5 * 10**9
_BESIDE = (
    *("generation_config.json", "*processor*config.json", "chat_template.*"),
    *("tokenizer.model", "*.tiktoken", "*.spm", "*.py", "LICENSE*"),
    extension.FILE,
)
"""What lies beside a model's weights and is neither its config nor made by its fast tokenizer."""
_DTYPE_NAMES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint8: "U8",
    torch.bool: "BOOL",
}


@contextmanager
def durable(path: Path, mode: str = "wb") -> Iterator[IO[Any]]:
    """Open ``path`` for writing and have its bytes on the disk when the context ends."""
    with path.open(mode, encoding=None if "b" in mode else "utf-8") as file:
        yield file
        file.flush()
        os.fsync(file.fileno())


def write_safetensors(path: Path, tensors: Mapping[str, Savable], device: Device) -> None:
    """Write ``tensors``, which lie on ``device`` or the host, to the safetensors file ``path``."""
    with durable(path) as file:
        file.write(header(tensors)[0])
        for host in to_host(tensors, device):
            file.write(bytes_of(host))


def header(tensors: Mapping[str, Savable]) -> tuple[bytes, dict[str, int], int]:
    """Return what a file of ``tensors`` begins with, where in it each of them begins, and its size."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    begins: dict[str, int] = {}
    offset = 0
    for name, tensor in tensors.items():
        begins[name], end = offset, offset + tensor.numel() * tensor.element_size()
        header[name] = {"dtype": _DTYPE_NAMES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    encoded = json.dumps(header, separators=(",", ":")).encode()
    encoded += b" " * (-len(encoded) % 8)
    first = len(encoded).to_bytes(8, "little") + encoded
    return first, {name: len(first) + begin for name, begin in begins.items()}, len(first) + offset


def bytes_of(host: Tensor) -> Any:
    """Return the bytes of ``host``, which is contiguous, where they lie."""
    return host.reshape(-1).view(torch.uint8).numpy().data if host.numel() else b""


def begin_safetensors(path: Path, tensors: Mapping[str, Savable]) -> None:
    """Write the safetensors file ``path`` with room for ``tensors``, whose parts ``write_parts`` puts there."""
    first, _, size = header(tensors)
    with durable(path) as file:
        file.write(first)
        file.truncate(size)


def write_parts(
    path: Path, tensors: Mapping[str, Savable], own: Mapping[str, Savable], device: Device
) -> list[tuple[int, int]]:
    """Write into ``path``, which holds ``tensors``, those of them that are this process's ``own``: parts where they belong.

    Returns:
        Where the bytes of each begin in the file, and how many they are.
    """
    _, begins, _ = header(tensors)
    written = []
    # Not for reading as well: NFS would then read the pages at a part's ends, and write what others have meanwhile written there back.
    with open(path, "wb", opener=lambda name, _: os.open(name, os.O_WRONLY)) as file:
        for (name, tensor), host in zip(own.items(), to_host(own, device), strict=True):
            start = tensor.start if isinstance(tensor, Part) else 0
            begin = begins[name] + start * tensor.element_size()
            file.seek(begin)
            written.append((begin, file.write(bytes_of(host))))
        file.flush()
        os.fsync(file.fileno())
    return written


def savable(parameter: Tensor, state: Tensor | None = None, name: str = "") -> Tensor | Part:
    """Return ``parameter``, or the optimizer's ``state`` called ``name`` beside it; this process's part where it was cut."""
    if is_cut(parameter):
        return part(parameter, state, name)
    return parameter.detach() if state is None else state


def to_host(tensors: Mapping[str, Savable], device: Device) -> Iterator[Tensor]:
    """Yield each of ``tensors``, or this process's part of it, on the host, contiguous; the one before may be forgotten."""
    for tensor in tensors.values():
        if isinstance(tensor, LateTensor):
            yield tensor.make()
        else:
            yield device.fetch((tensor.local if isinstance(tensor, Part) else tensor).contiguous())


def save_weights(tensors: Mapping[str, Savable], folder: Path, device: Device) -> None:
    """Write ``tensors`` as ``model.safetensors``, or in shards of at most ``SHARD_BYTES`` with an index."""
    files = weight_files(tensors)
    for name, contents in files.items():
        write_safetensors(folder / name, contents, device)
    write_index(files, folder)


def weight_files(tensors: Mapping[str, Savable]) -> dict[str, Mapping[str, Savable]]:
    """Return which of ``tensors`` belong in which file: one, or several of at most ``SHARD_BYTES``."""
    shards: list[dict[str, Savable]] = [{}]
    filled = 0
    for name, tensor in tensors.items():
        size = tensor.numel() * tensor.element_size()
        if shards[-1] and filled + size > SHARD_BYTES:
            shards.append({})
            filled = 0
        shards[-1][name] = tensor
        filled += size
    if len(shards) == 1:
        return {"model.safetensors": shards[0]}
    return {
        f"model-{number:05d}-of-{len(shards):05d}.safetensors": shard for number, shard in enumerate(shards, start=1)
    }


def write_index(files: Mapping[str, Mapping[str, Savable]], folder: Path) -> None:
    """Write the index of ``files``, if there are several."""
    if len(files) == 1:
        return
    weight_map = {name: file_name for file_name, tensors in files.items() for name in tensors}
    tensors = [tensor for contents in files.values() for tensor in contents.values()]
    total_bytes = sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with durable(folder / "model.safetensors.index.json", "w") as file:
        json.dump({"metadata": {"total_size": total_bytes}, "weight_map": weight_map}, file, indent=2)


def plain_tensors(model: Any, device: Device, late: Mapping[str, LateTensor] | None = None) -> dict[str, Savable]:
    """Return the tensors of ``model``, merged if it had adapters, under the plain model's names, tied ones once.

    ``late`` are those that are stored in another form (``original_weights``); matrices some of whose rows train are made late too.
    """
    packed = {id(buffer) for _, layer in frozen_layers.frozen_layers(model) for buffer in layer.buffers()}
    plain = {name: savable(t) for name, t in lora.plain_tensors(model, packed).items()}
    return plain | _matrices_with_rows(model, device) | dict(late or {})


def model_tensors(model: Any, device: Device, late: Mapping[str, LateTensor] | None = None) -> dict[str, Savable]:
    """Return the ``plain_tensors`` of ``model`` as the files that it came from hold them, with what was left out as it stands there."""
    found = in_files(model, plain_tensors(model, device, late), device)
    folder = getattr(model, SOURCE, None)
    if left_out(model) and folder is not None:
        weights = Weights(folder, model, [], device)
        found |= {name: weights.late(name) for name in weights.left}
    return found


def _matrices_with_rows(model: Any, device: Device) -> dict[str, LateTensor]:
    """Return the matrices of ``model`` some of whose rows train, those in them."""
    return {
        f"{name}.weight": LateTensor(
            tuple(module.weight.shape), module.weight.dtype, partial(trained_rows.with_rows, module, device)
        )
        for name, module in trained_rows.owners(model).items()
    }


def require_own_names(model: Any) -> None:
    """Check that the published checkpoints of ``model``, which is on the meta device, hold its tensors one by one.

    Raises:
        ModelError: they join or split some of them (experts), which cannot be done in parts.
    """
    from transformers.core_model_loading import revert_weight_conversion

    if left_out(model):
        raise ModelError(
            f"the text part of {type(model).__name__} cannot be trained on several GPUs yet: train it on one"
        )
    tensors = {name: tensor.detach() for name, tensor in model.state_dict(keep_vars=True).items()}
    reverted = revert_weight_conversion(model, dict(tensors))
    if {name: tensor.shape for name, tensor in tensors.items()} != {name: t.shape for name, t in reverted.items()}:
        raise ModelError(
            f"the checkpoints of {type(model).__name__} hold its tensors in another form than it trains in: it cannot be trained on "
            "several GPUs yet"
        )


def original_weights(model: Any, folder: Path, device: Device) -> dict[str, LateTensor]:
    """Return the weights of the frozen layers of ``model`` that are stored in another form, as they lie in ``folder``.

    So are those frozen matrices of which this process holds some rows, where other layers are stored in another form. They are in the model's dtype, adapters added in fp32, and each is made when it is written.
    """
    modules = dict(model.named_modules(remove_duplicate=False))
    layers = frozen_layers.frozen_weights(model, everywhere=True)
    cut = {name: p for name, p in model.named_parameters(remove_duplicate=False) if is_cut(p)}
    weights = Weights(folder, model, [*layers, *cut], device)
    found = {id(holder): name for name, holder in (cut | layers).items() if name in weights.names}

    def add(tensor: Tensor, delta: Tensor | None) -> Tensor:
        with device.host():
            if delta is None:
                return tensor.to(model.dtype).contiguous()
            return (tensor.float() + delta.float()).to(model.dtype).contiguous()

    def late(name: str, layer: frozen_layers.FrozenLinear | FrozenExperts | HostEmbedding) -> LateTensor:
        if not isinstance(layer, FrozenExperts):
            module = modules[name.removesuffix(".weight")]
            read = partial(weights.read, found[id(layer)])
            return LateTensor(layer.shape, model.dtype, lambda: add(read(), lora.delta(module, device)))
        holder, _, stack = name.rpartition(".")
        adapter = expert_adapters.of(modules[holder], stack)

        def expert(number: int) -> Tensor:
            return add(weights.read_expert(name, number), None if adapter is None else adapter.delta(number, device))

        def whole() -> Tensor:
            with device.host():
                return torch.stack([expert(number) for number in layer.pieces])

        return LateTensor(layer.shape, model.dtype, whole, expert)

    def late_matrix(parameter: Tensor) -> LateTensor:
        name = found[id(parameter)]
        return LateTensor(tuple(parameter.shape), model.dtype, lambda: add(weights.read(name), None))

    ends = {name: late_matrix(parameter) for name, parameter in model.named_parameters() if is_cut(parameter)}
    # What was tied is in the files once, and is written as often as it will be loaded.
    written = {
        name: layer for name, layer in layers.items() if name in weights.names or not model.all_tied_weights_keys
    }
    return {name: late(name, layer) for name, layer in written.items()} | ends


def save_model(
    model: Any, folder: Path, tensors: Mapping[str, Savable], device: Device, source: Path | None = None
) -> None:
    """Write ``tensors`` with the config of ``model`` as transformers loads them, and what lay beside it in ``source``."""
    save_config(model, folder, source)
    save_weights(tensors, folder, device)


def save_config(model: Any, folder: Path, source: Path | None = None) -> None:
    """Write the config of ``model``; what else describes it is as it lies in ``source``, where it came from."""
    model.config.dtype = str(model.dtype).removeprefix("torch.")
    model.config.architectures = [type(model).__name__]
    model.config.save_pretrained(folder)
    if source is not None and (source / "config.json").is_file():
        for path in sorted(path for pattern in _BESIDE for path in source.glob(pattern) if path.is_file()):
            if not (folder / path.name).exists():
                shutil.copyfile(path, folder / path.name)
    elif model.can_generate():
        model.generation_config.save_pretrained(folder)
