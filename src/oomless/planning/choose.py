"""The questions that people ask of the search: what should I train, on which of these, how long can a sequence be?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.errors import ConfigError
from oomless.models.spec import resolve_for_plan
from oomless.planning.plan import Target, target_for
from oomless.planning.search import ALTERNATIVES, Choice, Progress, search
from oomless.planning.strategies import UNPLANNED, Settings
from oomless.planning.trial import results_folder

LENGTH_STEP = 256
"""The longest sequence is found to within so many tokens."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Compared:
    """The choice for one of several models or GPUs."""

    model: str
    gpu: str
    choice: Choice


def choose_training(
    given: Settings,
    *,
    host_bytes: int | None = None,
    keep_trials: bool = True,
    progress: Progress | None = None,
) -> Choice:
    """Return the best training that agrees with ``given`` (as in YAML: model, gpu and what is pinned) and fits the GPU.

    ``max_seq_length`` may be ``"max"``: the longest for which nothing of quality is given up against a short one.

    Args:
        given: settings as ``TrainConfig.from_mapping`` takes them; what they leave open is chosen.
        host_bytes: memory of the machine, for offloading; by default what is free here, or an assumption (``target_for``).
        keep_trials: keep what was rehearsed in the user's cache folder, and use what is there.
        progress: is told what is being tried, and what share of a search is done, from 0 to 1.

    Raises:
        UserError: model, GPU or settings do not fit together.
    """
    target = target_for(str(given.get("gpu", "auto")), host_bytes)
    results = results_folder() if keep_trials else None
    return _choose(given, target, results, ALTERNATIVES, progress)


def compare(
    given: Settings,
    models: Sequence[str],
    gpus: Sequence[str],
    *,
    host_bytes: int | None = None,
    progress: Progress | None = None,
) -> list[Compared]:
    """Return the choice for each of ``models`` on each of ``gpus``.

    Raises:
        UserError: one of them is not known, or the settings do not fit together.
    """
    targets = [target_for(gpu, host_bytes) for gpu in gpus]
    found = []
    for model in models:
        for gpu, target in zip(gpus, targets, strict=True):
            say = (
                (lambda text, share, name=f"{model} on {gpu}": progress(f"{name}: {text}", share)) if progress else None
            )
            choice = _choose({**given, "model": model}, target, results_folder(), 0, say)
            found.append(Compared(model=model, gpu=gpu, choice=choice))
    return found


def _choose(given: Settings, target: Target, results: Path | None, alternatives: int, progress: Any) -> Choice:
    if given.get("model") is None:
        raise ConfigError("model must be given, in the YAML or as --model")
    spec = resolve_for_plan(str(given["model"]), trust_remote_code=bool(given.get("trust_remote_code")))
    pins = {**UNPLANNED, **given}
    if pins.get("max_seq_length") != "max":
        return search(spec, pins, target, results=results, alternatives=alternatives, progress=progress)
    text = spec.config.get_text_config()
    longest = getattr(text, "max_position_embeddings", None) or 1 << 17
    shortest = min(LENGTH_STEP, longest)

    def at(length: int, settings: Settings) -> Choice:
        return search(
            spec,
            {**pins, **settings, "max_seq_length": length},
            target,
            results=results,
            alternatives=0,
            progress=progress,
        )

    short = at(shortest, {})
    if short.picked is None:
        return short
    quality = {key: value for key, value in short.picked.quality.settings().items() if value is not None}
    best, low, high = short, shortest, 2 * shortest
    while high <= longest and (choice := at(high, quality)).picked is not None:
        best, low, high = choice, high, 2 * high
    high = min(high, longest + 1)
    while high - low > LENGTH_STEP:
        middle = (low + high) // 2 // LENGTH_STEP * LENGTH_STEP
        middle = middle if middle > low else low + LENGTH_STEP
        choice = at(middle, quality)
        best, low, high = (choice, middle, high) if choice.picked is not None else (best, low, middle)
    return best


def picked_settings(choice: Choice, given: Settings) -> Settings:
    """Return the pick as settings for ``oomless train --config``: all of it, less what was not given and cannot be known.

    Raises:
        ConfigError: nothing was picked.
    """
    if choice.config is None:
        raise ConfigError("nothing fits, so there is no pick to write: see what would make it fit")
    settings = choice.config.to_dict()
    for name, placeholder in UNPLANNED.items():
        if given.get(name, placeholder) == placeholder:
            del settings[name]
    if not str(settings["gpu"]).startswith(("auto", "cuda", "virtual:")):
        settings["gpu"] = "auto"
    return settings


def as_config(given: Settings) -> TrainConfig:
    """Return exactly what ``given`` says, with the defaults for the rest."""
    return TrainConfig.from_mapping({**UNPLANNED, **given})
