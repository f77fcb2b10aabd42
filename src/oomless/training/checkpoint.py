"""Checkpoints: whole or not there at all.

    checkpoint-120/            loads in plain transformers (or, with LoRA, in plain peft)
        config.json  model.safetensors  tokenizer.json ...
        trainer/
            optimizer.safetensors   <parameter>/<state>, loss scale, random state
            state.json              step, data position, the config that made it
            checksums.json          BLAKE2b of every other file

A checkpoint is written beside its place, its bytes forced to the disk, and then renamed into place, so a reader sees all
of it or none. Older ones are removed only after that. Reading verifies every checksum first; a damaged checkpoint is
passed over for the one before it, and that is said.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from oomless.errors import CheckpointError
from oomless.memory.device import Device
from oomless.models import build, save
from oomless.models.spec import ModelSpec
from oomless.optim.base import MemoryLeanOptimizer
from oomless.techniques import frozen_layers, lora
from oomless.training.precision import LossScale

_NAME = re.compile(r"checkpoint-(\d+)")
_HASHED_AT_ONCE = 1 << 24


@dataclass(frozen=True, kw_only=True, slots=True)
class Checkpoint:
    """A checkpoint on disk."""

    folder: Path
    step: int


def list_checkpoints(run: Path) -> list[Checkpoint]:
    """Return the checkpoints in the run folder, oldest first."""
    found = [(path, _NAME.fullmatch(path.name)) for path in run.glob("checkpoint-*")]
    return sorted((Checkpoint(folder=p, step=int(m[1])) for p, m in found if m), key=lambda c: c.step)


@contextmanager
def clear_disk_errors(what: str) -> Any:
    """Turn a full or read-only disk into a ``CheckpointError`` that says what could not be written."""
    try:
        yield
    except OSError as error:
        raise CheckpointError(
            f"{what} could not be written: {error.strerror or error} ({error.filename or 'no file named'}). "
            "What was saved before is intact; make room or choose another output_dir, then go on with --resume."
        ) from error


def write_atomically(path: Path, text: str) -> None:
    """Write ``text`` to ``path`` so that a reader sees the old file or the new one."""
    temporary = path.with_name(f".{path.name}.tmp")
    with save.durable(temporary, "w") as file:
        file.write(text)
    temporary.replace(path)
    _sync_folder(path.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Have ``fill`` write a folder beside ``target``, force it to the disk and move it into place."""
    temporary = target.with_name(f".{target.name}.tmp")
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        for path in sorted(temporary.rglob("*"), reverse=True):
            _sync_folder(path) if path.is_dir() else _sync_file(path)
        _sync_folder(temporary)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if target.exists():
        remove_folder(target)
    temporary.rename(target)
    _sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` so that a reader never sees half of it."""
    doomed = folder.with_name(f".{folder.name}.old")
    shutil.rmtree(doomed, ignore_errors=True)
    folder.rename(doomed)
    shutil.rmtree(doomed)


def _sync_file(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


_sync_folder = _sync_file


def save_checkpoint(
    run: Path,
    step: int,
    *,
    model: Any,
    tokenizer: Any,
    optimizer: MemoryLeanOptimizer,
    loss_scale: LossScale,
    state: Mapping[str, Any],
    device: Device,
    limit: int,
) -> Checkpoint:
    """Write the checkpoint of ``step`` to the run folder, then remove the oldest beyond ``limit``.

    Raises:
        CheckpointError: the disk is full, read-only or failing; earlier checkpoints are untouched.
    """

    def fill(folder: Path) -> None:
        if is_adapted(model):
            lora.save_config(model, folder)
            save.write_safetensors(folder / "adapter_model.safetensors", weights_to_save(model, device), device)
        elif frozen_layers.has_frozen_layers(model):
            save.write_safetensors(folder / "trained.safetensors", weights_to_save(model, device), device)
        else:
            save.save_model(model, folder, weights_to_save(model, device), device)
        tokenizer.save_pretrained(folder)
        trainer = folder / "trainer"
        trainer.mkdir()
        tensors = trainer_tensors(model, optimizer, loss_scale) | random_state(device)
        save.write_safetensors(trainer / "optimizer.safetensors", tensors, device)
        (trainer / "state.json").write_text(json.dumps({"step": step, **state}, indent=2), encoding="utf-8")
        sums = {str(p.relative_to(folder)): checksum(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        (trainer / "checksums.json").write_text(json.dumps(sums, indent=2), encoding="utf-8")

    target = run / f"checkpoint-{step}"
    with device.phase("save"), clear_disk_errors(f"the checkpoint of step {step}"):
        write_folder(target, fill)
        for old in list_checkpoints(run)[:-limit]:
            remove_folder(old.folder)
    return Checkpoint(folder=target, step=step)


def is_adapted(model: Any) -> bool:
    """Return whether ``model`` carries LoRA adapters."""
    return bool(getattr(model, "peft_config", None))


def weights_to_save(model: Any, device: Device) -> dict[str, Tensor | save.LateTensor]:
    """Return what a checkpoint keeps of the model: all of it, or with LoRA or frozen layers that are stored otherwise what trains."""
    if trained := _trained(model):
        return {name: parameter.detach() for name, parameter in trained.items()}
    return save.model_tensors(model, device)


def _trained(model: Any) -> dict[str, nn.Parameter]:
    """Return what trains, under its names in a checkpoint that keeps no more than that; else nothing."""
    if is_adapted(model):
        return lora.checkpoint_parameters(model)
    if frozen_layers.has_frozen_layers(model):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {}


def trainer_tensors(model: Any, optimizer: MemoryLeanOptimizer, loss_scale: LossScale) -> dict[str, Tensor]:
    """Return what a checkpoint keeps beside the model, all on the device."""
    tensors = {
        f"parameter/{name}/{key}": tensor
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, tensor in optimizer.state_tensors(parameter).items()
    }
    return tensors | {f"loss_scale/{key}": tensor for key, tensor in loss_scale.tensors().items()}


def random_state(device: Device) -> dict[str, Tensor]:
    """Return the state of the random generators, which lies on the host."""
    with device.host():
        states = {"random/cpu": torch.get_rng_state()}
        if device.torch_device.type == "cuda":
            states["random/cuda"] = torch.cuda.get_rng_state(device.torch_device)
    return states


def checksum(path: Path) -> str:
    """Return the BLAKE2b of the file ``path`` in hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def damage(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint's files, or ``None`` where every checksum is right."""
    listed = checkpoint.folder / "trainer" / "checksums.json"
    try:
        sums = json.loads(listed.read_text(encoding="utf-8"))
        for name, expected in sums.items():
            path = checkpoint.folder / name
            if not path.is_file():
                return f"{name} is missing"
            if checksum(path) != expected:
                return f"{name} is not what was written"
        if "trainer/state.json" not in sums:
            return "checksums.json is incomplete"
    except (OSError, ValueError, AttributeError) as error:
        return f"checksums.json cannot be read: {error}"
    return None


def newest_good(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest undamaged checkpoint of the run folder, telling ``say`` of each that is passed over.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged.
    """
    checkpoints = list_checkpoints(run)
    problems = []
    for checkpoint in reversed(checkpoints):
        problem = damage(checkpoint)
        if problem is None:
            return checkpoint
        problems.append(f"{checkpoint.folder.name}: {problem}")
        say(f"{problems[-1]}; trying the one before it")
    if problems:
        raise CheckpointError(
            f"every checkpoint in {run} is damaged ({'; '.join(problems)}): remove them and start again without --resume"
        )
    return None


def read_state(checkpoint: Checkpoint) -> dict[str, Any]:
    """Return what ``state.json`` of the checkpoint says."""
    state: dict[str, Any] = json.loads((checkpoint.folder / "trainer" / "state.json").read_text(encoding="utf-8"))
    return state


def restore(
    checkpoint: Checkpoint,
    *,
    model: Any,
    spec: ModelSpec,
    optimizer: MemoryLeanOptimizer,
    loss_scale: LossScale,
    device: Device,
) -> None:
    """Put weights, optimizer state, loss scale and random state of the checkpoint into the live objects.

    Raises:
        CheckpointError: the checkpoint was made with other trainable parts or another optimizer.
    """
    with device.phase("load"), torch.no_grad():
        if trained := _trained(model):
            file = "adapter_model.safetensors" if is_adapted(model) else "trained.safetensors"
            for name, tensor in _read(checkpoint.folder / file, set(trained), device):
                trained[name].copy_(tensor)
        else:
            saved = ModelSpec(name=spec.name, config=spec.config, folder=checkpoint.folder)
            build.load_weights(model, saved, device=device)
        _restore_trainer(checkpoint, dict(model.named_parameters()), optimizer, loss_scale, device)


def _restore_trainer(
    checkpoint: Checkpoint,
    parameters: Mapping[str, nn.Parameter],
    optimizer: MemoryLeanOptimizer,
    loss_scale: LossScale,
    device: Device,
) -> None:
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for name, tensor in _read(checkpoint.folder / "trainer" / "optimizer.safetensors", None, device):
        kind, _, rest = name.partition("/")
        if kind == "parameter":
            owner, _, key = rest.rpartition("/")
            by_parameter.setdefault(owner, {})[key] = tensor
        elif kind == "loss_scale":
            loss_scale.tensors()[rest].copy_(tensor)
        elif rest == "cpu":
            torch.set_rng_state(tensor)
        elif device.torch_device.type == "cuda":
            torch.cuda.set_rng_state(tensor, device.torch_device)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    try:
        if trained != by_parameter.keys():
            raise ValueError(f"it trained other parameters: {', '.join(sorted(trained ^ by_parameter.keys())[:5])}")
        for name, state in by_parameter.items():
            optimizer.load_state_tensors(parameters[name], state)
    except ValueError as error:
        raise CheckpointError(f"{checkpoint.folder} does not fit this run: {error}") from error


def _read(path: Path, expected: set[str] | None, device: Device) -> Any:
    with safe_open(path, framework="pt") as file:
        names = set(file.keys())
        if expected is not None and names != expected:
            other = ", ".join(sorted(names ^ expected)[:5])
            raise CheckpointError(
                f"{path} was made with other trainable parts (differing: {other}): resume as it began"
            )
        for name in sorted(names):
            with device.host():
                tensor = file.get_tensor(name)
            yield name, tensor
