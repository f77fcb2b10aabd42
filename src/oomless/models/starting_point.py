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

_FULL = "give the 16-bit model that it was made from"
_IN_FEW_BITS = _FULL + ", with --quantization {} to hold it in so many bits while LoRA trains"
_IN_FOUR_BITS, _IN_EIGHT_BITS = _IN_FEW_BITS.format("nf4"), _IN_FEW_BITS.format("int8")

_ADVICE = {
    "gptq": _IN_FOUR_BITS,
    "awq": _IN_FOUR_BITS,
    "bitsandbytes 4-bit": _IN_FOUR_BITS,
    "bitsandbytes 8-bit": _IN_EIGHT_BITS,
    "mlx": "it is for Apple's MLX; " + _FULL,
}


def check(settings: Mapping[str, Any], where: Path) -> None:
    """Check that weights beside the ``config.json`` of ``settings``, read from ``where``, can be trained from.

    Raises:
        ModelError: they are stored in a quantised form that is not read.
    """
    kind = quantization_kind(settings)
    if kind is not None:
        raise ModelError(
            f"the weights of a model to train are plain numbers; those of {where} are quantized ({kind}): "
            f"{_ADVICE.get(kind, _FULL)}"
        )


def quantization_kind(settings: Mapping[str, Any]) -> str | None:
    """Return how the weights beside this config.json are stored in fewer bits; ``None`` where they are plain."""
    of_parts = [part for part in settings.values() if isinstance(part, Mapping) and "model_type" in part]
    for part in (settings, *of_parts):
        for key in ("quantization_config", "compression_config", "quantization"):
            said = part.get(key)
            if not isinstance(said, Mapping) or not said:
                continue
            if said.get("load_in_4bit") or said.get("load_in_8bit") or said.get("quant_method") == "bitsandbytes":
                return "bitsandbytes 8-bit" if said.get("load_in_8bit") else "bitsandbytes 4-bit"
            if "quant_method" in said:
                return str(said["quant_method"])
            return "compressed-tensors" if key == "compression_config" else "mlx" if "group_size" in said else "unknown"
    return None


def check_folder(folder: Path) -> None:
    """Check that ``folder`` holds a whole model.

    Raises:
        ModelError: it holds none, an adapter alone, or a form that is not transformers' own; with what to do.
    """
    if (folder / "config.json").is_file():
        return
    rule = "a model folder holds a config.json and safetensors weights"
    adapter = folder / "adapter_config.json"
    if adapter.is_file():
        raise ModelError(
            f"{rule}; {folder} holds an adapter alone, trained on {_base_of(adapter)}: give that model, or merge the two first"
        )
    if any(folder.glob("*.gguf")):
        raise ModelError(f"{rule}; {folder} holds GGUF files, which are for inference: {_FULL}")
    if (folder / "params.json").is_file():
        raise ModelError(
            f"{rule}; {folder} holds its maker's own form (params.json): give the one converted for transformers"
        )
    raise ModelError(f"a model folder holds a config.json; there is none in {folder}")


def _base_of(adapter: Path) -> str:
    try:
        base = json.loads(adapter.read_text(encoding="utf-8")).get("base_model_name_or_path")
    except (OSError, ValueError, AttributeError):
        base = None
    return repr(base) if base else "a model that its adapter_config.json does not name"
