"""What ``oomless check-gpu`` has measured on a GPU of this user's, which outranks the catalogue's figures for GPUs of its name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from oomless.kept import Kept, user_folder


@dataclass(frozen=True, kw_only=True, slots=True)
class Calibration:
    """One GPU's figures."""

    gpu: str
    """The catalogue's name of it, or the driver's where the catalogue has none."""

    made: str
    """When and with what, for a person."""

    outside_bytes: int | None
    """What the process held outside the allocator with all its kernels loaded; ``None`` where others used the GPU too."""

    speeds: tuple[tuple[float, float], ...]
    """Tokens a second of the steps that were tried, as predicted and as measured."""

    rates: Mapping[str, float]
    """What matrix products, memory and the host's link reached, each in its unit; shown, and used for no prediction."""

    @property
    def source(self) -> str:
        """What figures of it rest on."""
        return f"measured here by oomless check-gpu, {self.made}"


def calibration(gpu: str) -> Calibration | None:
    """Return what was measured on a GPU called ``gpu``; ``None`` where nothing was."""
    found: dict[str, Any] | None = _room().get(_key(gpu))
    try:
        return Calibration(**{**(found or {}), "speeds": tuple(map(tuple, (found or {}).get("speeds", ())))})
    except TypeError:  # none, or another version's
        return None


def keep(found: Calibration) -> str | None:
    """Keep ``found`` for plans and runs from now on, in place of what was there; return where, or ``None`` where it cannot be."""
    _room().put(_key(found.gpu), asdict(found))
    return str(_room().folder / f"{_key(found.gpu)}.json") if calibration(found.gpu) == found else None


def _room() -> Kept:
    return Kept(user_folder() / "calibrations")


def _key(gpu: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in gpu)
