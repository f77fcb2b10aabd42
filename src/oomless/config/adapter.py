"""A run that begins from an adapter of peft's (TRL's, Unsloth's, Axolotl's, a Trainer's checkpoint of one) goes on training that adapter.

So what trains, and LoRA's own settings, are those of the adapter: they are filled in from its ``adapter_config.json``.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from oomless.errors import ConfigError

FILE = "adapter_config.json"
_OWN = ("lora_dropout", "merge_lora")
"""LoRA's settings that a run may choose anew."""

_OTHER = (
    *("layer_replication", "alora_invocation_tokens", "use_qalora", "use_bdlora"),
    *("arrow_config", "kasa_config", "monteclora_config", "velora_config"),
)
"""What makes another model of LoRA than the sum of a matrix and a product of two."""

_CHANGES_THE_MODEL = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How an adapter begins that takes what it begins with off the model's own matrices, which it is then of no use beside."""

_NAMES, _NUMBERS = "a name or a list of names", "a number for each of some layers"
_RULES: Mapping[str, tuple[str, Callable[[Any], bool]]] = {
    "base_model_name_or_path": ("a name", lambda said: isinstance(said, str)),
    "peft_type": ("a name", lambda said: isinstance(said, str)),
    "r": ("a whole number from 1 on", lambda said: type(said) is int and said > 0),
    "lora_alpha": ("a number", lambda said: _is_number(said)),
    "lora_dropout": ("a number", lambda said: _is_number(said)),
    "bias": ("a name", lambda said: isinstance(said, str)),
    "init_lora_weights": ("true, false or a name", lambda said: isinstance(said, (bool, str))),
    **dict.fromkeys(("use_rslora", "use_dora", "lora_bias"), ("true or false", lambda said: isinstance(said, bool))),
    **dict.fromkeys(("rank_pattern", "alpha_pattern"), (_NUMBERS, lambda said: _is_mapping(said, _is_number))),
    **dict.fromkeys(
        ("target_modules", "target_parameters", "modules_to_save", "exclude_modules", "layers_pattern"),
        (_NAMES, lambda said: isinstance(said, str) or _is_list(said, str)),
    ),
    "layers_to_transform": ("a number or a list of them", lambda said: type(said) is int or _is_list(said, int)),
    "trainable_token_indices": (
        "a list of numbers, or one for each of some layers",
        lambda said: _is_list(said, int) or _is_mapping(said, lambda ids: _is_list(ids, int)),
    ),
}
"""What each of an adapter's facts is, where it is said at all, in peft's files."""

AGAIN = ("pissa", "olora")
"""Those of them that make the same of the same matrix every time; others rest on chance, on text, on gradients or on a rounded model."""


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
    for name, (kind, is_right) in _RULES.items():
        if found.get(name) is not None and not is_right(found[name]):
            raise ConfigError(f"{folder / FILE} is damaged: {name} is {kind}, got {found[name]!r}")
    return found


def _is_number(said: Any) -> bool:
    return type(said) in (int, float)


def _is_list(said: Any, kind: type) -> bool:
    return isinstance(said, list) and all(type(one) is kind for one in said)


def _is_mapping(said: Any, is_right: Callable[[Any], bool]) -> bool:
    return isinstance(said, dict) and all(map(is_right, said.values()))


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
    return where_now(str(named), folder)


def where_now(path: str, folder: Path) -> str:
    """Return ``path``, which ``folder`` names, where it lies now: beside that, or in a folder beside the one around that, if a run was moved."""
    named, here = Path(path), folder.resolve()
    moved = [here.parents[1].joinpath(*named.parts[-2:]), here.parent / named.name]
    missing = named.is_absolute() and not named.exists()
    return str(next((place for place in moved if place.is_dir()), path)) if missing else path


def beyond_lora(said: Mapping[str, Any], *, to_merge: bool = False) -> list[str]:
    """Return what the adapter of which ``said`` is told is, beside LoRA, that keeps it from going on, or where ``to_merge`` from that."""
    begun = str(said.get("init_lora_weights"))
    odd = begun.startswith(_CHANGES_THE_MODEL) and not (to_merge and begun in AGAIN)
    changed = [f"init_lora_weights {begun}"] if odd else []
    return [*(name for name in _OTHER if said.get(name)), *changed]


def require_scale(folder: Path, said: Mapping[str, Any]) -> None:
    """Check that the adapter in ``folder``, of which ``said`` is told, has a rank and a scale.

    Raises:
        ConfigError: it has not.
    """
    if missing := [name for name in ("r", "lora_alpha") if said.get(name) is None]:
        raise ConfigError(f"{folder / FILE} is damaged: it does not say {' and '.join(missing)}")


def beside_settings(model: object) -> dict[str, Any]:
    """Return what no setting says of the adapter that ``model`` names, as peft has it; nothing of a model.

    These are ranks and scales of single layers, and whether the second matrix of each has a bias.
    """
    folder = folder_of(model)
    said = {} if folder is None else facts(folder)
    own = {name: dict(said.get(name) or {}) for name in ("rank_pattern", "alpha_pattern")}
    return {**own, "lora_bias": bool(said.get("lora_bias"))}


def row_ids(said: Mapping[str, Any]) -> dict[str, list[int]]:
    """Return the rows of embeddings that train, in the order of the file, by the last part of their modules' names."""
    named = said.get("trainable_token_indices") or {}
    named = named if isinstance(named, Mapping) else {"embed_tokens": named}
    return {str(name).rpartition(".")[2]: [int(number) for number in ids] for name, ids in named.items()}


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
    odd = beyond_lora(said)
    if said.get("peft_type", "LORA") != "LORA":
        raise ConfigError(
            f"the adapter in {folder} is of the kind {said['peft_type']}; LORA is trained: merge it into its model with peft"
        )
    if odd:
        raise ConfigError(
            f"the adapter in {folder} has {', '.join(odd)}, with which it cannot go on training here: {_merged(folder)}"
        )
    require_scale(folder, said)
    whole = sorted({str(name).rpartition(".")[2] for name in said.get("modules_to_save") or ()})
    rows = row_ids(said)
    ids = {tuple(sorted(numbers)) for numbers in rows.values()}
    if len(ids) > 1 or (rows and whole):
        raise ConfigError(
            f"the adapter in {folder} trains some rows of one embedding and other rows, or all, of another, with which it cannot go on "
            f"training here: {_merged(folder)}"
        )
    of_rows = {"trainable_rows": ",".join(map(str, *ids))} if rows else {}
    return {
        "trainable": "+".join(["lora", *whole, *sorted(rows)]),
        **of_rows,
        "lora_r": int(said["r"]),
        "lora_alpha": float(said["lora_alpha"]),
        "lora_dropout": float(said.get("lora_dropout") or 0.0),
        "lora_target_modules": _targets(said),
        "use_rslora": bool(said.get("use_rslora")),
        "use_dora": bool(said.get("use_dora")),
        "bias": said.get("bias") or "none",
    }


def _targets(said: Mapping[str, Any]) -> str:
    """Return which layers have the adapter: their endings, or a pattern where peft picks them otherwise."""
    named = said.get("target_modules") or []
    experts = [str(name).removesuffix(".weight") for name in said.get("target_parameters") or ()]
    picked = _picked(said)
    if isinstance(named, str) and (named == "all-linear" or not (picked or experts)):
        return named
    if not isinstance(named, str) and not picked:
        return ",".join(sorted([*map(str, named), *experts]))
    linear = picked + (f"(?:{named})" if isinstance(named, str) else _ending(named))
    return "|".join([f"(?:{linear})", *([_ending(experts)] if experts else [])])


def _picked(said: Mapping[str, Any]) -> str:
    """Return what a name must begin with beside the names of the layers, as expressions that look ahead."""
    found = ""
    if excluded := said.get("exclude_modules"):
        found += f"(?!(?:{excluded})$)" if isinstance(excluded, str) else f"(?!{_ending(excluded)}$)"
    layers = said.get("layers_to_transform")
    numbers = [] if layers is None else [layers] if isinstance(layers, int) else layers
    if numbers and not isinstance(said.get("target_modules"), str):
        stack = said.get("layers_pattern") or ()
        stacks = "|".join([stack] if isinstance(stack, str) else stack)
        before = (
            rf"(?:.*?\.)?(?:{stacks})\." if stacks else r"(?:(?!\d+\.)[^.]+\.)+"
        )  # the first number of a name is the layer's
        found += rf"(?={before}(?:{'|'.join(map(str, numbers))})\.)"
    return found


def _ending(names: Any) -> str:
    return rf"(?:.*\.)?(?:{'|'.join(sorted(re.escape(str(name)) for name in names))})"


def _merged(folder: Path) -> str:
    return f"merge it first (oomless export {folder} --output MERGED) and give --model MERGED"
