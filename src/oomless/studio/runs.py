"""The room of runs: the run folders below the folders given, whoever trains there."""

from __future__ import annotations

import subprocess
import sys
import threading
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from oomless.config import TrainConfig, plain, read
from oomless.errors import ConfigError
from oomless.export import comparison
from oomless.report.charts import text
from oomless.report.compare import section
from oomless.report.run import Logged, Reader, charts_of, read_end, run_details, run_head
from oomless.studio.offers import folders_below
from oomless.training.run_files import (
    COMPARISON,
    CONFIG,
    LENGTH,
    LOCK,
    METRICS,
    MODEL,
    PREDICTION,
    ask_to_stop,
    stage_folders,
    writer,
)
from oomless.units import format_bytes, short

MOST_READ = 16
"""So many runs are kept as they were read."""

OVERLAID = 8
"""So many runs are drawn over each other; there are no more colours."""

PRINTED = "studio.log"
"""What a run that was begun here prints."""

BEGUN = "studio.yaml"
"""The settings with which a run was begun here."""

GIVEN = {"data", "learning_rate", "num_train_epochs", "max_steps", "sample_prompts"}
"""What a run is given beside its plan."""

PRINTED_BYTES = 20_000
READ = (METRICS, CONFIG, PREDICTION, LENGTH, LOCK, COMPARISON, PRINTED, BEGUN)
"""The files of a run that are read or written here; where one is a link, it may lead anywhere."""


@dataclass
class Runs:
    """The runs below ``folders``."""

    folders: Sequence[Path]
    _read: OrderedDict[Path, Reader] = field(default_factory=OrderedDict)
    _begun: dict[Path, subprocess.Popen[bytes]] = field(default_factory=dict)
    """Kept to be asked how they ended, so that none stays a zombie."""
    _trained: set[Path] = field(default_factory=set)
    """Of those that were begun, which were seen to train."""
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def found(self) -> dict[str, Path]:
        """Return every run folder by its name here. Nothing that leads out of the folders given is among them."""
        return {
            (str(path.relative_to(top.parent)) if len(self.folders) > 1 else str(path.relative_to(top))): path
            for top in self.folders
            for path in _below(top)
        }

    def listed(self) -> list[dict[str, Any]]:
        """Return what the list of runs shows, what trains first, then the newest."""
        rows = []
        for name, path in self.found().items():
            logged = read_end(path)
            peak = logged.last("peak_memory_bytes")
            rows.append(
                {
                    "name": name,
                    "state": self.state(path),
                    "step": f"{logged.steps:,}" + (f" of {logged.total_steps:,}" if logged.total_steps else ""),
                    "share": logged.steps / logged.total_steps if logged.total_steps else None,
                    "loss": f"{logged.last('loss'):.4f}" if "loss" in logged.values else "",
                    "speed": short(logged.last("tokens_per_second")) if "tokens_per_second" in logged.values else "",
                    "memory": format_bytes(int(peak)) if peak else "",
                    "changed": _changed(path / METRICS, path / LOCK, path / BEGUN),
                }
            )
        return sorted(rows, key=lambda row: (row["state"] not in ("trains", "starts", "ends"), -float(row["changed"])))

    def state(self, run: Path) -> str:
        """Return what the run in ``run`` is doing."""
        begun = self._begun.get(run)
        if begun is not None and begun.poll() is not None:
            self._begun.pop(run, None)
        if writer(run) is not None:
            self._trained.add(run)
            return "trains"
        if run in self._begun:
            return "ends" if run in self._trained else "starts"
        if (run / MODEL).is_dir():
            return "finished"
        return "stopped" if any(run.glob("checkpoint-*")) or stage_folders(run) else "ended without a checkpoint"

    def parts(self, names: Sequence[str]) -> str:
        """Return what the page shows of the runs ``names``.

        Raises:
            ConfigError: there is no such run.
        """
        paths = [self.path(name) for name in names[:OVERLAID]]
        alone = paths[0] if len(paths) == 1 else None
        with self._lock:  # what is read grows, and is drawn as it was read
            logged = [self._logged(path) for path in paths if (path / METRICS).is_file() or stage_folders(path)]
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
        if not ask_to_stop(self.path(name)):
            raise ConfigError(f"{name} does not train on this machine, so there is nothing to stop")

    def resume(self, name: str) -> None:
        """Let the run go on from its last checkpoint, in a process that outlives this one.

        Raises:
            ConfigError: it trains, or cannot go on.
        """
        run = self.path(name)
        with self._lock:
            state = self.state(run)
            if state != "stopped":
                raise ConfigError(f"{name} cannot go on from a checkpoint: what it does is {state!r}, not 'stopped'")
            self._start(run, read_end(run).gpus, f"--config={run / CONFIG}", "--resume")

    def begin(self, name: str, settings: Mapping[str, Any], given: Mapping[str, str], gpus: int) -> str:
        """Begin the run ``name`` with ``settings`` and what is ``given`` beside them, in a process that outlives this one; return its name here.

        Raises:
            ConfigError: a folder of this name is there, it or the text lies outside the folders given, or the settings are no run's.
        """
        unknown = given.keys() - GIVEN
        if unknown:
            raise ConfigError(f"a run is not begun here with {', '.join(sorted(unknown))}: use oomless train")
        top = self.folders[0]
        run, data = (top / name).resolve(), (top / Path(given.get("data", "")).expanduser()).resolve()
        if not name.strip() or run == top or not run.is_relative_to(top):
            raise ConfigError(f"a run has a name below {top}; got {name!r}")
        if not given.get("data", "").strip() or not any(data.is_relative_to(one) for one in self.folders):
            raise ConfigError(f"the text lies in the folders that the studio was given; got {given.get('data', '')!r}")
        if not data.exists():
            raise ConfigError(f"there is no text at {data}")
        whole = read({**settings, **given, "data": str(data), "output_dir": str(run)})
        TrainConfig.from_mapping(whole)
        with self._lock:
            try:
                run.mkdir(parents=True)  # it is new, so that nobody else reads what is written there
                (run / BEGUN).write_text(
                    yaml.safe_dump(plain(whole), sort_keys=False, allow_unicode=True), encoding="utf-8"
                )
            except OSError as error:
                raise ConfigError(f"{run} cannot be begun: {error.strerror}; choose another name") from error
            self._start(run, gpus, f"--config={run / BEGUN}")
        return next(called for called, path in self.found().items() if path == run)

    def _start(self, run: Path, gpus: int, *options: str) -> None:
        """Start ``oomless train`` with ``options``, as one process for each of several GPUs."""
        several = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={gpus}"] if gpus > 1 else []
        command = [sys.executable, *several, "-m", "oomless", "train", *options]
        self._trained.discard(run)
        with (run / PRINTED).open("ab") as printed:
            self._begun[run] = subprocess.Popen(
                command, stdin=subprocess.DEVNULL, stdout=printed, stderr=printed, start_new_session=True
            )

    def compared(self) -> list[dict[str, Any]]:
        """Return every run with when it was compared with the model that it began with; 0 where it never was."""
        return [{"name": name, "compared": _changed(path / COMPARISON)} for name, path in self.found().items()]

    def comparison(self, name: str) -> str:
        """Return the last comparison of a run as a part of a page; empty where there is none.

        Raises:
            ConfigError: there is no such run.
        """
        found = comparison.read(self.path(name))
        return "" if found is None else section(found)

    def path(self, name: str) -> Path:
        """Return the folder of a run.

        Raises:
            ConfigError: there is no such run.
        """
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
        if METRICS in files or stage_folders(path) or BEGUN in files or (LOCK in files and writer(path) is not None):
            folders.clear()
            if not any((path / name).is_symlink() for name in READ):
                yield path


def _changed(*paths: Path) -> float:
    """Return when the last of ``paths`` changed; 0 where none is there."""
    return max((path.stat().st_mtime for path in paths if path.is_file()), default=0.0)


def _end_of(path: Path) -> str:
    """Return the last lines of a file; empty where there is none."""
    if not path.is_file():
        return ""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - PRINTED_BYTES))
        return file.read().decode(errors="replace").strip()
