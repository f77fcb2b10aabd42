"""The folder of a run: one process at a time in it, and metrics that outlast a full disk."""

from __future__ import annotations

import errno
import fcntl
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from oomless.errors import CheckpointError
from oomless.training import checkpoint
from oomless.training.run_files import EVALUATED, LOCK, MARKS, Process


@contextmanager
def locked(run: Path) -> Iterator[None]:
    """Hold the run folder for this process alone, which the lock names; the lock goes with the process, however it ends.

    Raises:
        CheckpointError: another process holds it, or it cannot be written or locked.
    """
    with checkpoint.clear_disk_errors(f"the run folder {run}"):
        run.mkdir(parents=True, exist_ok=True)
        file = (run / LOCK).open("ab", buffering=0)  # its text is another process's until the lock is held
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another run is writing to {run}: wait for it, or choose another output_dir"
            ) from error
        except OSError as error:
            raise CheckpointError(
                f"{run} cannot be locked against a second run ({error.strerror or error}): choose an output_dir on a file "
                "system that has locks"
            ) from error
        holder = Process.find(os.getpid())
        with checkpoint.clear_disk_errors(f"the run folder {run}"):
            file.truncate(0)
            file.write(b"" if holder is None else holder.to_json().encode())
        yield


def remove_leftovers(run: Path) -> None:
    """Remove what a killed run left half written or half removed; the run folder is locked."""
    with checkpoint.clear_disk_errors(f"the run folder {run}"):
        for pattern in (
            ".checkpoint-*.tmp",
            MARKS,
            ".checkpoint-*.old",
            ".model.*",
            ".*.json.tmp",
            ".*.jsonl.tmp",
            ".*.yaml.tmp",
        ):
            for path in run.glob(pattern):
                checkpoint.delete(path)


class Metrics:
    """``metrics.jsonl``: a line for each thing measured. What a full disk refuses is kept, and written when there is room."""

    def __init__(self, path: Path, say: Callable[[str], None]) -> None:
        self.path, self.say = path, say
        self.pending: list[bytes] = []

    def append(self, record: dict[str, Any]) -> None:
        """Write ``record`` and what could not be written before it."""
        known = bool(self.pending)
        self.pending.append(json.dumps(record).encode() + b"\n")
        try:
            self._write(b"".join(self.pending))
        except OSError as error:
            if not known:
                self.say(
                    f"{self.path} could not be written: {error.strerror or error}. The run goes on; its metrics are kept and "
                    "written when there is room."
                )
            return
        self.pending.clear()

    def _write(self, data: bytes) -> None:
        with self.path.open("ab", buffering=0) as file:
            end = file.seek(0, os.SEEK_END)
            try:
                if file.write(data) != len(data):
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            except OSError:
                file.truncate(end)
                raise

    def evaluated(self, step: int) -> dict[str, float]:
        """Return the losses by source of an evaluation after ``step`` that is written; empty where none is."""
        if not self.path.is_file():
            return {}
        for line in self.path.read_bytes().decode(errors="replace").splitlines():
            if _step_of(line) == step and EVALUATED in line:
                losses = json.loads(line).items()
                return {name.removeprefix(EVALUATED): loss for name, loss in losses if name.startswith(EVALUATED)}
        return {}

    def cut(self, step: int) -> None:
        """Forget what was measured after ``step``, or what a kill cut short.

        Raises:
            CheckpointError: the file cannot be written.
        """
        if not self.path.is_file():
            return
        with checkpoint.clear_disk_errors(str(self.path)):
            lines = self.path.read_bytes().decode(errors="replace").splitlines()
            checkpoint.write_atomically(self.path, "".join(f"{line}\n" for line in lines if _step_of(line) <= step))


def _step_of(line: str) -> float:
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):  # the line that a kill cut short
        return float("inf")
