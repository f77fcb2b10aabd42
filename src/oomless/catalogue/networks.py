"""The network between machines where nothing is said of it, read from ``networks.yaml``: an assumption, and what it rests on."""

from __future__ import annotations

from dataclasses import dataclass

from oomless.catalogue._data import read_yaml
from oomless.catalogue.gpus import Gpu
from oomless.units import Gbit


@dataclass(frozen=True, kw_only=True, slots=True)
class Network:
    """What connects a machine with others."""

    bytes_per_s: float
    """Peak rate of all its network cards together in one direction."""

    source: str
    """Where the rate comes from."""


def assumed_network(gpu: Gpu, count: int) -> Network:
    """Return the network that is assumed of a machine with ``count`` GPUs such as ``gpu``."""
    data = read_yaml("networks.yaml")
    own = data["per_gpu"].get(gpu.name)
    if own is not None:
        return Network(bytes_per_s=own["gbit"] * count * Gbit, source=f"assumed: {own['source']}")
    every = data["per_machine"]
    return Network(bytes_per_s=every["gbit"] * Gbit, source=f"assumed: {every['source']}")
