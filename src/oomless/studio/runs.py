"""The room of runs: the run folders below the folders given, whoever trains there."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from oomless.errors import ConfigError
from oomless.report.charts import text
from oomless.report.run import Logged, Reader, charts_of, read_end, run_details, run_head
from oomless.studio.offers import folders_below
from oomless.training.run_files import CONFIG, LENGTH, LOCK, METRICS, MODEL, PREDICTION, ask_to_stop, writer
from oomless.units import format_bytes, short

MOST_READ = 16
"""So many runs are kept as they were read."""

OVERLAID = 8
"""So many runs are drawn over each other; there are no more colours."""

PRINTED = "studio.log"
"""What a run that was begun here prints."""

PRINTED_BYTES = 20_000
READ = (METRICS, CONFIG, PREDICTION, LENGTH, LOCK, PRINTED)
"""The files of a run that are read or written here; where one is a link, it may lead anywhere."""


@dataclass
class Runs:
    """The runs below ``folders``."""

    folders: Sequence[Path]
    _read: OrderedDict[Path, Reader] = field(default_factory=OrderedDict)
    _begun: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Kept to be asked how they ended, so that none stays a zombie."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self) -> dict[str, Path]:
        """Return every run folder by its name here. Nothing that leads out of the folders given is among them."""
        return {
            (str(path.relative_to(top.parent)) if len(self.folders) > 1 else str(path.relative_to(top))): path
            for top in self.folders
            for path in _below(top)
        }

    def list(self) -> list[dict[str, Any]]:
        """Return what the list of runs shows, what trains first, then the newest."""
        rows = []
        for name, path in self.found().items():
            logged = read_end(path)
            peak = logged.last("peak_memory_bytes")
            changed = max((file.stat().st_mtime for file in (path / METRICS, path / LOCK) if file.is_file()), default=0)
            rows.append(
                {
                    "name": name,
                    "state": self.state(path),
                    "step": f"{logged.steps:,}" + (f" of {logged.total_steps:,}" if logged.total_steps else ""),
                    "share": logged.steps / logged.total_steps if logged.total_steps else None,
                    "loss": f"{logged.last('loss'):.4f}" if "loss" in logged.values else "",
                    "speed": short(logged.last("tokens_per_second")) if "tokens_per_second" in logged.values else "",
                    "memory": format_bytes(int(peak)) if peak else "",
                    "changed": changed,
                }
            )
        return sorted(rows, key=lambda row: (row["state"] not in ("trains", "starts"), -float(row["changed"])))

    def state(self, run: Path) -> str:
        """Return what the run in ``run`` is doing."""
        begun = self._begun.get(run)
        if begun is not None and begun.poll() is not None:
            self._begun.pop(run, None)
        if writer(run) is not None:
            return "trains"
        if run in self._begun:
            return "starts"
        if (run / MODEL).is_dir():
            return "finished"
        return "stopped" if any(run.glob("checkpoint-*")) else "ended without a checkpoint"

    def parts(self, names: Sequence[str]) -> str:
        """Return what the page shows of the runs ``names``.

        Raises:
            ConfigError: there is no such run.
        """
        paths = [self._path(name) for name in names[:OVERLAID]]
        alone = paths[0] if len(paths) == 1 else None
        with self._lock:  # what is read grows, and is drawn as it was read
            logged = [self._logged(path) for path in paths if (path / METRICS).is_file()]
            return "".join(self._parts(logged, alone))

    def _parts(self, logged: Sequence[Logged], alone: Path | None) -> Iterator[str]:
        if alone is not None and logged:
            yield from run_head(logged[0])
        elif alone is not None:
            yield "<p>Nothing was measured yet.</p>"
        if logged:
            yield from charts_of(logged)
        if alone is not None:
            if logged:
                yield from run_details(logged[0])
            printed = _end_of(alone / PRINTED)
            if printed:
                yield f'<section><h2>What it printed</h2><pre tabindex="0">{text(printed)}</pre></section>'

    def stop(self, name: str) -> None:
        """Do what Ctrl-C does: the run finishes its step, saves and ends.

        Raises:
            ConfigError: it does not train on this machine.
        """
        if not ask_to_stop(self._path(name)):
            raise ConfigError(f"{name} does not train on this machine, so there is nothing to stop")

    def resume(self, name: str) -> None:
        """Let the run go on from its last checkpoint, in a process that outlives this one.

        Raises:
            ConfigError: it trains, or cannot go on.
        """
        run = self._path(name)
        command = [sys.executable, "-m", "oomless", "train", f"--config={run / CONFIG}", "--resume"]
        with self._lock, (run / PRINTED).open("ab") as printed:
            state = self.state(run)
            if state != "stopped":
                raise ConfigError(f"{name} cannot go on from a checkpoint: what it does is {state!r}, not 'stopped'")
            self._begun[run] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True
            )

    def _path(self, name: str) -> Path:
        found = self.found().get(name)
        if found is None:
            raise ConfigError(f"there is no run {name!r} below {' or '.join(map(str, self.folders))}")
        return found

    def _logged(self, path: Path) -> Logged:
        reader = self._read.pop(path, None) or Reader(path)
        self._read[path] = reader
        while len(self._read) > MOST_READ:
            self._read.popitem(last=False)
        return reader.read()


def _below(top: Path) -> Iterator[Path]:
    """Yield the run folders in ``top``; what is a link is not followed."""
    for path, folders, files in folders_below(top):
        if METRICS in files or (LOCK in files and writer(path) is not None):
            folders.clear()
            if not any((path / name).is_symlink() for name in READ):
                yield path


def _end_of(path: Path) -> str:
    """Return the last lines of a file; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - PRINTED_BYTES))
        return file.read().decode(errors="replace").strip()
