"""What lies in a run folder, by name, and which process writes to it. Without torch, for who only looks.

The process is named in the run's lock by its number, the moment it started and the boot of its machine. Numbers are given out again;
the three together are not, so a process that is found by them is the one that wrote them.
"""

from __future__ import annotations

import json
import os
import re
import signal
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

METRICS = "metrics.jsonl"
CONFIG = "config.yaml"
PREDICTION = "prediction.json"
"""The plan of a run, as ``oomless plan`` gives it; there where the run has a limit and could be planned."""

COMPARISON = "compare.json"
"""What ``oomless compare`` found last of a run."""

LENGTH = "length.json"
"""How many steps a run has, or how many stages, and on how many GPUs it trains."""

MODEL = "model"
"""The folder of the final model."""

TRACKED = "trackers.json"
"""By what names the programs that are told the metrics know the run."""

MARKS = ".machine-*"
"""By which machines find out whether they see the same run folder."""

LOCK = ".lock"
EVALUATED = "eval_loss/"
"""What names of validation losses begin with."""

SAMPLES = "samples"
"""What the model wrote at an evaluation is called in the metrics: a list of mappings with ``prompt`` and ``text``."""

BITS_PER_BYTE = "bits_per_byte/"
"""What names of the same begin with where they are told by the byte, which compares tokenizers."""

_PROC = Path("/proc")
_STAGE = re.compile(r"stage-(\d+)(-.*)?")


def stage_folders(run: Path) -> list[Path]:
    """Return the folders of the stages that have begun in ``run``, in their order; none where it has no stages."""
    found = [(_STAGE.fullmatch(path.name), path) for path in run.glob("stage-*") if (path / CONFIG).is_file()]
    return [path for _, path in sorted((int(match[1]), path) for match, path in found if match)]


@dataclass(frozen=True, slots=True)
class Process:
    """A process, as nothing else but itself can be named."""

    pid: int
    started: int
    """In ticks of its machine's clock since it was booted."""
    boot: str

    @classmethod
    def find(cls, pid: int) -> Process | None:
        """Return the process that has this number now; ``None`` where there is none, or the system does not say."""
        try:
            # The name of a program stands in brackets and may hold any character.
            fields = (_PROC / str(pid) / "stat").read_text(errors="replace").rpartition(")")[2].split()
            boot = (_PROC / "sys/kernel/random/boot_id").read_text().strip()
            return None if fields[0] in "ZX" else cls(pid, int(fields[19]), boot)
        except (OSError, ValueError, IndexError):
            return None

    def to_json(self) -> str:
        """Return it as the lock holds it."""
        return json.dumps(asdict(self))


def writer(run: Path) -> Process | None:
    """Return the living process that holds the lock of ``run``; ``None`` where none does, or it is not of this machine."""
    try:
        named = json.loads((run / LOCK).read_text())
        process = Process(int(named["pid"]), int(named["started"]), str(named["boot"]))
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return process if process.pid > 0 and Process.find(process.pid) == process else None


def ask_to_stop(run: Path) -> bool:
    """Do to the run in ``run`` what Ctrl-C does, and return whether there is one."""
    process = writer(run)
    if process is None:
        return False
    with suppress(ProcessLookupError):
        # What is opened stays the same process; asked after that, nothing else can have taken its number.
        opened = os.pidfd_open(process.pid)
        try:
            if Process.find(process.pid) == process:
                signal.pidfd_send_signal(opened, signal.SIGINT)
                return True
        finally:
            os.close(opened)
    return False
