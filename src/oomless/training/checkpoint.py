"""Checkpoints: whole or not there at all.

    checkpoint-120/            loads in plain transformers (or, with LoRA, in plain peft)
        config.json  model.safetensors  tokenizer.json ...
        trainer/
            optimizer.safetensors   <parameter>/<state>, loss scale, random state
            state.json              step, data position, the config that made it
            checksums.json          BLAKE2b of every other file

A checkpoint is written beside its place, its bytes forced to the disk, and then renamed into place, so a reader sees all
of it or none. Older ones are removed only after that. Reading verifies every checksum first; a damaged checkpoint is
passed over for the one before it and set aside, and that is said. Which is newer is told by the step, never by a clock.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
import shutil
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from torch import Tensor, nn

from oomless.errors import CheckpointError
from oomless.memory.device import Device, random_state, set_random_state
from oomless.models import build, sample, save
from oomless.models.layout import Savable
from oomless.models.spec import ModelSpec
from oomless.optim.base import MemoryLeanOptimizer
from oomless.techniques import frozen_layers, lora, sharding
from oomless.training.distributed import ALONE, Ranks
from oomless.training.exchange import Stretch, exchange, whole_files
from oomless.training.precision import LossScale
from oomless.units import format_bytes

_NAME = re.compile(r"checkpoint-(\d+)")
_HASHED_AT_ONCE = 1 << 24
BASE_SAMPLE = "base_sample"
"""Where a checkpoint of what trained alone keeps what the model beside it is known by."""

_CHECKSUMS = "trainer/checksums.json"


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
    try:
        with save.durable(temporary, "w") as file:
            file.write(text)
        temporary.replace(path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _sync_folder(path.parent)


def write_folder(target: Path, fill: Callable[[Path], None]) -> None:
    """Have ``fill`` write a folder beside ``target``, force it to the disk and move it into place."""
    temporary = temporary_folder(target)
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir(parents=True)
        fill(temporary)
        put_in_place(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def temporary_folder(target: Path) -> Path:
    """Return where ``target`` is written before it is moved into place."""
    return target.with_name(f".{target.name}.tmp")


def put_in_place(target: Path) -> None:
    """Force what was written beside ``target`` to the disk, and move it there."""
    temporary = temporary_folder(target)
    for path in sorted(temporary.rglob("*"), reverse=True):
        _sync_folder(path) if path.is_dir() else _sync_file(path)
    _sync_folder(temporary)
    if target.exists():
        remove_folder(target)
    temporary.rename(target)
    _sync_folder(target.parent)


def remove_folder(folder: Path) -> None:
    """Remove ``folder`` so that a reader never sees half of it."""
    doomed = folder.with_name(f".{folder.name}.old")
    delete(doomed)
    folder.rename(doomed)
    delete(doomed)


def delete(path: Path) -> None:
    """Delete ``path``, a folder, a file or nothing."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


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
    keep: int | None = None,
    ranks: Ranks = ALONE,
    source: Path | None = None,
) -> Checkpoint:
    """Write the checkpoint of ``step`` to the run folder, then remove the oldest beyond ``limit``, but never that of ``keep``.

    ``source`` is the folder that the model came from, with what lies beside its weights.

    Raises:
        CheckpointError: the disk is full, read-only or failing; earlier checkpoints are untouched.
    """
    device.wait()  # for what the last update brought to the host
    weights, beside = weights_to_save(model, device), trainer_tensors(model, optimizer, loss_scale)
    trained = _trained_file(model)
    of_model = save.weight_files(weights) if trained is None else {trained: weights}
    files = {**of_model, "trainer/optimizer.safetensors": beside | random_state(device)}

    def describe(folder: Path) -> None:
        if is_adapted(model):
            lora.save_config(model, folder)
        elif trained is None:
            save.save_config(model, folder, source)
            save.write_index(of_model, folder)
        save_tokenizer(tokenizer, folder)
        trainer = folder / "trainer"
        trainer.mkdir()
        of_base = {} if trained is None else {BASE_SAMPLE: getattr(model, sample.NAME, None)}
        told = {"step": step, **state, **of_base}
        (trainer / "state.json").write_text(json.dumps(told, indent=2), encoding="utf-8")

    def seal(folder: Path) -> None:
        sums = {str(p.relative_to(folder)): checksum(p) for p in sorted(folder.rglob("*")) if p.is_file()}
        (folder / _CHECKSUMS).write_text(json.dumps(sums, indent=2), encoding="utf-8")

    target = run / f"checkpoint-{step}"
    with device.phase("save"), clear_disk_errors(f"the checkpoint of step {step}"):
        with ranks.together(f"the checkpoint of step {step}"):
            tensors = [tensor for contents in (weights, beside) for tensor in contents.values()]
            _require_room(run, sum(tensor.numel() * tensor.element_size() for tensor in tensors))
        write_model_folder(target, describe, files, seal, device, ranks)
        if ranks.writes:
            earlier = [found for found in list_checkpoints(run) if found.step < step and found.step != keep]
            for old in earlier[: max(0, len(earlier) + 1 - limit)]:
                remove_folder(old.folder)
    return Checkpoint(folder=target, step=step)


def write_model_folder(
    target: Path,
    describe: Callable[[Path], None],
    files: Mapping[str, Mapping[str, Savable]],
    seal: Callable[[Path], None],
    device: Device,
    ranks: Ranks,
) -> None:
    """Write the folder ``target``: what ``describe`` writes, then the tensors in ``files``, then what ``seal`` writes.

    Of several processes the first does it, and each writes its parts of the tensors into the first's files: nothing is gathered.
    Machines that do not see the first's files have their own, and send each other what they wrote.
    """
    if ranks.count == 1:

        def fill(folder: Path) -> None:
            describe(folder)
            for name, tensors in files.items():
                save.write_safetensors(folder / name, tensors, device)
            seal(folder)

        write_folder(target, fill)
        return
    temporary, written = temporary_folder(target), list[Stretch]()
    try:
        with ranks.together(target.name):
            if ranks.writes:
                shutil.rmtree(temporary, ignore_errors=True)
                temporary.mkdir(parents=True)
                if ranks.first:
                    describe(temporary)
                    written += whole_files(temporary)
                for name, tensors in files.items():
                    (temporary / name).parent.mkdir(exist_ok=True)
                    save.begin_safetensors(temporary / name, tensors)
        with ranks.together(target.name):
            for name, tensors in files.items():
                own = tensors if ranks.first else {n: t for n, t in tensors.items() if isinstance(t, sharding.Part)}
                written += [Stretch(name, *place) for place in save.write_parts(temporary / name, tensors, own, device)]
        if len(ranks.writers) > 1:
            with ranks.together(target.name):
                exchange(ranks, temporary, written, receives=ranks.writes)
        with ranks.together(target.name):
            if ranks.writes:
                seal(temporary)
                put_in_place(target)
    except BaseException:
        if ranks.writes:
            shutil.rmtree(temporary, ignore_errors=True)
        raise


def save_tokenizer(tokenizer: Any, folder: Path) -> None:
    """Write ``tokenizer`` to ``folder``.

    Raises:
        OSError: the disk is full, read-only or failing, for which tokenizers raises a bare ``Exception``.
    """
    try:
        tokenizer.save_pretrained(folder)
    except Exception as error:
        if type(error) is not Exception:
            raise
        raise OSError(errno.EIO, str(error), str(folder)) from error


def _require_room(run: Path, least_bytes: int) -> None:
    """Fail before the first byte is written where the file system has no room for ``least_bytes``."""
    system = os.statvfs(run)
    free_bytes = system.f_bavail * system.f_frsize
    if system.f_blocks and free_bytes < least_bytes:
        raise OSError(
            errno.ENOSPC,
            f"it takes {format_bytes(least_bytes)} or more, and the disk has {format_bytes(free_bytes)} left",
            str(run),
        )


def is_adapted(model: Any) -> bool:
    """Return whether ``model`` carries LoRA adapters."""
    return bool(getattr(model, "peft_config", None))


def weights_to_save(model: Any, device: Device) -> dict[str, Savable]:
    """Return what a checkpoint keeps of the model: all of it, or with LoRA or frozen layers that are stored otherwise what trains."""
    if trained := _trained(model):
        return {name: save.savable(parameter) for name, parameter in trained.items()}
    return save.model_tensors(model, device)


def _trained(model: Any) -> dict[str, nn.Parameter]:
    """Return what trains, under its names in a checkpoint that keeps no more than that; else nothing."""
    if is_adapted(model):
        return lora.checkpoint_parameters(model)
    if frozen_layers.has_frozen_layers(model):
        return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    return {}


def _trained_file(model: Any) -> str | None:
    """Return the file of a checkpoint that keeps only what trains; ``None`` where it keeps the whole model."""
    if is_adapted(model):
        return "adapter_model.safetensors"
    return "trained.safetensors" if frozen_layers.has_frozen_layers(model) else None


def trainer_tensors(model: Any, optimizer: MemoryLeanOptimizer, loss_scale: LossScale) -> dict[str, Savable]:
    """Return what a checkpoint keeps beside the model, all on the device."""
    tensors: dict[str, Savable] = {
        f"parameter/{name}/{key}": save.savable(parameter, tensor, key)
        for name, parameter in model.named_parameters()
        if parameter.requires_grad
        for key, tensor in optimizer.state_tensors(sharding.local(parameter)).items()
    }
    return tensors | {f"loss_scale/{key}": tensor for key, tensor in loss_scale.tensors().items()}


def checksum(path: Path) -> str:
    """Return the BLAKE2b of the file ``path`` in hexadecimal."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(_HASHED_AT_ONCE):
            digest.update(chunk)
    return digest.hexdigest()


def stamp(checkpoint: Checkpoint) -> str:
    """Return what tells an undamaged checkpoint from every other."""
    return checksum(checkpoint.folder / _CHECKSUMS)


def damage(checkpoint: Checkpoint) -> str | None:
    """Return what is wrong with a checkpoint's files, or ``None`` where every one is what was written."""
    folder = checkpoint.folder
    try:
        text = (folder / _CHECKSUMS).read_bytes().decode()
        sums = json.loads(text)
        if not isinstance(sums, dict) or json.dumps(sums, indent=2) != text:
            return f"{_CHECKSUMS} is not what was written"
    except (OSError, ValueError, RecursionError) as error:
        return f"{_CHECKSUMS} cannot be read: {error}"
    try:
        found = {str(path.relative_to(folder)) for path in folder.rglob("*") if not path.is_dir()} - {_CHECKSUMS}
        for name, expected in sums.items():
            if name not in found:
                return f"{name} is missing"
            if checksum(folder / name) != expected:
                return f"{name} is not what was written"
        # A foreign note does no harm; these would be loaded.
        if foreign := sorted(name for name in found - sums.keys() if name.endswith((".safetensors", ".json"))):
            return f"{foreign[0]} was not written with it"
        if read_state(checkpoint)["step"] != checkpoint.step:
            return "it was renamed: trainer/state.json tells another step"
    except (OSError, KeyError) as error:
        return f"it cannot be read: {error}"
    return None


def newest_good(run: Path, say: Callable[[str], None]) -> Checkpoint | None:
    """Return the newest undamaged checkpoint of the run folder, telling ``say`` of each that is passed over.

    Those get another name, lest they count as checkpoints that are kept.

    Raises:
        CheckpointError: there are checkpoints and every one is damaged, or the folder cannot be written.
    """
    problems: dict[Checkpoint, str] = {}
    for checkpoint in reversed(list_checkpoints(run)):
        problem = damage(checkpoint)
        if problem is None:
            with clear_disk_errors(f"the run folder {run}"):
                for damaged in problems:
                    aside = damaged.folder.with_name(f"damaged-{damaged.folder.name}")
                    delete(aside)
                    damaged.folder.rename(aside)
            return checkpoint
        problems[checkpoint] = f"{checkpoint.folder.name}: {problem}"
        say(f"{problems[checkpoint]}; trying the one before it")
    if problems:
        raise CheckpointError(
            f"every checkpoint in {run} is damaged ({'; '.join(problems.values())}): remove them and start again without --resume"
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
        CheckpointError: the checkpoint was made with other trainable parts or another optimizer, or beside another model.
    """
    with device.phase("load"), torch.no_grad():
        file = _trained_file(model)
        if file is not None:
            began, now = read_state(checkpoint).get(BASE_SAMPLE), getattr(model, sample.NAME, None)
            if began and now and not sample.same(began, now):
                raise CheckpointError(
                    f"{checkpoint.folder} changes another model than the one in {spec.folder}, which was the run's: put that back, or start "
                    "anew in another output_dir"
                )
            trained = _trained(model)
            for name, tensor in _read(checkpoint.folder / file, set(trained), device):
                sharding.fill(trained[name], tensor)
        else:
            saved = replace(spec, folder=checkpoint.folder, base=spec.folder)
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
        else:
            set_random_state({name: tensor}, device)
    trained = {name for name, parameter in parameters.items() if parameter.requires_grad}
    try:
        if trained != by_parameter.keys():
            raise ValueError(f"it trained other parameters: {', '.join(sorted(trained ^ by_parameter.keys())[:5])}")
        for name, state in by_parameter.items():
            own = {key: sharding.part_of_state(parameters[name], tensor, key) for key, tensor in state.items()}
            optimizer.load_state_tensors(sharding.local(parameters[name]), own)
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
