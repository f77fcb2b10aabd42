"""Plans of a run in stages: each is planned for the model that the stages before it leave, and the dearest decides what fits."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.config.stages import after
from oomless.models import extension
from oomless.models.spec import STANDS_FOR, resolve_for_plan
from oomless.planning.choice import Choice
from oomless.planning.layout import new_tokens, with_new_tokens
from oomless.planning.plan import Plan
from oomless.planning.rehearse import UNLIMITED_BYTES, rehearse_briefly, virtual_device
from oomless.planning.strategies import Settings
from oomless.units import counted

OF_THE_MODEL = ("model", "tokenizer", "extend_tokenizer", "trainable_rows")
"""Settings for which others may have stood in."""


def settings_to_plan(settings: Settings, before: Sequence[TrainConfig], scratch: Path) -> Settings:
    """Return ``settings`` of a stage as of a run by itself that begins with the model that the stages ``before`` it leave.

    Where that is not the one that they began with, its config.json is written to the folder ``scratch``.

    Raises:
        ConfigError: the stage asks for what cannot be any more.
    """
    left = after(settings, before)
    if not before:
        return left
    untied, first = any(config.tied_weights == "untied" for config in before), before[0]
    tokenizer = settings.get("tokenizer") or settings["model"]
    if untied or first.extend_tokenizer is not None:
        spec = resolve_for_plan(left["model"], trust_remote_code=bool(left.get("trust_remote_code")))
        grown, changed = new_tokens(spec, first.to_dict(), scratch)  # which are noted there, for trainable_rows: new
        tokenizer, config = changed.get("tokenizer", tokenizer), copy.deepcopy(grown.config)
        for part in (config, config.get_text_config()):
            part.tie_word_embeddings = part.tie_word_embeddings and not untied
        noted = extension.read(scratch)
        changes = [] if noted is None else [f"with {counted(noted.added, 'new token')}"]
        changes += ["embed_tokens and lm_head untied"] if untied else []
        setattr(config, STANDS_FOR, f"{spec.name} ({', '.join(changes)})")
        if spec.stored_as == "mxfp4":  # adapters and new tokens leave experts as they were
            config.quantization_config = {"quant_method": spec.stored_as}
        left["model"] = str(scratch / "as-left.json")
        config.to_json_file(left["model"], use_diff=False)
        left["tokenizer"] = tokenizer
    elif "tokenizer" in settings:
        left["tokenizer"] = tokenizer
    return left


def as_said(config: TrainConfig, settings: Settings) -> TrainConfig:
    """Return what was planned with ``settings_to_plan``, with the model, its tokenizer and its rows as ``settings`` say."""
    of_the_model: dict[str, Any] = {name: settings.get(name) for name in OF_THE_MODEL}
    return replace(config, **of_the_model)


def choice_as_said(choice: Choice, settings: Settings) -> Choice:
    """Return what was chosen with ``settings_to_plan`` in the same way."""
    given = {name: value for name, value in choice.given.items() if name not in OF_THE_MODEL}
    given |= {name: settings[name] for name in OF_THE_MODEL if name in settings}
    config = None if choice.config is None else as_said(choice.config, settings)
    return replace(choice, given=given, config=config)


def check(config: TrainConfig) -> None:
    """Rehearse ``config`` without a limit, so that what does not fit together shows before an earlier stage has begun.

    Raises:
        UserError: as training would.
    """
    spec = resolve_for_plan(config.model, trust_remote_code=config.trust_remote_code)
    with with_new_tokens(spec, config.to_dict()) as (grown, settings):
        rehearse_briefly(grown, TrainConfig.from_mapping(settings), partial(virtual_device, UNLIMITED_BYTES))


def dearest(plans: Sequence[Plan]) -> int:
    """Return which of ``plans``, all for one GPU, decides what fits: the one that needs most."""
    return max(range(len(plans)), key=lambda place: plans[place].needed_bytes)
