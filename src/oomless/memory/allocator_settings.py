"""The options of ``PYTORCH_CUDA_ALLOC_CONF`` (``PYTORCH_ALLOC_CONF`` since 2.9) that change what memory is held."""

from __future__ import annotations

import re
from dataclasses import dataclass, fields
from typing import Any

from oomless.errors import ConfigError, nearest
from oomless.units import MiB

INTERVALS = 16
_IGNORED = {"pinned_use_cuda_host_register", "pinned_num_register_threads", "pinned_use_background_threads"}


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorSettings:
    """How the caching allocator rounds, splits, grows and gives back."""

    max_split_size_bytes: int | None = None
    """Blocks of this size and more are never split; None means no limit."""

    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """For sizes from 1 MiB to 64 GiB, one entry per power of two: steps between it and the next; 0 means 512 B steps."""

    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached blocks are given back; needs ``memory_fraction``."""

    expandable_segments: bool = False
    """Grow one address range per stream and pool instead of making segments."""

    large_segment_bytes: int = 20 * MiB
    """Size of the segments that requests between 1 and 10 MiB share."""

    memory_fraction: float | None = None
    """Share of the GPU that the process may take (``per_process_memory_fraction``)."""

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Return the settings that ``"expandable_segments:True,max_split_size_mb:128"`` stands for.

        Raises:
            ConfigError: a key is unknown, a value is not allowed, or the backend is not the caching allocator.
        """
        values: dict[str, Any] = {}
        for key, value in re.findall(r"([^,:\s]+)\s*:\s*(\[[^\]]*\]|[^,]*)", text):
            value = value.strip()
            if key == "backend":
                if value != "native":
                    raise ConfigError(
                        f"the simulation is of the native caching allocator; backend {value!r} has other rules"
                    )
            elif key in _READERS:
                name, read = _READERS[key]
                try:
                    values[name] = read(value)
                except ValueError as error:
                    raise ConfigError(f"{key}:{value} is not allowed: {error}") from error
            elif key not in _IGNORED:
                raise ConfigError(f"unknown allocator option {key!r}.{nearest(key, [*_READERS, 'backend'])}")
        leftover = re.sub(r"([^,:\s]+)\s*:\s*(\[[^\]]*\]|[^,]*)", "", text).strip(", ")
        if leftover:
            raise ConfigError(f"allocator options are key:value pairs joined by commas; got {leftover!r}")
        return cls(**values)

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _megabytes(text: str) -> int:
    if not int(text) > 20:
        raise ValueError("it must be more than 20 MiB")
    return int(text) * MiB


def _large_segment(text: str) -> int:
    if not int(text) >= 20:
        raise ValueError("it must be at least 20 MiB")
    return int(text) * MiB


def _share(text: str) -> float:
    if not 0 < float(text) <= 1:
        raise ValueError("it must be above 0 and at most 1")
    return float(text)


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("it must be True or False")
    return text == "True"


def _power_of_two(text: str) -> int:
    number = int(text)
    if number < 1 or number & (number - 1):
        raise ValueError("divisions must be powers of two")
    return number


def _divisions(text: str) -> tuple[int, ...]:
    """Read ``8`` or ``[32:256,64:128,256:64,>:32]``, sizes in MiB."""
    if not text.startswith("["):
        return (_power_of_two(text),) * INTERVALS
    divisions = [0] * INTERVALS
    last = 0
    for number, (size, count) in enumerate(pair.split(":") for pair in text.strip("[]").split(",")):
        value = _power_of_two(count.strip())
        if size.strip() == ">":
            divisions[last + 1 :] = [value] * (INTERVALS - last - 1)
            continue
        last = min(_power_of_two(size.strip()).bit_length() - 1, INTERVALS - 1)
        divisions[0 if number == 0 else last : last + 1] = [value] * (last + 1 if number == 0 else 1)
    return tuple(divisions)


_READERS: dict[str, tuple[str, Any]] = {
    "max_split_size_mb": ("max_split_size_bytes", _megabytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _share),
    "expandable_segments": ("expandable_segments", _boolean),
    "large_segment_size_mb": ("large_segment_bytes", _large_segment),
    "per_process_memory_fraction": ("memory_fraction", _share),
}
