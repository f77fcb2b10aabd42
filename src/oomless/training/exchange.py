"""Files of which each machine has written a part, made whole on all of them over the network.

Machines that share no file system have each a run folder of their own, and all of a run is in every one of them: so it goes on from any, in
any number of processes, and a machine that is lost with its disk takes nothing along. What a process wrote is in its machine's files;
the first process of each machine reads it there, sends it to those of the others, 16 MiB at a time, and they write it where it belongs.
What comes over the network is once the size of the checkpoint for each machine, as much as sharded training gathers in a few steps.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from torch.utils._python_dispatch import _disable_current_modes

from oomless.training.distributed import Ranks

_AT_ONCE_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, order=True)
class Stretch:
    """Bytes of a file that follow each other."""

    file: str
    start: int
    size: int


def whole_files(folder: Path, pattern: str = "**/*") -> list[Stretch]:
    """Return all of the files in ``folder`` that ``pattern`` matches."""
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    return [Stretch(str(path.relative_to(folder)), 0, path.stat().st_size) for path in paths]


def exchange(ranks: Ranks, folder: Path, own: Iterable[Stretch], *, receives: bool) -> None:
    """Send what this process has written of the files in ``folder``, its ``own``, to all machines whose folder is another.

    All processes call it together; ``receives`` says whether this one writes what comes.

    Raises:
        OSError: a file cannot be read here or written here.
    """
    groups = ranks.groups
    assert groups is not None
    by_writer: dict[int, list[Stretch]] = {}
    for writer, stretches in groups.tell((ranks.writer, sorted(own))):
        by_writer.setdefault(writer, []).extend(stretches)
    if ranks.rank not in groups.machines:
        return
    failure: OSError | None = None
    for writer, stretches in sorted(by_writer.items()):
        for batch in _batches(_joined(stretches)):
            sent = torch.empty(sum(one.size for one in batch), dtype=torch.uint8)
            # Whoever fails goes on with the others, which wait for it, and says so at the end.
            try:
                if ranks.rank == writer:
                    _read(folder, batch, sent)
            except OSError as error:
                failure = error
            with _disable_current_modes():
                dist.broadcast(sent, src=writer, group=groups.between)
            try:
                if receives and ranks.rank != writer and failure is None:
                    _write(folder, batch, sent)
            except OSError as error:
                failure = error
    if failure is not None:
        raise failure


def _joined(stretches: Iterable[Stretch]) -> Iterator[Stretch]:
    """Yield ``stretches`` in order, those that follow each other as one."""
    last: Stretch | None = None
    for one in sorted(stretches):
        if last is not None and (one.file, one.start) == (last.file, last.start + last.size):
            last = Stretch(last.file, last.start, last.size + one.size)
            continue
        if last is not None:
            yield last
        last = one
    if last is not None:
        yield last


def _batches(stretches: Iterable[Stretch]) -> Iterator[list[Stretch]]:
    """Yield ``stretches``, cut where need be, in lists that are sent at once."""
    batch: list[Stretch] = []
    room = _AT_ONCE_BYTES
    for one in stretches:
        begin, end = one.start, one.start + one.size
        while True:
            size = min(room, end - begin)
            batch.append(Stretch(one.file, begin, size))
            begin, room = begin + size, room - size
            if not room:
                yield batch
                batch, room = [], _AT_ONCE_BYTES
            if begin == end:
                break
    if batch:
        yield batch


def _read(folder: Path, batch: list[Stretch], into: torch.Tensor) -> None:
    for one, place in zip(batch, torch.split(into, [one.size for one in batch]), strict=True):
        with (folder / one.file).open("rb") as file:
            file.seek(one.start)
            if file.readinto(place.numpy().data) != one.size:
                raise OSError(f"{folder / one.file} is shorter than what was written to it")


def _write(folder: Path, batch: list[Stretch], sent: torch.Tensor) -> None:
    for one, place in zip(batch, torch.split(sent, [one.size for one in batch]), strict=True):
        path = folder / one.file
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT, 0o666)
        with os.fdopen(descriptor, "wb") as file:
            file.seek(one.start)
            file.write(place.numpy().data)
