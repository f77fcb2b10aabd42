"""The child process of ``oomless rehearse``: runs the user's script on the rehearsed GPU, and writes what it found.

The script's folder comes first on ``sys.path`` and its arguments are its own, as when Python runs it. Nothing of the user's is
written: files opened for writing lie in a scratch folder that goes away, and what saves tensors saves nothing. It may take half
of the host's free memory.
"""

from __future__ import annotations

import builtins
import io
import json
import os
import resource
import runpy
import sys
import sysconfig
import traceback
from collections.abc import Callable
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from oomless.hardware import available_host_bytes
from oomless.planning.plan import target_for
from oomless.programs import cuda
from oomless.programs.stage import Stage

BATCHES_AFTER = 2
"""Batches that a loader gives once enough steps were run: an evaluation's, most often."""


class Enough(BaseException):
    """The program has shown its steps."""


def main() -> None:
    """Rehearse what the file named first says, and write the answer to the file named second."""
    most = available_host_bytes() // 2
    resource.setrlimit(resource.RLIMIT_DATA, (most, most))
    question, answer = (Path(name) for name in sys.argv[1:])
    found = rehearse(json.loads(question.read_text(encoding="utf-8")))
    answer.write_text(json.dumps(found), encoding="utf-8")


def rehearse(asked: dict[str, Any]) -> dict[str, Any]:
    """Run the script of ``asked`` and return what its memory was."""
    script = Path(asked["script"]).resolve()
    stage = Stage(
        target_for(asked["gpu"]),
        owner_of(script.parent),
        limited=asked["limited"],
        snapshot=asked.get("snapshot") is not None,
    )
    ended: dict[str, Any] = {"how": "ran to its end"}
    with stage.active(), cuda.patched(_changes(stage, Path(asked["scratch"]), asked["steps"])):
        try:
            sys.argv = [str(asked["script"]), *asked["arguments"]]
            sys.path[0] = str(script.parent)
            runpy.run_path(str(script), run_name="__main__")
        except Enough:
            ended = {"how": f"was stopped after {stage.steps} optimizer steps"}
        except SystemExit as error:
            ended = {"how": "ran to its end"} if not error.code else _broken(stage, error)
        except torch.OutOfMemoryError as error:
            ended = {"how": "ran out of memory", "message": str(error), "line": _line_of(stage, error)}
        except BaseException as error:
            ended = _broken(stage, error)
        profile = stage.gpu.profile()
    if asked.get("snapshot"):
        from oomless.memory.snapshot import write_snapshot

        write_snapshot(stage.gpu.allocator, asked["snapshot"])
    return {
        "ended": ended,
        "steps": stage.steps,
        "joined": stage.processes.joined,
        "profile": profile.to_dict(),
        "line": str(stage.highest_line or ""),
        "assumed": dict(stage.stand_ins.assumed),
    }


def owner_of(folder: Path) -> Callable[[str], bool]:
    """Return what says whether a file is the user's own: below ``folder``, and no installed library."""
    libraries = tuple(sysconfig.get_paths().values())

    def own(name: str) -> bool:
        return name.startswith(str(folder)) and not name.startswith(libraries) and "site-packages" not in name

    return own


def _broken(stage: Stage, error: BaseException) -> dict[str, Any]:
    return {
        "how": "stopped with an error",
        "message": f"{type(error).__name__}: {error}",
        "line": _line_of(stage, error),
        "traceback": "".join(traceback.format_exception(error)),
    }


def _line_of(stage: Stage, error: BaseException) -> str:
    """Return the innermost line of the user's own code in the traceback of ``error``."""
    found = ""
    for frame, number in traceback.walk_tb(error.__traceback__):
        if stage.own(frame.f_code.co_filename):
            found = f"{Path(frame.f_code.co_filename).name}:{number} in {frame.f_code.co_name}"
    return found


def _changes(stage: Stage, scratch: Path, steps: int) -> list[tuple[Any, str, Any]]:
    """Return what is to be patched so that the program is short, and writes nothing of the user's."""
    loader = torch.utils.data.DataLoader
    iterate, first_end = loader.__iter__, [0]

    def enough() -> None:
        if stage.steps >= 3 * steps or (first_end[0] and stage.steps > first_end[0]):
            raise Enough

    def batches(self: Any) -> Any:
        if stage.steps >= steps:
            return islice(iterate(self), BATCHES_AFTER)
        return _until(iterate(self))

    def _until(whole: Any) -> Any:
        for batch in whole:
            if stage.steps >= steps:
                first_end[0] = stage.steps
                return
            yield batch

    stage.after_step = enough
    return [(loader, "__iter__", batches), *_writing_nothing(scratch.resolve())]


def _writing_nothing(scratch: Path) -> list[tuple[Any, str, Any]]:
    """Return what is to be patched so that files land in ``scratch``, and nothing of the user's is removed or replaced."""
    opened, made = builtins.open, os.mkdir

    def elsewhere(file: Any) -> Path | None:
        """Return where ``file`` is to lie instead; ``None`` where it may lie where it is."""
        if not isinstance(file, (str, bytes, os.PathLike)):
            return None
        path = Path(os.path.abspath(os.fsdecode(file)))
        if path.is_relative_to(scratch) or path.is_relative_to("/dev") or path.is_relative_to("/proc"):
            return None
        return scratch / "written" / path.relative_to(path.anchor)

    def open_there(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        there = elsewhere(file) if set(mode) & set("wax+") else None
        if there is not None:
            os.makedirs(there.parent, exist_ok=True)
        return (found_there(opened) if there is None else opened)(there or file, mode, *args, **kwargs)

    def make_there(path: Any, *args: Any, **kwargs: Any) -> None:
        there = elsewhere(path)
        if there is None:
            made(path, *args, **kwargs)
        else:
            os.makedirs(there, exist_ok=True)

    def found_there(function: Any) -> Any:
        """Let ``function`` see what was written, where nothing of the user's has that name."""

        def called(path: Any = ".", *args: Any, **kwargs: Any) -> Any:
            try:
                return function(path, *args, **kwargs)
            except FileNotFoundError:
                there = elsewhere(path)
                if there is None:
                    raise
                return function(there, *args, **kwargs)

        return called

    def unless_theirs(function: Any) -> Any:
        def called(path: Any, *args: Any, **kwargs: Any) -> Any:
            return function(path, *args, **kwargs) if elsewhere(path) is None else None

        return called

    def nothing(*args: Any, **kwargs: Any) -> None: ...

    import safetensors.torch

    return [
        (builtins, "open", open_there),
        (io, "open", open_there),
        (os, "mkdir", make_there),
        *((os, name, found_there(getattr(os, name))) for name in ("stat", "lstat", "listdir", "scandir")),
        *((os, name, unless_theirs(getattr(os, name))) for name in ("remove", "unlink", "rmdir", "rename", "replace")),
        (torch, "save", nothing),
        (safetensors.torch, "_flatten", lambda tensors: {}),
        (safetensors.torch, "serialize_file", nothing),
    ]


if __name__ == "__main__":
    main()
