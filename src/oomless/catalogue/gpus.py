"""GPUs by name: memory, compute capability, bandwidth, peak rates and host link, read from ``gpus.yaml``.

Three sizes must be told apart, because they differ by up to 6 %:

- the size on the box ("16 GB");
- ``total_bytes``, what ``nvidia-smi`` prints (T4: 15360 MiB);
- ``usable_bytes``, what CUDA and PyTorch report as the total, and what an out-of-memory message calls the
  "total capacity" (T4: 14.56 GiB). Newer drivers hold back more; of several readings the catalogue takes the
  lowest that is common.

What the CUDA context and libraries take from ``usable_bytes`` is in ``overheads.py``, never subtracted here.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from functools import cache
from typing import Any, Literal

from oomless.catalogue._data import read_yaml
from oomless.errors import HardwareError, nearest
from oomless.units import GiB, format_bytes, parse_bytes

Capability = tuple[int, int]
Vendor = Literal["nvidia", "amd", "apple"]

_BF16_SINCE: Capability = (8, 0)
_ASSUMED_CAPABILITY: Capability = (8, 0)
_PCIE_3_LANE_BYTES_PER_S = 8e9 * 128 / 130 / 8
_SIZE = re.compile(r"(apple:)?(\d+(?:\.\d+)?\s*[kMG]i?B)", re.IGNORECASE)
_BRANDS = re.compile(r"^(?:nvidia|amd|geforce|tesla|quadro|instinct|rtx)+")


@dataclass(frozen=True, kw_only=True, slots=True)
class Gpu:
    """One kind of GPU. Rates are peaks that no program reaches; dense, without structured sparsity."""

    name: str
    """The catalogue's name, ``"T4"``."""

    aliases: tuple[str, ...] = ()
    """Other names that mean this entry, the driver's among them; an alias may stand in several entries."""

    vendor: Vendor = "nvidia"

    capability: Capability | None
    """CUDA compute capability (for AMD what PyTorch reports in its place); ``None`` for Apple."""

    total_bytes: int
    """The memory that the driver's own tool prints."""

    usable_bytes: int
    """The memory that PyTorch reports as the device's total, before the context takes its part."""

    bandwidth_bytes_per_s: float | None = None
    """Peak memory bandwidth; ``None`` where it is not known (a GPU given only by its size)."""

    peak_flops: Mapping[str, float] = field(default_factory=dict, hash=False)
    """Peak floating-point operations per second by ``fp32``, ``tf32``, ``fp16``, ``bf16``, ``fp8``.

    16-bit rates are those of the tensor cores, where there are any, with fp32 accumulation. A dtype without
    hardware support is absent.
    """

    pcie: tuple[int, int] | None = None
    """PCIe generation and lanes to the host; ``None`` where that depends on the machine."""

    nvlink_bytes_per_s: float | None = None
    """Peak rate of all NVLinks together in one direction; ``None`` where every machine with this GPU need not have them."""

    source: str
    """Where the rates and the capability come from."""

    usable_source: str
    """Where ``usable_bytes`` comes from."""

    @property
    def supports_bf16(self) -> bool:
        """Whether bf16 matrix products run in hardware: capability 8.0 and later, and Apple's GPUs."""
        return self.vendor == "apple" or (self.capability is not None and self.capability >= _BF16_SINCE)

    @property
    def host_link_bytes_per_s(self) -> float | None:
        """Peak rate of the PCIe link in one direction, after its line coding."""
        if self.pcie is None:
            return None
        generation, lanes = self.pcie
        return _PCIE_3_LANE_BYTES_PER_S * 2.0 ** (generation - 3) * lanes


@cache
def gpus() -> tuple[Gpu, ...]:
    """Return every GPU of the catalogue, in its order."""
    return tuple(_gpu_from(entry) for entry in read_yaml("gpus.yaml"))


def gpu(name: str) -> Gpu:
    """Return the GPU that ``name`` means.

    ``name`` is a catalogue name, an alias or what the driver calls the device; case, spaces, hyphens and the
    brand do not matter (``"t4"``, ``"NVIDIA GeForce RTX 4090"``, ``"A100-40G"``). A size stands for a GPU of
    which nothing else is known: ``"24GiB"`` (capability 8.0 assumed) or ``"apple:16GiB"`` (unified memory).

    Raises:
        HardwareError: no entry or several have this name.
    """
    size = _SIZE.fullmatch(name.strip())
    if size is not None:
        size_bytes = parse_bytes(size[2])
        return apple_gpu(size_bytes) if size[1] else _gpu_of_size(size_bytes)
    folded = _fold(name)
    matches = [entry for entry in gpus() if folded == _fold(entry.name)] or [
        entry for entry in gpus() if folded in map(_fold, entry.aliases)
    ]
    if len(matches) == 1:
        return matches[0]
    if matches:
        raise HardwareError(
            f"a GPU's name must mean one entry of the catalogue; {name!r} comes in several memory sizes: "
            f"use one of {', '.join(repr(entry.name) for entry in matches)}"
        )
    known = [spelling for entry in gpus() for spelling in (entry.name, *entry.aliases)]
    raise HardwareError(
        f"a GPU is a name from the catalogue or a size such as '24GiB' or 'apple:16GiB'; got {name!r}."
        f"{nearest(name, known)}"
    )


def recognise(driver_name: str, total_memory_bytes: int, capability: Capability, vendor: Vendor = "nvidia") -> Gpu:
    """Return the catalogue's entry for a device that is present, with the device's own memory and capability.

    Of several sizes under one name the nearest is taken; a device that the catalogue does not know comes back
    without rates.
    """
    folded = _fold(driver_name)
    matches = [entry for entry in gpus() if folded in map(_fold, (entry.name, *entry.aliases))]
    if matches:
        found = min(matches, key=lambda entry: abs(entry.usable_bytes - total_memory_bytes))
    else:
        found = replace(
            _gpu_of_size(total_memory_bytes), name=driver_name, vendor=vendor, source="not in the catalogue"
        )
    return replace(
        found,
        usable_bytes=total_memory_bytes,
        total_bytes=max(found.total_bytes, total_memory_bytes),
        capability=capability,
        usable_source="read from the device",
    )


def apple_gpu(memory_bytes: int, recommended_bytes: int | None = None) -> Gpu:
    """Return an Apple GPU: so much unified memory, of which Metal recommends to use ``recommended_bytes``."""
    if recommended_bytes is None:
        recommended_bytes = memory_bytes * 2 // 3 if memory_bytes <= 36 * GiB else memory_bytes * 3 // 4
        usable_source = (
            "assumed: Metal's recommendedMaxWorkingSetSize is said to be 2/3 of the memory up to 36 GiB and "
            "3/4 above; unverified"
        )
    else:
        usable_source = "Metal's recommendedMaxWorkingSetSize, read from the device"
    return Gpu(
        name=f"Apple {format_bytes(memory_bytes)}",
        vendor="apple",
        capability=None,
        total_bytes=memory_bytes,
        usable_bytes=recommended_bytes,
        source="given as a size; rates unknown",
        usable_source=usable_source,
    )


def _gpu_of_size(size_bytes: int) -> Gpu:
    return Gpu(
        name=f"GPU of {format_bytes(size_bytes)}",
        capability=_ASSUMED_CAPABILITY,
        total_bytes=size_bytes,
        usable_bytes=size_bytes,
        source="given as a size; compute capability 8.0 assumed, rates unknown",
        usable_source="given; taken as what PyTorch reports as the device's total",
    )


def _fold(name: str) -> str:
    """Reduce a name to what distinguishes it: ``"NVIDIA GeForce RTX 3060 12 GB"`` is ``"306012g"``."""
    letters_and_digits = re.sub(r"[^a-z0-9]", "", name.lower())
    return re.sub(r"(?<=\d)gi?b?$", "g", _BRANDS.sub("", letters_and_digits))


def _gpu_from(entry: Mapping[str, Any]) -> Gpu:
    major, minor = entry["capability"].split(".")
    pcie = entry.get("pcie")
    return Gpu(
        name=entry["name"],
        aliases=tuple(entry.get("aliases", ())),
        vendor=entry.get("vendor", "nvidia"),
        capability=(int(major), int(minor)),
        total_bytes=parse_bytes(entry["total"]),
        usable_bytes=parse_bytes(entry["usable"]),
        bandwidth_bytes_per_s=entry["bandwidth_gb_per_s"] * 1e9,
        peak_flops={dtype: rate * 1e12 for dtype, rate in entry["tflops"].items()},
        pcie=None if pcie is None else (pcie["generation"], pcie["lanes"]),
        nvlink_bytes_per_s=entry["nvlink_gb_per_s"] * 1e9 if "nvlink_gb_per_s" in entry else None,
        source=entry["source"],
        usable_source=entry["usable_source"],
    )
