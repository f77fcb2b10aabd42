"""``oomless rehearse``: a user's own script in a child process, on a GPU that is not there, and what comes of it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from oomless.errors import ConfigError, TrainingError
from oomless.memory.profile import MemoryProfile
from oomless.planning.plan import Target, target_for

STEPS = 3
_ASKS_FOR_OTHERS = "environment variable RANK expected"
SCHEMA = 1


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramAnswer:
    """What the rehearsal of a program found."""

    script: str
    target: Target
    """The GPU, each of them where there are several."""

    ended: str
    """How it ended, to be read after the script's name."""

    steps: int
    """Optimizer steps that were run."""

    profile: MemoryProfile
    """What it held, where memory has no end."""

    line: str
    """The user's line that ran at the peak; empty where none of theirs did."""

    assumed: Mapping[str, int]
    """What was answered where a value was asked for that does not exist, and how often."""

    message: str | None
    """PyTorch's message where the GPU's memory ended, else ``None``."""

    stopped_at: str
    """The user's line at which it stopped; empty where it did not."""

    @property
    def fits(self) -> bool:
        """Whether it got through in the GPU's memory."""
        return self.message is None

    @property
    def needed_bytes(self) -> int:
        """The most that the allocator reserved, where memory has no end."""
        return self.profile.peak_reserved_bytes

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON; ``schema`` counts up where their meaning changes."""
        return {
            "schema": SCHEMA,
            "script": self.script,
            "gpu": self.target.name,
            "fits": self.fits,
            "ended": self.ended,
            "steps": self.steps,
            "needed_bytes": self.needed_bytes,
            "usable_bytes": self.target.usable_bytes,
            "message": self.message,
            "stopped_at": self.stopped_at,
            "line_at_peak": self.line,
            "assumed": dict(self.assumed),
            "profile": self.profile.to_dict(),
        }


def rehearse_program(
    script: Path,
    gpu: str,
    arguments: Sequence[str] = (),
    *,
    steps: int = STEPS,
    snapshot: Path | None = None,
    debug: bool = False,
) -> ProgramAnswer:
    """Run ``script`` with its ``arguments`` on ``gpu``, which need not be here, until it has made ``steps`` optimizer steps.

    On several GPUs (``2xT4``, or ``2x8xH100`` on two machines) it is the first of as many processes, as torchrun starts them.

    Raises:
        ConfigError: there is no such script, it stopped with an error of its own, or what is asked for makes no sense.
        HardwareError: no such GPU is known.
        TrainingError: the script made no use of the GPU, or its process ended without an answer.
    """
    target = target_for(gpu)
    if not script.is_file():
        raise ConfigError(f"the script to rehearse is a Python file; {script} is none")
    if steps < 2:
        raise ConfigError(f"steps must be at least 2, since the first makes the optimizer's state; got {steps}")
    asked = {"script": str(script), "gpu": gpu, "arguments": list(arguments), "steps": steps}
    limited = _in_child({**asked, "snapshot": snapshot and str(snapshot.resolve()), "limited": True}, debug)
    stopped = limited["ended"]["how"] == "ran out of memory"
    found = _in_child({**asked, "limited": False}, debug) if stopped else limited
    profile = MemoryProfile.from_dict(found["profile"])
    if profile.peak is None:
        raise TrainingError(
            f"{script.name} {found['ended']['how']} and put nothing on the GPU: there is nothing to predict. It must train on "
            "the device 'cuda', in this process."
        )
    if not found["joined"]:
        raise ConfigError(
            f"{script.name} does not know of several GPUs: it joined no other process (init_process_group, accelerate, Trainer), so "
            f"{gpu} has no effect: rehearse it on one of them"
        )
    return ProgramAnswer(
        script=script.name,
        target=target,
        ended=found["ended"]["how"],
        steps=found["steps"],
        profile=profile,
        line=found["line"],
        assumed=found["assumed"],
        message=limited["ended"]["message"] if stopped else None,
        stopped_at=limited["ended"]["line"] if stopped else "",
    )


def compare_programs(script: Path, gpus: Sequence[str], arguments: Sequence[str], *, steps: int) -> list[ProgramAnswer]:
    """Return the answer for each of ``gpus``; GPUs that take the same kernels share one rehearsal where it fits them."""
    answers: dict[tuple[int, int, tuple[int, int]], ProgramAnswer] = {}
    compared = []
    for gpu in gpus:
        target = target_for(gpu)
        kind = (target.gpus, target.machines, target.compute_capability)
        known = answers.get(kind)
        if known is None or not known.fits or known.needed_bytes > target.usable_bytes:
            known = rehearse_program(script, gpu, arguments, steps=steps)
            answers[kind] = known
        compared.append(replace(known, target=target))
    return compared


def _in_child(asked: dict[str, Any], debug: bool) -> dict[str, Any]:
    """Return what the child process finds; what the script prints goes to standard error."""
    with tempfile.TemporaryDirectory(prefix="oomless-rehearse-") as folder:
        question, answer = Path(folder, "asked.json"), Path(folder, "answer.json")
        question.write_text(json.dumps({**asked, "scratch": folder}), encoding="utf-8")
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join(filter(None, sys.path)),
            "HF_HUB_OFFLINE": "1",
            "TORCH_CPP_LOG_LEVEL": "ERROR",
        }
        done = subprocess.run(
            [sys.executable, "-m", "oomless.programs.child", str(question), str(answer)],
            stdout=sys.stderr.fileno() if _has_descriptor() else subprocess.DEVNULL,
            env=environment,
        )
        if not answer.is_file():
            raise TrainingError(
                f"the process that rehearsed {asked['script']} ended with code {done.returncode} and no answer; what it "
                "printed is above"
            )
        found: dict[str, Any] = json.loads(answer.read_text(encoding="utf-8"))
    if found["ended"]["how"] == "stopped with an error":
        at, message = f" at {found['ended']['line']}" if found["ended"]["line"] else "", found["ended"]["message"]
        several = (
            " (several GPUs are rehearsed as torchrun starts them: --gpu 2xT4)" if _ASKS_FOR_OTHERS in message else ""
        )
        raise ConfigError(
            f"{asked['script']} cannot be rehearsed: it stopped{at}: {message}{several}"
            + (f"\n{found['ended']['traceback']}" if debug else " (--debug prints the traceback)")
        )
    return found


def _has_descriptor() -> bool:
    try:
        return sys.stderr.fileno() >= 0
    except (OSError, ValueError):
        return False
