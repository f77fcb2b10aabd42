"""What share of a GPU's peak rates trainings reach, read from ``efficiency.yaml``: a range, and what it rests on."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

from oomless.catalogue._data import read_yaml
from oomless.catalogue.calibration import calibration
from oomless.catalogue.gpus import Gpu

Bound = Literal["low", "expected", "high"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Efficiency:
    """One end, or the middle, of the range."""

    matrix: float
    """Of the peak rate of matrix products."""

    memory: float
    """Of the bandwidth of device memory."""

    link: float
    """Of the bandwidth to the host."""

    peers: float
    """Of the bandwidth from one GPU to the next: NVLink, else that to the host."""

    network: float
    """Of the bandwidth from one machine to the next."""

    operator_seconds: float
    """What the host takes to start an operator; the GPU waits where its own work is shorter."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Measured:
    """One training's tokens a second, as predicted and as measured."""

    predicted: float
    measured: float
    source: str


def efficiency(gpu: Gpu, bound: Bound) -> Efficiency:
    """Return the low, expected or high efficiency of ``gpu``."""
    entry = _entry(gpu)
    return Efficiency(**{name: float(entry[name][bound]) for name in Efficiency.__dataclass_fields__})


def efficiency_source(gpu: Gpu, count: int = 1, machines: int = 1) -> str:
    """Return what the range for ``gpu``, of which there are ``count`` on so many ``machines``, rests on."""
    entry = _entry(gpu)
    parts = [entry["source"]]
    if count > 1:
        parts.append(entry["peers_source"])
    if machines > 1:
        parts.append(entry["network_source"])
    return "; ".join(parts)


def measured(gpu: Gpu) -> tuple[Measured, ...]:
    """Return the points that were measured on ``gpu``: the user's own where there are any, else the catalogue's."""
    own = calibration(gpu.name)
    if own is not None and own.speeds:
        return tuple(Measured(predicted=predicted, measured=got, source=own.source) for predicted, got in own.speeds)
    points = read_yaml("efficiency.yaml")["measured"]
    return tuple(
        Measured(**{name: point[name] for name in Measured.__dataclass_fields__})
        for point in points
        if point["gpu"] == gpu.name
    )


def _entry(gpu: Gpu) -> Mapping[str, Any]:
    data = read_yaml("efficiency.yaml")
    own: Mapping[str, Any] = data["gpus"].get(gpu.name, {})
    return {**data["all"], **own}
