"""Stages: sets of settings that differ from those around them, trained one after the other as one run.

Each stage is a run by itself, in a folder of its own, that begins with the model that the stage before it leaves. What a stage
does not say is as it is said around it.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig, outrank, read
from oomless.config.trained import LORA_DEFAULTS
from oomless.errors import ConfigError, OomlessError

STAGES = "stages"
"""The key in YAML under which they are listed."""

OF_THE_RUN = ("model", "tokenizer", "trust_remote_code", "output_dir", "gpu", "resume")
"""Settings that are one for all stages."""

_NAME = re.compile(r"\w[\w.-]{0,49}")
_ADAPTER = tuple(name for name in LORA_DEFAULTS if name not in ("lora_dropout", "merge_lora"))
"""LoRA's settings that an adapter keeps."""

_PARTS_OF_ADAPTERS = {"lora", "embed_tokens", "lm_head"}


@dataclass(frozen=True, kw_only=True, slots=True)
class Stage:
    """One of the stages of a run."""

    number: int
    name: str
    settings: dict[str, Any]
    """All that is said of it, in it and around it."""

    def __str__(self) -> str:
        """Return what a person calls it."""
        return f"stage {self.number}" + (f" ({self.name})" if self.name != str(self.number) else "")

    @property
    def folder(self) -> str:
        """What its folder in that of the run is called."""
        return f"stage-{self.number}" + (f"-{self.name}" if self.name != str(self.number) else "")

    @contextmanager
    def named(self) -> Iterator[None]:
        """Have the errors that are raised within this say which stage they are about."""
        try:
            yield
        except OomlessError as error:
            error.args = (f"{self}: {error}", *error.args[1:])
            raise


def stages_of(settings: Mapping[str, Any], stronger: Mapping[str, Any] | None = None) -> tuple[Stage, ...]:
    """Return the stages in ``settings``, as YAML has them, none where there are none; ``stronger`` settings outrank all of theirs.

    Raises:
        ConfigError: the list is none, a setting is unknown or none that a stage may have, or two stages have one name.
    """
    if STAGES not in settings:
        return ()
    listed = settings[STAGES]
    if not isinstance(listed, list) or not listed:
        raise ConfigError(
            f"stages is a list of sets of settings, at least one; got {listed!r}: list them, or remove it"
        )
    around = {name: value for name, value in settings.items() if name != STAGES}
    found: list[Stage] = []
    for number, own in enumerate(listed, 1):
        if not isinstance(own, Mapping):
            raise ConfigError(f"stage {number}: a stage is a mapping of settings to values; got {own!r}")
        own = {key: value for key, value in own.items() if value is not None}
        name = str(own.pop("name", number))
        if _NAME.fullmatch(name) is None:
            raise ConfigError(
                f"stage {number}: a stage's name is up to 50 letters, digits, '_', '-' and '.', as its folder has it; got {name!r}"
            )
        twin = next((stage for stage in found if stage.name.casefold() == name.casefold()), None)
        if twin is not None:
            raise ConfigError(
                f"stages {twin.number} and {number} are both called {name!r}: give each a name of its own"
            )
        stage = Stage(number=number, name=name, settings={})
        with stage.named():
            _check_own(own, first=number == 1, last=number == len(listed))
            both = outrank(outrank(around, own)[0], stronger or {})[0]
        found.append(Stage(number=number, name=name, settings=both))
    return tuple(found)


def _check_own(own: Mapping[str, Any], *, first: bool, last: bool) -> None:
    for name in own:
        if name == "extend_tokenizer" and not first:
            raise ConfigError(
                "extend_tokenizer belongs to the first stage: the others begin with its model and its tokens", name
            )
        if name in OF_THE_RUN:
            raise ConfigError(f"{name} is one for all stages: say it outside of them", name)
        if name == STAGES:
            raise ConfigError("a stage has no stages of its own: list them one after the other")
        if name == "merge_lora" and not last:
            raise ConfigError(
                "merge_lora is about the final model, so it belongs to the last stage: before it, an adapter that the next stage goes "
                "on training stays one, and any other is merged",
                name,
            )
    read({name: value for name, value in own.items() if name != "max_seq_length"})


def together(stages: Sequence[tuple[Stage, Mapping[str, Any]]]) -> dict[str, Any]:
    """Return the settings of ``stages`` as YAML has them: those that all share, and a list of the others."""
    first = stages[0][1]
    shared = {
        name: value
        for name, value in first.items()
        if all(name in settings and settings[name] == value for _, settings in stages)
    }
    last = stages[-1][0]
    own = [
        {
            "name": stage.name,
            **{
                name: value
                for name, value in settings.items()
                if name not in shared and (name != "merge_lora" or stage is last)
            },
        }
        for stage, settings in stages
    ]
    return {**shared, STAGES: own}


def after(settings: Mapping[str, Any], before: Sequence[TrainConfig]) -> dict[str, Any]:
    """Return ``settings`` of a stage, without what the stages ``before`` it have settled in the model for good.

    Raises:
        ConfigError: they ask for what cannot be any more.
    """
    left = dict(settings)
    if before:
        for name in ("tokenizer", "extend_tokenizer"):
            left.pop(name, None)  # they lie beside the model
    if any(config.tied_weights == "untied" for config in before) and left.pop("tied_weights", None) == "shared":
        raise ConfigError(
            "an earlier stage unties embed_tokens and lm_head, which are two matrices from then on: remove tied_weights: shared",
            "tied_weights",
        )
    return left


def goes_on(before: TrainConfig, then: TrainConfig) -> bool:
    """Return whether the adapter of the stage ``before`` is what trains in the stage ``then``."""
    parts = [set(config.trainable_parts) for config in (before, then)]
    return (
        parts[0] == parts[1]
        and "lora" in parts[0]
        and parts[0] <= _PARTS_OF_ADAPTERS
        and before.tied_weights is None
        and then.tied_weights is None
        and all(getattr(before, name) == getattr(then, name) for name in (*_ADAPTER, "trainable_rows"))
    )


def check_form(stages: Sequence[TrainConfig]) -> None:
    """Check that the last of ``stages`` asks for no form of weights that those before it do not leave.

    Raises:
        ConfigError: it does.
    """
    if stages[-1].quantization == "mxfp4" and not all(goes_on(*pair) for pair in pairwise(stages)):
        raise ConfigError(
            "quantization mxfp4 keeps experts as their checkpoint holds them, and a stage before this one leaves a whole model in plain "
            "weights: have all stages train the same adapter, or use nf4",
            "quantization",
        )


def as_runs(run: Path, stages: Sequence[tuple[Stage, TrainConfig]], place: int, *, model: str) -> TrainConfig:
    """Return stage ``place``, counted from 0, as a run of its own in the folder ``run``; it begins with the ``model`` that is there.

    Raises:
        ConfigError: it does not fit what the stages before it leave.
    """
    stage, config = stages[place]
    before = [one for _, one in stages[:place]]
    settings = after(config.to_dict(), before) | {"output_dir": str(run / stage.folder), "model": model}
    if before and goes_on(before[-1], config):
        for name in (*_ADAPTER, "trainable", "trainable_rows"):
            settings.pop(name, None)  # they are the adapter's
    if "lora" in config.trainable_parts and place + 1 < len(stages):
        settings["merge_lora"] = not goes_on(config, stages[place + 1][1])
    return TrainConfig.from_mapping(settings)


def same_stages(began: Sequence[Stage], now: Sequence[Stage]) -> None:
    """Check that a run goes on with the stages that it ``began`` with.

    Raises:
        ConfigError: their names or number differ.
    """
    names = [[stage.name for stage in stages] for stages in (began, now)]
    if names[0] != names[1]:
        raise ConfigError(
            f"a resumed run must keep its stages: it began with {', '.join(names[0])}, now they are {', '.join(names[1]) or 'none'}; "
            "set them back, or start anew in another output_dir"
        )
