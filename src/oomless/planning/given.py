"""The settings of a plan, read before anything that takes long is imported."""

from __future__ import annotations

from oomless.config import TrainConfig, read, require
from oomless.errors import ConfigError
from oomless.planning.strategies import UNPLANNED, Settings, require_any

LONGEST = "max"
"""What ``max_seq_length`` may be in a plan: as long as fits."""


def read_given(given: Settings) -> Settings:
    """Return the settings of a plan as their fields declare them; ``max_seq_length`` may be ``"max"``.

    Raises:
        ConfigError: a setting is unknown or not what it may be, or no strategy agrees with them.
    """
    if given.get("max_seq_length") != LONGEST:
        pins = read(given)
        require(pins, "model")
        require_any(pins)
        return pins
    pins = read_given(
        {name: value for name, value in given.items() if name not in ("max_seq_length", "tokens_per_step")}
    )
    return pins | read({"tokens_per_step": given.get("tokens_per_step")}) | {"max_seq_length": LONGEST}


def as_config(given: Settings) -> TrainConfig:
    """Return exactly what ``given`` says, with the defaults for the rest.

    Raises:
        ConfigError: it contradicts itself, or asks for the longest sequence, which only a search finds.
    """
    require_length(given)
    return TrainConfig.from_mapping({**UNPLANNED, **given})


def require_length(given: Settings) -> None:
    """Check that ``given``, for which nothing is searched, has a length.

    Raises:
        ConfigError: it asks for the longest.
    """
    if given.get("max_seq_length") == LONGEST:
        raise ConfigError(
            "max_seq_length: max is found by a search in the memory of one GPU: leave out --as-given, or give a length"
        )
