"""Known models by their public names: the ``config.json`` facts that planning needs, from ``model_configs/``.

A config is stored in full, as transformers 5 writes it (``dtype``, ``rope_parameters``, ``layer_types``), so
that no default of a transformers version can change it. Each carries the model's published parameter count,
tied weights counted once; a test builds the real class on the meta device and compares.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from oomless.catalogue._data import read_json_folder, read_yaml
from oomless.errors import ModelError, nearest

MADE = "November 2026"
"""When the list of models was last gone through."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Model:
    """One known model."""

    name: str
    """Its public name on the hub, ``"meta-llama/Llama-3.2-1B"``."""

    also: tuple[str, ...] = ()
    """Names with the same shapes, such as the instruction-tuned variant."""

    parameters: int
    """The number of parameters, tied ones counted once."""

    config: Mapping[str, Any] = field(repr=False, hash=False)

    source: str
    """Where config and count come from."""

    stored_as: str | None = None
    """How transformers calls the form of the published weights that ``quantization`` can keep, ``"mxfp4"``."""

    note: str | None = None
    """Where the stored config departs from the published one, and why."""


def models() -> tuple[str, ...]:
    """Return the public names of all known models, in alphabetical order."""
    return tuple(sorted(_models_by_name(), key=str.lower))


def model(name: str) -> Model:
    """Return what is known of the model ``name``: a public name, or its last part where that is unambiguous.

    Raises:
        ModelError: no model or several have this name.
    """
    folded = name.strip().lower()
    spellings = {spelling: entry for entry in _models_by_name().values() for spelling in (entry.name, *entry.also)}
    matches = [entry for spelling, entry in spellings.items() if folded == spelling.lower()] or [
        entry for spelling, entry in spellings.items() if folded == spelling.lower().rpartition("/")[2]
    ]
    distinct = {entry.name: entry for entry in matches}
    if len(distinct) == 1:
        return next(iter(distinct.values()))
    if distinct:
        raise ModelError(f"a short model name must mean one model; {name!r} means any of {', '.join(distinct)}")
    short_names = [spelling.rpartition("/")[2] for spelling in spellings]
    raise ModelError(
        f"a model is a folder, a config.json or a name from the catalogue, which does not know {name!r}."
        f"{nearest(name, spellings) or nearest(name, short_names)}"
    )


def model_config(name: str) -> dict[str, Any]:
    """Return the ``config.json`` of the model ``name`` as a new dict, for ``AutoConfig.for_model(**config)``.

    Raises:
        ModelError: no model or several have this name.
    """
    return copy.deepcopy(dict(model(name).config))


def models_of(model_type: str) -> list[str]:
    """Return the known models of one architecture, the largest first; of those with the same number of parameters one."""
    alike = [entry for entry in _models_by_name().values() if entry.config["model_type"] == model_type]
    by_size = {entry.parameters: entry.name for entry in sorted(alike, key=lambda entry: -len(entry.name))}
    return [by_size[size] for size in sorted(by_size, reverse=True)]


def parameters(name: str) -> int:
    """Return how many parameters the model ``name`` has, tied ones counted once.

    Raises:
        ModelError: no model or several have this name.
    """
    return model(name).parameters


def name_words(kind: str) -> frozenset[str]:
    """Return the words of names that are packings, variants or reshaping; ``name_words.yaml`` says what these are."""
    return frozenset(str(word) for word in read_yaml("name_words.yaml")[kind].split())


@cache
def _models_by_name() -> dict[str, Model]:
    entries = read_json_folder("model_configs")
    return {
        name: Model(
            name=name,
            also=tuple(entry.get("also", ())),
            parameters=entry["parameters"],
            config=_whole(entry, entries),
            source=entry["source"],
            stored_as=entry.get("stored_as"),
            note=entry.get("note"),
        )
        for name, entry in entries.items()
    }


def _whole(entry: Mapping[str, Any], entries: Mapping[str, Any]) -> Mapping[str, Any]:
    """Return the config of ``entry``, on top of that of the entry that it is like."""
    base = _whole(entries[entry["like"]], entries) if "like" in entry else {}
    return {**base, **entry["config"]}
