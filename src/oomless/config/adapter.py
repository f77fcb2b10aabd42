"""A run that begins from an adapter of peft's (TRL's, Unsloth's, Axolotl's, a Trainer's checkpoint of one) goes on training that adapter.

So what trains, and LoRA's own settings, are those of the adapter: they are filled in from its ``adapter_config.json``.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from oomless.errors import ConfigError

FILE = "adapter_config.json"
_OWN = ("lora_dropout", "merge_lora")
"""LoRA's settings that a run may choose anew."""

_UNKNOWN = (
    "rank_pattern",
    "alpha_pattern",
    "layer_replication",
    "lora_bias",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
"""What peft does beside LoRA, and no setting here says."""


def folder_of(model: object) -> Path | None:
    """Return the folder of the adapter that ``model`` names; ``None`` where it names a model."""
    folder = Path(str(model)).expanduser()
    return folder if (folder / FILE).is_file() and not (folder / "config.json").is_file() else None


def facts(folder: Path) -> Mapping[str, Any]:
    """Return what the ``adapter_config.json`` in ``folder`` says.

    Raises:
        ConfigError: it cannot be read.
    """
    try:
        found = json.loads((folder / FILE).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder / FILE} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ConfigError(f"{folder / FILE} is no JSON object, which an adapter's is")
    return found


def base_of(folder: Path) -> str:
    """Return the model that the adapter in ``folder`` was trained on.

    Raises:
        ConfigError: nothing there says it.
    """
    named = facts(folder).get("base_model_name_or_path")
    if not named:
        raise ConfigError(
            f"{folder / FILE} does not say which model it changes: write it there as base_model_name_or_path"
        )
    return str(named)


def agree(folder: Path, given: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``given`` with the settings of the adapter in ``folder``.

    Raises:
        ConfigError: the two differ, or the adapter is of a kind that no setting says.
    """
    settings = dict(given)
    for name, value in _settings(folder).items():
        if name == "trainable":
            same = set(str(settings.get(name, value)).replace(" ", "").split("+")) == set(value.split("+"))
        else:
            same = settings.get(name, value) == value or name in _OWN
        if not same:
            raise ConfigError(
                f"the adapter in {folder} has {name} {value}, and goes on training as it is; got {settings[name]}: leave {name} out, or "
                f"{_merged(folder)}",
                name,
            )
        settings.setdefault(name, value)
    return settings


def _settings(folder: Path) -> dict[str, Any]:
    said = facts(folder)
    odd = [name for name in _UNKNOWN if said.get(name)]
    if said.get("peft_type", "LORA") != "LORA":
        raise ConfigError(
            f"the adapter in {folder} is of the kind {said['peft_type']}; LORA is trained: merge it into its model with peft"
        )
    if said.get("bias", "none") != "none":
        odd.append("bias")
    if odd:
        raise ConfigError(
            f"the adapter in {folder} has {', '.join(odd)}, with which it cannot go on training here: {_merged(folder)}"
        )
    whole = sorted({str(name).rpartition(".")[2] for name in said.get("modules_to_save") or ()})
    try:
        return {
            "trainable": "+".join(["lora", *whole]),
            "lora_r": int(said["r"]),
            "lora_alpha": float(said["lora_alpha"]),
            "lora_dropout": float(said.get("lora_dropout") or 0.0),
            "lora_target_modules": _targets(folder, said),
            "use_rslora": bool(said.get("use_rslora")),
            "use_dora": bool(said.get("use_dora")),
        }
    except (KeyError, TypeError, ValueError) as error:
        raise ConfigError(f"{folder / FILE} is damaged: {error!r}") from error


def _targets(folder: Path, said: Mapping[str, Any]) -> str:
    named = said.get("target_modules") or []
    if isinstance(named, str) and named != "all-linear":
        raise ConfigError(
            f"the adapter in {folder} names its layers by a pattern ({named}), with which it cannot go on: {_merged(folder)}"
        )
    if isinstance(named, str):
        return named
    experts = [str(name).removesuffix(".weight") for name in said.get("target_parameters") or ()]
    return ",".join(sorted([*map(str, named), *experts]))


def _merged(folder: Path) -> str:
    return f"merge it first (oomless export {folder} --output MERGED) and give --model MERGED"
