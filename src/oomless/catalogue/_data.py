"""Reads the data files that lie beside the loaders."""

from __future__ import annotations

import json
from functools import cache
from importlib.resources import files
from typing import Any

import yaml

_LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)


@cache
def read_yaml(name: str) -> Any:
    """Return what the YAML file ``name`` of this package holds; it is shared, so it must not be changed."""
    return yaml.load(files(__package__).joinpath(name).read_text(encoding="utf-8"), Loader=_LOADER)


def read_json_folder(name: str) -> dict[str, Any]:
    """Return the objects in the JSON files of the folder ``name`` as one, in the order of the file names."""
    paths = sorted(files(__package__).joinpath(name).iterdir(), key=lambda path: path.name)
    texts = [path.read_text(encoding="utf-8") for path in paths if path.name.endswith(".json")]
    return {key: value for text in texts for key, value in json.loads(text).items()}
