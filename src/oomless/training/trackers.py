"""Where a run's metrics go beside ``metrics.jsonl``: to programs that draw them, each through its own library.

None of them ever ends a run. What one of them cannot do is said once, and it is told no more; ``metrics.jsonl`` has everything.
A run that goes on is the same run there: what names it is kept in its folder.
"""

from __future__ import annotations

import json
import os
import re
import time
import uuid
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.training import checkpoint
from oomless.training.run_files import TRACKED

PROJECT = "oomless"
"""What the project is called where the program's own variable does not say it."""

_NOT_A_NAME = re.compile(r"[^\w\-./: ]")
"""What MLflow takes in no name."""


@dataclass(frozen=True, slots=True)
class Place:
    """What a tracker has to know of the run."""

    folder: Path
    settings: Mapping[str, Any]
    step: int | None
    """From which checkpoint it goes on; ``None`` where it begins."""
    known: str | None
    """By what name the tracker knows it already."""

    @property
    def name(self) -> str:
        """What a person calls the run; a stage is called by the run too."""
        folder = self.folder.resolve()
        return f"{folder.parent.name}-{folder.name}" if folder.name.startswith("stage-") else folder.name


@dataclass(frozen=True, slots=True)
class Tracker:
    """A program that is told."""

    log: Callable[[dict[str, float], int], object]
    close: Callable[[], object]
    known: str | None = None


def _tensorboard(place: Place) -> Tracker:
    from torch.utils.tensorboard import SummaryWriter

    # What was written after the checkpoint is not shown, since the run does it again.
    purged = None if place.step is None else place.step + 1
    writer = SummaryWriter(str(place.folder / "tensorboard"), purge_step=purged)

    def log(metrics: dict[str, float], step: int) -> None:
        for name, value in metrics.items():
            writer.add_scalar(name, value, step)

    return Tracker(log, writer.close)


def _wandb(place: Place) -> Tracker:
    import wandb

    known = place.known or uuid.uuid4().hex[:12]
    run = wandb.init(
        project=os.environ.get("WANDB_PROJECT", PROJECT),
        name=place.name,
        id=known,
        resume="allow",
        dir=str(place.folder),
        config=dict(place.settings),
        settings=wandb.Settings(console="off"),
    )
    return Tracker(lambda metrics, step: run.log(metrics, step=step), run.finish, known)


def _mlflow(place: Place) -> Tracker:
    import mlflow
    from mlflow.entities import Metric, Param

    client = mlflow.MlflowClient()
    if place.known is not None:
        known = place.known
        client.update_run(known, status="RUNNING")
    else:
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", PROJECT)
        experiment = client.get_experiment_by_name(name)
        number = client.create_experiment(name) if experiment is None else experiment.experiment_id
        known = client.create_run(number, run_name=place.name).info.run_id
        client.log_batch(known, params=[Param(key, str(value)[:500]) for key, value in place.settings.items()])

    def log(metrics: dict[str, float], step: int) -> None:
        now = int(time.time() * 1000)
        told = [Metric(_NOT_A_NAME.sub("_", name), value, now, step) for name, value in metrics.items()]
        client.log_batch(known, metrics=told)

    return Tracker(log, lambda: client.set_terminated(known), known)


def _trackio(place: Place) -> Tracker:
    import trackio

    known = place.known or f"{place.name}-{uuid.uuid4().hex[:6]}"
    run = trackio.init(
        project=os.environ.get("TRACKIO_PROJECT", PROJECT),
        name=known,
        resume="allow",
        config=dict(place.settings),
        embed=False,
    )
    return Tracker(lambda metrics, step: run.log(metrics, step=step), run.finish, known)


_OPENERS: Mapping[str, Callable[[Place], Tracker]] = {
    "tensorboard": _tensorboard,
    "wandb": _wandb,
    "mlflow": _mlflow,
    "trackio": _trackio,
}


def require(config: TrainConfig) -> None:
    """Check, before anything that takes long, that what ``config`` reports to is installed.

    Raises:
        ConfigError: it is not.
    """
    for name in config.trackers:
        if find_spec(name) is None:
            raise ConfigError(
                f"report_to: {name} needs its library: install oomless[{name}], or leave it out", "report_to"
            )


class Trackers:
    """Those that the run of ``config`` in ``folder`` reports to; ``say`` is told what they cannot do."""

    def __init__(self, config: TrainConfig, folder: Path, say: Callable[[str], None]) -> None:
        self._config, self._folder, self._say = config, folder, say
        self._open: dict[str, Tracker] = {}

    def open(self, step: int | None) -> None:
        """Begin, or go on after the checkpoint of ``step``."""
        self.close()
        known = {} if step is None else _read(self._folder / TRACKED)
        for name in self._config.trackers:
            place = Place(self._folder, self._config.to_dict(), step, known.get(name))
            self._try(name, lambda name=name, place=place: self._open.update({name: _OPENERS[name](place)}))  # type: ignore[misc]
        named = {name: tracker.known for name, tracker in self._open.items() if tracker.known is not None}
        with suppress(OSError):  # a run that goes on is another one there then
            checkpoint.write_atomically(self._folder / TRACKED, json.dumps(known | named))

    def log(self, record: Mapping[str, Any]) -> None:
        """Tell the numbers in a line of metrics."""
        numbers = {
            name: float(value)
            for name, value in record.items()
            if name != "step" and isinstance(value, int | float) and not isinstance(value, bool)
        }
        for name, tracker in list(self._open.items()):
            if numbers:
                self._try(name, lambda tracker=tracker: tracker.log(numbers, record["step"]))  # type: ignore[misc]

    def close(self) -> None:
        """Have all that was told kept."""
        for name, tracker in list(self._open.items()):
            self._try(name, tracker.close)
        self._open.clear()

    def _try(self, name: str, function: Callable[[], object]) -> None:
        try:
            function()
        except Exception as error:
            self._open.pop(name, None)
            first_line = (str(error).strip().splitlines() or [type(error).__name__])[0]
            self._say(
                f"{name} is told no more of this run: {first_line[:200]}. The run goes on; metrics.jsonl has everything."
            )


def _read(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}
