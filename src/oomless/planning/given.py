"""The settings of a plan, read before anything that takes long is imported."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from oomless.config import TrainConfig, read, require
from oomless.config.batch import LENGTHS
from oomless.errors import ConfigError, nearest
from oomless.planning.strategies import PREFERENCES, UNPLANNED, Settings, require_any
from oomless.units import parse_bytes, parse_count, parse_rate

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


def host_size(text: str | None) -> int | None:
    """Return the bytes of ``--host-memory``."""
    if text is None:
        return None
    if text.strip().isdigit() and int(text):
        raise ConfigError(f"--host-memory is a size with its unit; got {text!r}: write {text.strip()}GiB")
    try:
        return parse_bytes(text)
    except ValueError as error:
        raise ConfigError(f"--host-memory: {error}") from error


def network_rate(text: str | None) -> float | None:
    """Return the bytes a second of ``--network``."""
    if text is None:
        return None
    try:
        return parse_rate(text)
    except ValueError as error:
        raise ConfigError(f"--network: {error}") from error


def wish_of(
    prefer: str | None, tokens: str | None = None, hours: str | None = None, given: Mapping[str, Any] = {}
) -> dict[str, Any]:
    """Return what ``--prefer``, ``--tokens`` and ``--hours`` say, as ``choose_training`` takes it; ``given`` are the settings beside them."""
    wish: dict[str, Any] = {}
    if prefer is not None:
        if prefer not in PREFERENCES:
            raise ConfigError(
                f"--prefer must be one of {', '.join(PREFERENCES)}; got {prefer!r}.{nearest(prefer, PREFERENCES)}"
            )
        wish["prefer"] = prefer
    if tokens is not None:
        length = next((name for name in LENGTHS if given.get(name) is not None), None)
        if length is not None:
            raise ConfigError(f"--tokens and --{length.replace('_', '-')} both say how long the run is: keep one")
        try:
            wish["tokens"] = parse_count(tokens)
        except ValueError as error:
            raise ConfigError(f"--tokens: {error}") from error
        if not wish["tokens"]:
            raise ConfigError("--tokens must be at least 1; got 0")
    if hours is not None:
        try:
            wish["hours"] = float(hours)
        except ValueError:
            wish["hours"] = -1.0
        if not 0 < wish["hours"] < float("inf"):
            raise ConfigError(f"--hours is a number of hours, more than 0, such as 24; got {hours!r}")
    return wish
