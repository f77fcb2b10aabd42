"""The model of a config in its own class, of which the text part alone is there.

A vision-language checkpoint is built as the class that it is saved as, so that names, adapters and files are those that
everyone else knows. What is no part of its decoder, of its embedding or of its head (towers, projectors) is left out before
anything has memory: it is neither loaded nor trained, and ``models.save`` copies it from the files that it stands in.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES,
)

_LEFT_OUT = "_oomless_left_out"


def make(config: Any, **settings: Any) -> Any:
    """Return the model of ``config``, on the device that is current; ``settings`` are those of ``from_config``."""
    if not sees(config):
        return AutoModelForCausalLM.from_config(config, **settings)
    model = AutoModelForImageTextToText.from_config(config, **settings)
    _leave_out(model)
    return model


def without_memory(config: Any, **settings: Any) -> Any:
    """Return the model of a copy of ``config`` on the meta device, for its names and shapes."""
    with torch.device("meta"):
        return make(copy.deepcopy(config), **settings)


def is_known(model_type: str) -> bool:
    """Return whether transformers has a class that writes text for configs of ``model_type``."""
    return model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES or model_type in MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES


def sees(config: Any) -> bool:
    """Return whether the checkpoints of ``config`` hold more than a text model."""
    own = MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES.get(config.model_type)
    if own is None or config.get_text_config() is config:
        return False
    as_text = MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.get(config.model_type)
    if as_text in (None, own) or own in (getattr(config, "architectures", None) or ()):
        return True
    return config.get_text_config().model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES


def ties(config: Any) -> bool:
    """Return whether the head of the model of ``config`` is its embedding; the config of the whole model says it."""
    return bool(getattr(config, "tie_word_embeddings", False))


def left_out(model: Any) -> tuple[str, ...]:
    """Return how the names of what was left out of ``model`` begin."""
    return getattr(model, _LEFT_OUT, ())


def attend(model: Any, implementation: str) -> None:
    """Have what is there of ``model`` attend by ``implementation``, which its towers are not asked about."""
    if not left_out(model):
        model.set_attn_implementation(implementation)
        return
    config = model.config
    text = [name for name in config.sub_configs if getattr(config, name, None) is config.get_text_config()]
    model.set_attn_implementation(dict.fromkeys(["", *text], implementation))


def _leave_out(model: Any) -> None:
    parts = (model.get_decoder(), model.get_input_embeddings(), model.get_output_embeddings())
    kept = {module for part in parts if part is not None for module in part.modules()}
    names: list[str] = []

    def visit(module: nn.Module, path: str) -> None:
        for name in list(module._parameters):
            del module._parameters[name]
            placeholder = torch.empty(0)
            placeholder._is_hf_initialized = True  # type: ignore[attr-defined]
            setattr(module, name, placeholder)  # of which its class may ask
            names.append(f"{path}{name}")
        for name, child in list(module.named_children()):
            if child in kept:
                continue
            if kept.isdisjoint(child.modules()):
                setattr(module, name, None)
                names.append(f"{path}{name}.")
            else:
                visit(child, f"{path}{name}.")

    visit(model, "")
    setattr(model, _LEFT_OUT, tuple(names))
