"""What a user may say: frozen dataclasses, filled from YAML, the command line or Python.

The settings are sections, each in a file of its own with the checks that belong to it. Every field's docstring is its help
text, and its type says what it may be; there is no second description. Values are read here, by that type, and nowhere else.
A setting that would have no effect is an error, so the fields that belong to one choice (LoRA's rank, say) are ``None``
until that choice is made, and get their defaults then.
"""

from __future__ import annotations

import dataclasses
import glob
import os
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any

from oomless.config import adapter, batch, data, memory, optimizer, running, trained
from oomless.config.batch import Batch
from oomless.config.data import SOURCES, Data, sources
from oomless.config.data import DataSource as DataSource
from oomless.config.data import Packing as Packing
from oomless.config.memory import Memory
from oomless.config.memory import Precision as Precision
from oomless.config.model import Model, tokens_to_add
from oomless.config.optimizer import OPTIMIZER_DEFAULTS as OPTIMIZER_DEFAULTS
from oomless.config.optimizer import Optimizer
from oomless.config.optimizer import Scheduler as Scheduler
from oomless.config.running import BadLossPolicy as BadLossPolicy
from oomless.config.running import Recovery, Running
from oomless.config.trained import LORA_DEFAULTS as LORA_DEFAULTS
from oomless.config.trained import Trained
from oomless.config.values import coerce, kinds, require_kind
from oomless.errors import ConfigError, nearest

SECTIONS = (Model, Data, Trained, Batch, Optimizer, Memory, Running, Recovery)
"""In the order of their fields; each one's docstring is its title."""


@dataclass(frozen=True, kw_only=True)
class TrainConfig(Recovery, Running, Memory, Optimizer, Batch, Trained, Data, Model):
    """Everything that decides a run; as YAML it reproduces the run. A dataclass has the fields of its last base first."""

    def __post_init__(self) -> None:
        fields = {field.name: field for field in dataclasses.fields(self)}
        given = read({name: getattr(self, name) for name in fields})
        require(given, *REQUIRED)
        for name, field in fields.items():
            self.put(name, given.get(name, field.default))
        for section in (data, trained, memory, optimizer, batch, running):
            section.check(self)

    def put(self, name: str, value: object) -> None:
        """Set what follows from other settings, while this is made."""
        object.__setattr__(self, name, value)

    def fill(self, name: str, value: object) -> None:
        """Set what was left open, while this is made."""
        if getattr(self, name) is None:
            self.put(name, value)

    def from_anywhere(self) -> TrainConfig:
        """Return the same settings, with what a run reads named from the root of the disk, so that they mean the same from every folder."""
        found: dict[str, Any] = {
            key: [dataclasses.replace(source, path=_from_root(source.path)) for source in getattr(self, key)]
            for key in SOURCES
        }
        found |= {key: _from_root(name) for key in ("model", "tokenizer") if (name := getattr(self, key)) is not None}
        return dataclasses.replace(self, **found)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings that are set, as plain values for YAML or JSON."""
        return plain(dataclasses.asdict(self))

    def to_yaml(self) -> str:
        """Return the settings as YAML that ``from_mapping`` reads back to an equal config."""
        import yaml

        return yaml.safe_dump(self.to_dict(), sort_keys=False, allow_unicode=True)

    @classmethod
    def from_mapping(cls, mapping: Mapping[str, Any]) -> TrainConfig:
        """Return a config from plain values, as YAML or the command line give them.

        Raises:
            ConfigError: a key is unknown or missing, a value has the wrong type, or two settings contradict.
        """
        values = read(mapping)
        if values.get("gradient_accumulation_steps") == 1 and values.get("tokens_per_step"):
            size = values.get("per_device_train_batch_size", 1)
            length = values.get("max_seq_length", cls.max_seq_length)
            if size * length != values["tokens_per_step"]:
                raise ConfigError(
                    f"gradient_accumulation_steps 1 makes steps of {size} x {length} tokens, and tokens_per_step is "
                    f"{values['tokens_per_step']}: remove one of the two",
                    *batch.OF_A_STEP,
                )
        require(values, *REQUIRED)
        return cls(**values)


def read(mapping: Mapping[str, Any]) -> dict[str, Any]:
    """Return some settings, each as its field declares it; ``None`` is as if it were not there.

    Raises:
        ConfigError: a key is no setting, or a value is not what that setting may be.
    """
    require_kind("settings", mapping, Mapping, 'give names and values, such as {"model": "a/folder"}')
    known, values = kinds(TrainConfig), {}
    for key, value in mapping.items():
        if key not in known:
            raise ConfigError(f"unknown setting {key!r}.{nearest(str(key), known)}")
        if key == "extend_tokenizer":
            value = tokens_to_add(value)
        if value is not None:
            values[key] = sources(key, value) if key in SOURCES else coerce(key, value, known[key])
    folder = adapter.folder_of(values["model"]) if "model" in values else None
    return values if folder is None else adapter.agree(folder, values)


def _from_root(path: str) -> str:
    """Return ``path`` from the root, where it is a file, a folder or a glob of some; a name on the Hub as it is."""
    whole = os.path.abspath(os.path.expanduser(path))
    return whole if os.path.exists(whole) or next(glob.iglob(whole, recursive=True), None) else path


def outrank(weaker: Mapping[str, Any], stronger: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Return the settings of both, and which of the ``weaker`` give way to which of the ``stronger``.

    Of those that contradict each other, such as max_steps and num_train_epochs, the weaker give way, what follows from the
    others first. A contradiction within either is left to whoever reads what is returned.
    """
    both: dict[str, Any] = {**weaker, **stronger}
    gives_way: dict[str, str] = {}
    left = {**dict.fromkeys(REQUIRED, "-"), **both}
    while True:
        try:
            TrainConfig.from_mapping(left)
        except ConfigError as error:
            about = [name for name in error.settings if name in left]
        else:
            return both, gives_way
        strong = [name for name in about if name in stronger]
        # A length has no default that would be an answer.
        weak = [name for name in about if name not in stronger and name != "max_seq_length"]
        if strong and weak:
            gives_way[weak[0]] = strong[0]
            both, left = _without(both, gives_way), _without(left, gives_way)
        elif about:
            left = _without(left, about)
        else:
            return both, gives_way


def _without(settings: Mapping[str, Any], names: Collection[str]) -> dict[str, Any]:
    return {name: value for name, value in settings.items() if name not in names}


def plain(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Return ``settings`` as plain values for YAML or JSON, without those that are not set."""
    found = dict(settings)
    for key in set(SOURCES) & set(found):
        entries = [source if isinstance(source, dict) else dataclasses.asdict(source) for source in found[key]]
        found[key] = [{k: v for k, v in source.items() if v is not None} for source in entries]
    infinite = {key: "inf" for key, value in found.items() if value == float("inf")}  # which JSON has no number for
    return {key: value for key, value in (found | infinite).items() if value is not None and value != []}


def require(settings: Mapping[str, Any], *names: str) -> None:
    """Check that ``settings`` has those of these ``names``.

    Raises:
        ConfigError: one is missing.
    """
    missing = [name for name in names if settings.get(name) is None]
    if missing:
        raise ConfigError(f"{', '.join(missing)} must be given, in the YAML or as --{missing[0].replace('_', '-')}")


REQUIRED = tuple(field.name for field in dataclasses.fields(TrainConfig) if field.default is dataclasses.MISSING)
