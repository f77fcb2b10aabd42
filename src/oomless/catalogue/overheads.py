"""GPU memory that tensors do not explain, as figures with an uncertainty, read from ``overheads.yaml``.

The allocator simulation books tensors exactly. The rest cannot be computed: it depends on driver, CUDA
version and on the kernels loaded. It is kept here, item by item, so that a plan can print it and a
measurement can correct it. ``low`` and ``high`` are the extremes of the readings, not a confidence
interval.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cache
from typing import Any, Literal

from oomless.catalogue._data import read_yaml
from oomless.catalogue.calibration import calibration
from oomless.catalogue.gpus import Gpu
from oomless.units import parse_bytes

OverheadName = Literal["context", "cublas workspace", "cublaslt workspace", "nccl", "bitsandbytes"]


@dataclass(frozen=True, kw_only=True, slots=True)
class Overhead:
    """One item that a process takes on a GPU beside its tensors."""

    name: OverheadName
    bytes_expected: int
    bytes_low: int
    bytes_high: int

    inside_allocator: bool
    """Whether PyTorch's allocator serves it, so that it counts as allocated; else it lowers the capacity."""

    per: str
    """What has one each: ``"process"``, ``"cuBLAS handle and stream"``."""

    when: str
    """When it is taken."""

    source: str


def overhead(name: OverheadName, gpu: Gpu) -> Overhead | None:
    """Return the item ``name`` for ``gpu``; ``None`` where there is none (CUDA's items on an Apple GPU).

    The context is the user's own GPU's where ``oomless check-gpu`` has measured it.
    """
    found = next((item for item in overheads(gpu) if item.name == name), None)
    own = calibration(gpu.name) if name == "context" else None
    if found is None or own is None or own.outside_bytes is None:
        return found
    size = own.outside_bytes
    return replace(found, bytes_expected=size, bytes_low=size, bytes_high=size, source=own.source)


@cache
def overheads(gpu: Gpu) -> tuple[Overhead, ...]:
    """Return every item that applies to ``gpu``."""
    keys: list[str] = [gpu.vendor]
    if gpu.vendor == "nvidia" and gpu.capability is not None:
        keys = [".".join(map(str, gpu.capability)), str(gpu.capability[0]), "nvidia"]
    found = []
    for item in read_yaml("overheads.yaml"):
        figures = next((item["figures"][key] for key in keys if key in item["figures"]), None)
        if figures is not None:
            found.append(_overhead_from(item, figures))
    return tuple(found)


def _overhead_from(item: dict[str, Any], figures: dict[str, str]) -> Overhead:
    return Overhead(
        name=item["name"],
        bytes_expected=parse_bytes(figures["expected"]),
        bytes_low=parse_bytes(figures["low"]),
        bytes_high=parse_bytes(figures["high"]),
        inside_allocator=item["inside_allocator"],
        per=item["per"],
        when=item["when"],
        source=figures["source"],
    )
