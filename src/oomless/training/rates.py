"""How fast a run learns where nothing is said of it: learning rates, warm-up and weight decay, by what trains and how long.

``catalogue/learning.yaml`` has the figures, each with what it rests on; ``docs/optimizers.md`` shows them.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from oomless.catalogue import learning
from oomless.catalogue.learning import Trains
from oomless.config import TrainConfig
from oomless.units import counted

RATES = ("learning_rate", "embedding_learning_rate", "warmup_ratio", "weight_decay")
"""The settings that are filled in here."""

_WIDTHS = ("hidden_size", "d_model", "n_embd", "dim")
_EMBEDDINGS = {"embed_tokens", "lm_head"}
_WORDS: dict[Trains, str] = {
    "full": "whole layers",
    "lora": "LoRA",
    "embeddings": "embeddings alone",
    "rows": "rows of embeddings",
}


def resolved(config: TrainConfig, model_config: Any, total_steps: int | None = None) -> TrainConfig:
    """Return ``config`` with the rates that it leaves open, for a model of ``model_config``; what is given is not altered.

    Without ``total_steps`` the warm-up stays open.
    """
    trains, width = what_trains(config), width_of(model_config)
    usual = learning.rate(trains, config.optimizer, width, _alpha(config) if trains == "lora" else None)
    rate = config.learning_rate or _rounded(usual)
    filled = {"learning_rate": rate, "weight_decay": _rounded(learning.weight_decay(trains, config.optimizer))}
    if _beside_lora(config):
        filled["embedding_learning_rate"] = _rounded(rate * learning.beside_lora())
    if total_steps is not None:
        filled["warmup_ratio"] = learning.warmup_steps(total_steps) / total_steps
    return _with(config, filled)


def kept(config: TrainConfig, earlier: TrainConfig) -> TrainConfig:
    """Return ``config`` of a run that goes on, with the rates with which it began ``earlier`` where it leaves them open."""
    began = {name: getattr(earlier, name) for name in RATES}
    # Of a version in which there was one rate for all.
    if _beside_lora(config) and began["embedding_learning_rate"] is None:
        began["embedding_learning_rate"] = began["learning_rate"]
    return _with(config, began)


def said(config: TrainConfig, model_config: Any, total_steps: int | None = None) -> str:
    """Return the rates of ``config``, a run of so many steps if that is known, for a person, and what they follow from by default."""
    said_nothing: dict[str, Any] = dict.fromkeys(RATES)
    usual = resolved(replace(config, **said_nothing), model_config, total_steps)
    config = resolved(config, model_config, total_steps)
    beside = config.embedding_learning_rate
    line = f"Learning rate {config.learning_rate:g}" + (f", of embeddings {beside:g}" if beside is not None else "")
    if total_steps is not None:
        warmup_steps = math.ceil(total_steps * (config.warmup_ratio or 0.0))
        line += f"; warm-up {warmup_steps:,} of {counted(total_steps, 'step')}, then {config.lr_scheduler_type}"
    line += f"; weight decay {config.weight_decay:g}"
    if config.learning_rate != usual.learning_rate:
        return f"{line}."
    return (
        f"{line}: the default for {_WORDS[what_trains(config)]}, {config.optimizer}, {width_of(model_config):,} wide."
    )


def what_trains(config: TrainConfig) -> Trains:
    """Return what decides the learning rate of ``config``: of several things that train, the one that takes least."""
    parts = {*config.trainable_parts}
    if parts - _EMBEDDINGS - {"lora"}:
        return "full"
    if "lora" in parts:
        return "lora"
    return "embeddings" if config.trainable_rows is None else "rows"


def width_of(model_config: Any) -> int:
    """Return the width of the model; the one that the published rates are for where code of its own calls it otherwise."""
    text = model_config.get_text_config()
    return int(next((getattr(text, name) for name in _WIDTHS if hasattr(text, name)), learning.published_width()))


def _with(config: TrainConfig, rates: dict[str, Any]) -> TrainConfig:
    """Return ``config`` with those of ``rates`` that it leaves open."""
    changes = {name: rate for name, rate in rates.items() if getattr(config, name) is None}
    return replace(config, **changes)


def _beside_lora(config: TrainConfig) -> bool:
    return what_trains(config) == "lora" and bool(_EMBEDDINGS & {*config.trainable_parts})


def _alpha(config: TrainConfig) -> float:
    """Return LoRA's alpha as if its scale were alpha / r."""
    assert config.lora_alpha is not None
    assert config.lora_r is not None
    return config.lora_alpha * (math.sqrt(config.lora_r) if config.use_rslora else 1.0)


def _rounded(number: float) -> float:
    """Return ``number`` to two digits."""
    return float(f"{number:.1e}")
