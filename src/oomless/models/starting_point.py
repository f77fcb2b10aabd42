"""Whether training can begin from what a folder or a config.json holds; asked before anything is loaded or planned.

Weights that are stored in fewer bits look like plain ones to a loader that does not read ``quantization_config``: the
numbers would be taken without their scales. So each kind is either read right or refused here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oomless.errors import ModelError
from oomless.models.stored_forms import FORMS

_KEYS = ("quantization_config", "compression_config", "quantization")

FULL = "give the 16-bit model that it was made from"
_IN_FEW_BITS = ", with --quantization nf4 or int8 to hold it in few bits while LoRA trains"


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Check that weights beside the ``config.json`` of ``settings``, read from ``where``, can be trained from.

    Raises:
        ModelError: they are stored in a quantised form that is not read.
    """
    kind = quantization_kind(settings)
    if kind is not None and kind not in FORMS:
        raise ModelError(
            f"the weights of {where} are quantized ({kind}), a form that is not read: {FULL}{_IN_FEW_BITS}"
        )


def stored_as(place: Path) -> tuple[Mapping[str, Any], str | None]:
    """Return the ``quantization_config`` of the checkpoint in the folder ``place``, or of the config.json ``place``, and its kind;
    ``None`` where its weights are plain.
    """
    path = place / "config.json" if place.is_dir() else place
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}, None
    return _quantization(settings)


READ_PLAIN = "they are read with their scales as plain numbers"


def trained_from(kind: str, quantization: str | None) -> str:
    """Return how weights in the form ``kind`` are trained from where frozen ones are held in the form ``quantization``, in words."""
    if quantization == "mxfp4" == kind:
        return "frozen experts are held so, without rounding; what is saved is plain numbers"
    if quantization is not None:
        return f"{READ_PLAIN}, what is frozen is held as {quantization}, and what is saved is plain"
    frozen = "mxfp4 keeps frozen experts as they are" if kind == "mxfp4" else "nf4 holds what is frozen in few bits"
    return f"{READ_PLAIN}, trained so and saved so; --quantization {frozen}"


def quantization_kind(settings: Mapping[str, Any]) -> str | None:
    """Return how the weights beside this config.json are stored in fewer bits; ``None`` where they are plain."""
    return _quantization(settings)[1]


def forget_quantization(config: Any) -> None:
    """Have the transformers ``config`` describe plain weights, which is what is trained and saved."""
    for part in (config, *(getattr(config, name) for name in getattr(config, "sub_configs", {}))):
        for key in _KEYS:
            if hasattr(part, key):
                delattr(part, key)


def _quantization(settings: Mapping[str, Any]) -> tuple[Mapping[str, Any], str | None]:
    of_parts = [part for part in settings.values() if isinstance(part, Mapping) and "model_type" in part]
    for part in (settings, *of_parts):
        for key in _KEYS:
            said = part.get(key)
            if isinstance(said, Mapping) and said:
                return said, _kind(said, key)
    return {}, None


def _kind(said: Mapping[str, Any], key: str) -> str:
    method = str(said.get("quant_method", ""))
    if method == "bitsandbytes" or (not method and ("load_in_4bit" in said or "load_in_8bit" in said)):
        return "bitsandbytes 8-bit" if said.get("load_in_8bit") else "bitsandbytes 4-bit"
    if method:
        return method
    return "compressed-tensors" if key == "compression_config" else "mlx" if "group_size" in said else "unknown"


def check_folder(folder: Path) -> None:
    """Check that ``folder`` holds a whole model.

    Raises:
        ModelError: it holds none, or a form that is not transformers' own, or a damaged file beside it; with what to do.
    """
    if (folder / "config.json").is_file():
        _check_generation(folder / "generation_config.json")
        return
    rule = "a model folder holds a config.json and safetensors weights"
    if any(folder.glob("*.gguf")):
        raise ModelError(f"{rule}; {folder} holds GGUF files, which are for inference: {FULL}")
    if (folder / "params.json").is_file():
        raise ModelError(
            f"{rule}; {folder} holds its maker's own form (params.json): give the one converted for transformers"
        )
    raise ModelError(f"a model folder holds a config.json; there is none in {folder}")


def _check_generation(path: Path) -> None:
    """Check that ``path``, which is saved again as it is and read whenever the model is loaded, is right, where it is at all."""
    if not path.is_file():
        return
    try:
        said = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelError(f"{path} cannot be read as JSON: {error}: fetch it again, or remove it") from error
    if not isinstance(said, dict):
        raise ModelError(f"{path} is no JSON object: fetch it again, or remove it")
