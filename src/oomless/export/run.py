"""An export: written beside its place, checked, and moved there; what was killed goes on where it was."""

from __future__ import annotations

import errno
import fcntl
import json
import shutil
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oomless import __version__
from oomless.errors import CheckpointError, ModelError
from oomless.export import card, stream, verify
from oomless.export.plan import Plan, recorded
from oomless.export.source import RECORD
from oomless.training import checkpoint

Say = Callable[[str, float], None]
"""Is told what is being done, and what share of it is."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Exported:
    """An export that is there."""

    folder: Path
    was_there: bool
    """Whether an earlier one had done all of it."""

    checked: verify.Checked

    def to_dict(self) -> dict[str, Any]:
        """Return all of this, for a program."""
        return {"folder": str(self.folder), "was_there": self.was_there, "verified": self.checked.to_dict()}


def export(plan: Plan, say: Say = lambda text, share: None) -> Exported:
    """Do what ``plan`` says.

    Raises:
        CheckpointError: the disk is full, read-only or failing, or the place is taken.
        ModelError: what was written is not what was trained; it is marked as bad.
    """
    target, temporary = plan.target, checkpoint.temporary_folder(plan.target)
    if target.exists():
        if recorded(target).get("key") != plan.key:
            raise CheckpointError(
                f"{target} is there already and holds something else: remove it, or give another --output"
            )
        return Exported(folder=target, was_there=True, checked=verify.Checked.of(recorded(target)["verified"]))
    with _clear_disk_errors(target), _owned(temporary, plan.key):
        _write(plan, temporary, say)
        try:
            checked = verify.check(plan, temporary, say)
        except ModelError as error:
            bad = target.with_name(f"{target.name}.bad")
            checkpoint.delete(bad)
            temporary.rename(bad)
            raise ModelError(f"{error}; it was marked as bad: {bad}") from error
        record: dict[str, Any] = {
            "key": plan.key,
            "oomless": __version__,
            "to": plan.to,
            "numbers": plan.files.dtype,
            "from": str(plan.source.folder),
            "base": plan.source.began_with,
            "step": None if plan.source.saved is None else plan.source.saved.step,
            "verified": checked.to_dict(),
        }
        if plan.to == "adapter":
            record[checkpoint.BASE_SAMPLE] = plan.source.base_sample
        (temporary / RECORD).write_text(json.dumps(record, indent=2), encoding="utf-8")
        checkpoint.put_in_place(target)
    return Exported(folder=target, was_there=False, checked=checked)


def _write(plan: Plan, folder: Path, say: Say) -> None:
    done, total = 0, plan.disk_bytes

    def progress(more: int) -> None:
        nonlocal done
        done += more
        say("writing", done / total)

    for name, contents in plan.files.streams.items():
        stream.write(folder / name, contents, progress)
    plan.files.describe(folder)
    card.write(plan, folder)


@contextmanager
def _owned(folder: Path, key: str) -> Iterator[None]:
    """Have ``folder`` for this process alone, with what an earlier export of ``key`` left in it and nothing else."""
    folder.mkdir(parents=True, exist_ok=True)
    try:
        file = (folder / RECORD).open("a+", encoding="utf-8")
    except OSError:
        with suppress(OSError):  # what an earlier export left in it stays
            folder.rmdir()
        raise
    with file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise CheckpointError(
                f"another export is writing to {folder}: wait for it, or give another --output"
            ) from error
        if recorded(folder).get("key") != key:
            for path in folder.iterdir():
                if path.name != RECORD:
                    checkpoint.delete(path)
        try:
            file.truncate(0)
            file.write(json.dumps({"key": key}))
            file.flush()
            yield
        except Exception:
            shutil.rmtree(folder, ignore_errors=True)
            raise


@contextmanager
def _clear_disk_errors(target: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        room = "make room, or give another --output" if error.errno == errno.ENOSPC else "give another --output"
        raise CheckpointError(f"{target} could not be written: {error.strerror or error}: {room}") from error
