"""What is exported: which weights of which folder, and the model that they change.

A run keeps one of three things in a checkpoint: the whole model, an adapter, or what trained of a model whose frozen layers were
stored otherwise. The last two are nothing without the model that the run began with.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

from oomless.config import TrainConfig, adapter
from oomless.config.stages import STAGES
from oomless.config.values import load_yaml
from oomless.data.prepare import general_names
from oomless.errors import CheckpointError, ConfigError, ModelError, nearest
from oomless.models.spec import ModelSpec, resolve
from oomless.training import checkpoint
from oomless.training.best import Best
from oomless.training.checkpoint import Checkpoint
from oomless.training.run_files import CONFIG, MODEL, stage_folders
from oomless.training.run_folder import Metrics

Kind = Literal["model", "adapter", "trained"]
_WHICH = ("last", "best", "final")
TRAINED = "trained.safetensors"
RECORD = "export.json"
"""What an export says of itself."""

_KINDS: Mapping[str, Kind] = {adapter.FILE: "adapter", TRAINED: "trained", "config.json": "model"}
"""By which file each is known."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Source:
    """What is exported."""

    folder: Path
    """Holds the weights."""

    kind: Kind
    base: ModelSpec
    """The model that the weights are, or change."""

    name: str
    """What the folder is to a person."""

    run: TrainConfig | None = None
    """The run that made it, where one did."""

    saved: Checkpoint | None = None
    """The checkpoint of the run that it is."""

    begun: str | None = None
    """The model that a run in stages began with, of which ``run`` is the last stage."""

    @property
    def began_with(self) -> str:
        """The name of the model that training changed; of what nobody trained here, the model itself."""
        if self.begun is not None:
            return self.begun
        if self.kind == "model" and self.run is not None:
            return self.run.model
        return str(self.base.config._name_or_path)

    @property
    def base_sample(self) -> Sequence[float] | None:
        """What the model that the weights were trained beside is known by, where that was kept (``models.sample``)."""
        if self.saved is not None:
            state = checkpoint.read_state(self.saved)
        else:
            state = read_json(self.folder / RECORD) if (self.folder / RECORD).is_file() else {}
        sample: Sequence[float] | None = state.get(checkpoint.BASE_SAMPLE)
        return sample

    @property
    def adapter(self) -> Mapping[str, Any]:
        """What ``adapter_config.json`` says."""
        return adapter.facts(self.folder)


def read_json(path: Path) -> Any:
    """Return what the JSON file ``path`` holds.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}") from error


def find(place: Path, which: str | None = None, base: str | None = None) -> Source:
    """Return what ``place`` holds: a run, one of its checkpoints, an adapter, or a model.

    Args:
        place: a folder.
        which: the checkpoint of a run: its step, last, best or final; by default that of its final model, or the newest.
        base: the model that an adapter changes, where it is not where it was.

    Raises:
        ConfigError: ``which`` or ``base`` is given for what has none.
        CheckpointError: the run has no such checkpoint.
        ModelError: there is nothing to export, or the model that it changes is not there.
    """
    return _of_folder(_located(place, which), base)


def find_two(place: Path, which: str | None = None, base: str | None = None) -> tuple[Source, Source]:
    """Return what ``find`` does of a run or an adapter, and the model that it began with, which ``base`` is where it is not where it was.

    Raises:
        ConfigError: ``place`` holds neither.
        UserError: as ``find``.
    """
    located = _located(place, which)
    whole = _kind(located.folder) == "model"
    if whole and located.run is None:
        raise ConfigError(f"nothing in {place} says what it was trained from: give the folder of a run, or an adapter")
    found = _of_folder(located, None if whole else base)
    said_by = None if base else found.folder
    if base is None and located.run is not None:
        base = located.begun or located.run.model
    begun_with = found.base if base is None else _resolved(base, found.base.trust_remote_code, said_by)
    folder = begun_with.folder if base is None else begun_with.adapter or begun_with.folder
    if folder is None:
        raise ModelError(f"{base} is a config without weights: give the folder of the model with --base")
    begun = _of_folder(_Located(folder, base or found.base.name, located.run), None)
    return found, replace(begun, run=None)


@dataclass(frozen=True, slots=True)
class _Located:
    """A folder with weights, and what is known of it."""

    folder: Path
    name: str
    run: TrainConfig | None = None
    saved: Checkpoint | None = None
    begun: str | None = None


def _located(place: Path, which: str | None) -> _Located:
    if not place.is_dir():
        raise ConfigError(f"{place} is no folder: give that of a run, a checkpoint, an adapter or a model")
    if (place / "config.yaml").is_file() and not (place / "config.json").is_file():
        return _in_run(place, which)
    if which is not None:
        raise ConfigError(f"--checkpoint is of a run; {place} is no run's folder: leave it out")
    saved = next((one for one in checkpoint.list_checkpoints(place.parent) if one.folder.name == place.name), None)
    return _Located(place, place.name, _run_of(saved) if saved else None, saved)


def _in_run(run: Path, which: str | None) -> _Located:
    settings = load_yaml(run / "config.yaml")
    if STAGES in settings:
        kept = [stage for stage in stage_folders(run) if (stage / MODEL).is_dir() or checkpoint.list_checkpoints(stage)]
        if not kept:
            raise CheckpointError(f"no stage of {run} has a checkpoint or a model yet: there is nothing to export")
        found = _in_run(kept[-1], which)
        return replace(
            found,
            name=f"{found.name} of {kept[-1].name}",
            begun=str(load_yaml(stage_folders(run)[0] / CONFIG)["model"]),
        )
    config = TrainConfig.from_mapping(settings)
    known = {one.step: one for one in checkpoint.list_checkpoints(run)}
    final = (run / "model").is_dir()
    step = _step(run, which, config, sorted(known), final)
    if step is not None:
        unfinished = "" if final else " of a run that has not ended"
        return _Located(known[step].folder, f"{known[step].folder.name}{unfinished}", config, known[step])
    if not final:
        raise CheckpointError(f"{run} has neither a checkpoint nor a model: there is nothing to export yet")
    return _Located(run / "model", "model", config)


def _step(run: Path, which: str | None, config: TrainConfig, known: Sequence[int], final: bool) -> int | None:
    """Return which of the steps ``known`` is meant; ``None`` for a final model without a checkpoint."""
    there = f"there is {', '.join(map(str, known)) or 'none'}: name one of these"
    last = known[-1] if known else None
    if which is None or which == "final":
        if which == "final" and not final:
            raise CheckpointError(f"{run} has no final model, since the run has not ended; {there}")
        best = _best(run, config, known) if final and config.load_best_model_at_end else None
        return last if best is None else best
    if which not in _WHICH and not which.isdecimal():
        raise ConfigError(f"--checkpoint is a step, last, best or final; got {which!r}.{nearest(which, _WHICH)}")
    step = last if which == "last" else _best(run, config, known) if which == "best" else int(which)
    if step not in known:
        what = {"last": "no checkpoint", "best": "no checkpoint that was evaluated"}.get(
            which, f"no checkpoint of step {which}"
        )
        raise CheckpointError(f"{run} has {what}; {there}")
    return step


def _best(run: Path, config: TrainConfig, steps: Sequence[int]) -> int | None:
    """Return which of ``steps`` had the best evaluation; ``None`` where none had one."""
    general = general_names(config)
    metrics, best = Metrics(run / "metrics.jsonl", lambda said: None), Best()
    for step in steps:
        losses = {name: loss for name, loss in metrics.evaluated(step).items() if name not in general}
        if losses:
            best.judge(step, losses)
    return best.step


def _run_of(saved: Checkpoint) -> TrainConfig | None:
    try:
        return TrainConfig.from_mapping(checkpoint.read_state(saved)["config"])
    except (OSError, ValueError, KeyError):
        return None


def _kind(folder: Path) -> Kind:
    for name, kind in _KINDS.items():
        if (folder / name).is_file():
            return kind
    if found := sorted(folder.glob("*.gguf")):
        raise ModelError(
            f"{folder} holds {found[0].name}, which llama.cpp and Ollama read: give the run that it was made of, or its safetensors"
        )
    raise ModelError(f"{folder} holds no model, no adapter and no checkpoint of a run")


def _of_folder(located: _Located, base: str | None) -> Source:
    folder, run = located.folder, located.run
    kind = _kind(folder)
    if kind == "model" and base is not None:
        raise ConfigError(f"--base is for an adapter; {folder} holds a whole model: leave it out")
    whole = str(folder) if kind == "model" else base or _base_of(folder, kind, run)
    spec = _resolved(whole, run is not None and run.trust_remote_code, None if base or kind == "model" else folder)
    if spec.folder is None:
        raise ModelError(f"{spec.name} is a config without weights: give the folder of the model with --base")
    return Source(
        folder=folder, kind=kind, base=spec, name=located.name, run=run, saved=located.saved, begun=located.begun
    )


def _resolved(name: str, trust_remote_code: bool, changed: Path | None) -> ModelSpec:
    """Return the spec of ``name``, which is what the weights in ``changed`` say that they began with."""
    try:
        return resolve(name, trust_remote_code=trust_remote_code)
    except ModelError as error:
        if changed is None:
            raise
        raise ModelError(
            f"{changed} began with the model {name}, which is not found: {error} Or name its folder with --base"
        ) from error


def _base_of(folder: Path, kind: Kind, run: TrainConfig | None) -> str:
    named = adapter.facts(folder).get("base_model_name_or_path") if kind == "adapter" else None
    named = named or (run.model if run is not None else None)
    if not named:
        raise ConfigError(f"{folder} does not say which model it changes: give its folder or name with --base")
    return str(named)
