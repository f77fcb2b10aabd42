"""What an export will take, said before it begins: the largest tensor is made and timed, all else is counted."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any, Literal

from oomless import __version__
from oomless.errors import CheckpointError, ConfigError, HardwareError
from oomless.export.adapter import file_of
from oomless.export.formats import Files, To, files
from oomless.export.source import RECORD, Source, find
from oomless.export.stream import Piece
from oomless.hardware import available_host_bytes
from oomless.memory.device import Device
from oomless.training import checkpoint
from oomless.units import MiB, format_bytes

Verify = Literal["full", "sample", "none"]
_BESIDE_BYTES = 32 * MiB
"""What tokenizer, config and card take at most."""

_BEGINNING_S = 2.0
"""What is made in less may have taken most of it to begin, and is timed again."""


@dataclass(frozen=True, kw_only=True)
class Plan:
    """An export that has not begun."""

    place: Path
    source: Source
    to: To
    quantize: str | None
    files: Files
    target: Path
    verify: Verify
    host_bytes: int
    """What the process holds at most while it writes."""

    seconds: float
    begun_bytes: int
    """What an earlier export of the same left behind, and need not be written again."""

    key: str
    """Another one of the same key has the same bytes."""

    @cached_property
    def disk_bytes(self) -> int:
        """What the export takes on the disk."""
        return sum(stream.size for stream in self.files.streams.values())

    def to_dict(self) -> dict[str, Any]:
        """Return what it takes, for a program."""
        return {
            "from": str(self.source.folder),
            "base": self.source.began_with,
            "target": str(self.target),
            "to": self.to,
            "numbers": self.files.dtype,
            "verify": self.verify,
            "disk_bytes": self.disk_bytes,
            "free_bytes": self.free_bytes,
            "host_bytes": self.host_bytes,
            "seconds": self.seconds,
            "begun_bytes": self.begun_bytes,
            "notes": list(self.files.notes),
        }

    @property
    def free_bytes(self) -> int:
        """What the disk of the target has left."""
        return shutil.disk_usage(_existing(self.target)).free


def make_plan(
    place: Path,
    to: To,
    *,
    dtype: str | None = None,
    quantize: str | None = None,
    which: str | None = None,
    base: str | None = None,
    output: Path | None = None,
    verify: Verify | None = None,
) -> Plan:
    """Return what the export of ``place`` as ``to`` takes; nothing is written.

    Args:
        place: the folder of a run, a checkpoint, an adapter or a model.
        to: the form.
        dtype: fp32, bf16 or fp16; by default that of the training.
        quantize: how matrices of a GGUF file are stored.
        which: the checkpoint of a run: its step, last, best or final.
        base: the model that an adapter changes, where it is not where it was.
        output: the folder to write; by default one inside the run's.
        verify: how the result is checked; by default as a whole where the host has the memory.

    Raises:
        UserError: it cannot be exported so, or there is no room for it.
    """
    source = find(place, which, base)
    wanted = output or _target(place, source, to, dtype, quantize, which)
    if source.saved is not None and (problem := checkpoint.damage(source.saved)) is not None:
        raise CheckpointError(f"{source.folder} is damaged: {problem}; name another one with --checkpoint")
    made = files(source, to, dtype, quantize)
    total = sum(stream.size for stream in made.streams.values())
    largest = max((piece for stream in made.streams.values() for piece in stream.pieces), key=lambda piece: piece.size)
    host_bytes, seconds_a_byte = _rehearse(largest, wanted)
    # Loaded as a whole: in fp32, twice while its form is changed.
    whole = 2 * 4 * made.parameters
    fits = whole < available_host_bytes()
    if verify == "full" and not made.loads:
        raise ConfigError(
            f"transformers does not read GGUF files of {source.base.config.model_type}: use --verify sample"
        )
    if verify == "full" and not fits:
        raise HardwareError(
            f"--verify full loads the whole model and wants {format_bytes(whole)} of memory; {format_bytes(available_host_bytes())} is "
            "free: use --verify sample"
        )
    verified: Verify = verify or ("full" if fits and made.loads else "sample")
    key = _key(source, to, dtype, quantize)
    passes = {"none": 1, "sample": 2, "full": 3}[verified]
    plan = Plan(
        place=place,
        source=source,
        to=to,
        quantize=quantize,
        files=made,
        target=wanted,
        verify=verified,
        host_bytes=host_bytes,
        seconds=seconds_a_byte * total * passes,
        begun_bytes=_begun(wanted, key),
        key=key,
    )
    _require_room(plan)
    return plan


def _target(place: Path, source: Source, to: To, dtype: str | None, quantize: str | None, which: str | None) -> Path:
    run = place if source.folder != place else place.parent if source.saved is not None else None
    if run is None:
        raise ConfigError(f"{place} is no run's folder, so say where the export goes: --output FOLDER")
    named = source.saved is not None and (source.folder == place or which not in (None, "final"))
    parts = [to, quantize or dtype, f"step-{source.saved.step}" if named and source.saved is not None else None]
    return run / "export" / "-".join(part for part in parts if part)


def _existing(path: Path) -> Path:
    return next(parent for parent in [path.absolute(), *path.absolute().parents] if parent.is_dir())


def _rehearse(piece: Piece, target: Path) -> tuple[int, float]:
    """Make the largest piece, and write some of it beside ``target``: what the process holds at most, and seconds a byte."""
    if 3 * piece.size > available_host_bytes():
        raise HardwareError(
            f"{piece.name} is made in {format_bytes(3 * piece.size)} of memory; {format_bytes(available_host_bytes())} is free"
        )
    device, folder = Device(), _existing(target)
    resident = device.usage().allocated_bytes

    def make() -> None:
        with TemporaryFile(dir=folder) as file:
            for part in piece.make():
                file.seek(0)
                file.write(memoryview(part).cast("B")[: 64 * MiB])

    try:
        began = time.perf_counter()
        beyond = device.most_beyond(make)
        seconds = time.perf_counter() - began
        if seconds < _BEGINNING_S:
            began = time.perf_counter()
            make()
            seconds = time.perf_counter() - began
    except OSError as error:
        raise CheckpointError(f"nothing can be written to {folder}: {error.strerror}; give another --output") from error
    return resident + beyond, seconds / max(1, piece.size)


def _require_room(plan: Plan) -> None:
    need = plan.disk_bytes + _BESIDE_BYTES - plan.begun_bytes
    if plan.free_bytes < need:
        raise CheckpointError(
            f"the export takes {format_bytes(need)} on the disk of {_existing(plan.target)}, which has {format_bytes(plan.free_bytes)} "
            "left: make room, or give another --output"
        )


def _begun(target: Path, key: str) -> int:
    folder = checkpoint.temporary_folder(target)
    if recorded(folder).get("key") != key:
        return 0
    return sum(path.stat().st_size for path in folder.iterdir() if path.is_file())


def recorded(folder: Path) -> dict[str, Any]:
    """Return what the record of the export in ``folder`` says; nothing where there is none."""
    try:
        found = json.loads((folder / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def _key(source: Source, *wanted: str | None) -> str:
    """Return a digest of all that the bytes of an export rest on."""
    told = [__version__, *wanted, *stamps(source)]
    return hashlib.blake2b(json.dumps(told).encode(), digest_size=16).hexdigest()


def stamps(source: Source) -> Iterator[str]:
    """Yield what tells whether a file of ``source`` or of the model that it changes is another one than before."""
    folders = {source.folder, source.base.folder}
    if source.kind != "model":
        yield str(file_of(source))
    for folder in sorted(str(folder) for folder in folders):
        for entry in sorted(os.scandir(folder), key=lambda entry: entry.name):
            if entry.is_file():
                told = entry.stat()
                yield f"{folder}/{entry.name} {told.st_size} {told.st_mtime_ns}"
