"""The options of ``PYTORCH_CUDA_ALLOC_CONF`` / ``PYTORCH_ALLOC_CONF`` that change what memory is held.

Read as torch 2.13 reads them (``c10/core/AllocatorConfig``, ``c10/cuda/CUDAAllocatorConfig``), with its limits and its
meaning of ``roundup_power2_divisions``. Stricter than torch in one way: trailing letters after a number and a
missing colon or comma, which torch overlooks, are errors. Options of host memory and of CUDA graphs are accepted and
have no effect here.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from typing import Any

from oomless.errors import ConfigError, nearest
from oomless.units import MiB

INTERVALS = 16
"""Powers of two from 1 MiB on that have their own number of divisions; the last serves all larger sizes."""

_OPTION = re.compile(r"([^,:\[\]]+):(\[[^\[\]]*\]|[^,:\[\]]+)(?:,|$)")
_WITHOUT_EFFECT = {
    "graph_capture_record_stream_reuse",
    "pinned_free_catch_all",
    "pinned_max_cached_size_mb",
    "pinned_max_round_threshold_mb",
    "pinned_num_register_threads",
    "pinned_reserve_segment_size_mb",
    "pinned_use_background_threads",
    "pinned_use_cuda_host_register",
    "release_lock_on_cudamalloc",
}
_CUDA_ONLY = ("memory_fraction", "refuse_early")


class AllocatorSettingsError(ConfigError, ValueError):
    """An allocator option that is unknown, malformed or out of its range."""


@dataclass(frozen=True, kw_only=True, slots=True)
class AllocatorSettings:
    """How the caching allocator rounds, splits, grows and gives back.

    Raises:
        AllocatorSettingsError: a value that PyTorch would refuse.
    """

    max_split_size_bytes: int | None = None
    """Blocks of this size and more are never split; None: no limit. At least ``large_segment_bytes``."""

    max_non_split_rounding_bytes: int | None = None
    """An unsplittable request takes a cached block that is less than this larger; None: ``large_segment_bytes``."""

    roundup_power2_divisions: tuple[int, ...] = (0,) * INTERVALS
    """For sizes from 1 MiB to 64 GiB, one entry per power of two: steps between it and the next; 0 or 1: 512 B steps."""

    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached blocks are given back; 0: never. Needs ``memory_fraction`` < 1."""

    expandable_segments: bool = False
    """Grow one address range per stream and pool instead of making segments."""

    large_segment_bytes: int = 20 * MiB
    """Size of the segments that requests between 1 and 10 MiB share, and of the pages of large expandable ones."""

    memory_fraction: float = 1.0
    """Share of the GPU's total memory that the process may take (``per_process_memory_fraction``)."""

    refuse_early: bool = False
    """``throw_on_cudamalloc_oom``: fail without trying to free cached blocks first."""

    def __post_init__(self) -> None:
        segment = self.large_segment_bytes
        _require(segment > 10 * MiB, "large_segment_size_mb must be more than 10", segment // MiB)
        for name, size in (
            ("max_split_size_mb", self.max_split_size_bytes),
            ("max_non_split_rounding_mb", self.max_non_split_rounding_bytes),
        ):
            if size is not None:
                _require(
                    size >= segment, f"{name} must be at least large_segment_size_mb, {segment // MiB}", size // MiB
                )
        _require(
            len(self.roundup_power2_divisions) == INTERVALS
            and all(count >= 0 and not count & (count - 1) for count in self.roundup_power2_divisions),
            f"roundup_power2_divisions must be {INTERVALS} powers of two or zeros",
            self.roundup_power2_divisions,
        )
        threshold = self.garbage_collection_threshold
        _require(0 <= threshold < 1, "garbage_collection_threshold must be between 0 and 1, both excluded", threshold)
        _require(
            0 <= self.memory_fraction <= 1, "per_process_memory_fraction must be from 0 to 1", self.memory_fraction
        )

    @classmethod
    def parse(cls, text: str) -> AllocatorSettings:
        """Return the settings that ``"expandable_segments:True,max_split_size_mb:128"`` stands for.

        Raises:
            AllocatorSettingsError: a key is unknown, a value is not allowed, or the backend is not the native one.
        """
        values: dict[str, Any] = {}
        rest = "".join(text.split())
        while rest:
            option = _OPTION.match(rest)
            _require(option is not None, "allocator options are key:value pairs joined by commas", rest)
            assert option is not None
            key, value = option.groups()
            rest = rest[option.end() :]
            if key == "backend":
                _require(
                    value == "native",
                    "only backend:native, the caching allocator, is simulated (cudaMallocAsync follows the driver's own "
                    "rules)",
                    value,
                )
            elif key in _READERS:
                field, read = _READERS[key]
                try:
                    values[field] = read(value)
                except ValueError as error:
                    raise AllocatorSettingsError(f"{key}: {error}; got {value!r}") from error
            elif key not in _WITHOUT_EFFECT:
                known = [*_READERS, *_WITHOUT_EFFECT, "backend"]
                raise AllocatorSettingsError(f"unknown allocator option {key!r}.{nearest(key, known)}")
        if "garbage_collection_threshold" in values:
            threshold = values["garbage_collection_threshold"]
            _require(threshold > 0, "garbage_collection_threshold must be between 0 and 1, both excluded", threshold)
        return cls(**values)

    @classmethod
    def from_environment(cls, environment: Mapping[str, str] = os.environ) -> AllocatorSettings:
        """Return the settings that a process started with ``environment`` would run under.

        Where both variables are set, torch takes what concerns every accelerator from ``PYTORCH_ALLOC_CONF`` and what
        concerns CUDA alone from ``PYTORCH_CUDA_ALLOC_CONF``.

        Raises:
            AllocatorSettingsError: see ``parse``.
        """
        general, cuda = environment.get("PYTORCH_ALLOC_CONF"), environment.get("PYTORCH_CUDA_ALLOC_CONF")
        if general is None or cuda is None:
            return cls.parse(general or cuda or "")
        of_cuda = cls.parse(cuda).to_dict()
        return cls(**(cls.parse(general).to_dict() | {field: of_cuda[field] for field in _CUDA_ONLY}))

    def to_text(self) -> str:
        """Return what ``parse`` would read these settings from; only what differs from the defaults."""
        options = {
            "large_segment_size_mb": self.large_segment_bytes // MiB,
            "max_split_size_mb": _optional_mebibytes(self.max_split_size_bytes),
            "max_non_split_rounding_mb": _optional_mebibytes(self.max_non_split_rounding_bytes),
            "roundup_power2_divisions": "["
            + ",".join(f"{1 << power}:{count}" for power, count in enumerate(self.roundup_power2_divisions))
            + "]",
            "garbage_collection_threshold": self.garbage_collection_threshold,
            "expandable_segments": self.expandable_segments,
            "per_process_memory_fraction": self.memory_fraction,
            "throw_on_cudamalloc_oom": self.refuse_early,
        }
        default = AllocatorSettings()
        return ",".join(
            f"{key}:{options[key]}"
            for key, (field, _) in _READERS.items()
            if getattr(self, field) != getattr(default, field)
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the settings as plain values."""
        return {field.name: getattr(self, field.name) for field in fields(self)}


def _require(condition: bool, rule: str, got: object) -> None:
    if not condition:
        raise AllocatorSettingsError(f"{rule}; got {got!r}")


def _whole(text: str) -> int:
    if not re.fullmatch(r"\d+", text):
        raise ValueError("the value must be a whole number")
    return int(text)


def _mebibytes(text: str) -> int:
    return _whole(text) * MiB


def _optional_mebibytes(size_bytes: int | None) -> int | None:
    return None if size_bytes is None else size_bytes // MiB


def _share(text: str) -> float:
    try:
        return float(text)
    except ValueError:
        raise ValueError("the value must be a number between 0 and 1") from None


def _boolean(text: str) -> bool:
    if text not in ("True", "False"):
        raise ValueError("the value must be True or False")
    return text == "True"


def _power_of_two(text: str, what: str) -> int:
    number = _whole(text)
    if number < 1 or number & (number - 1):
        raise ValueError(f"{what} must be a power of two")
    return number


def _divisions(text: str) -> tuple[int, ...]:
    """Read ``8``, or ``[32:256,64:128,256:64,>:32]`` with sizes in MiB.

    The first pair also holds for all smaller sizes, ``>`` for all sizes after the last pair before it; a size
    that lies between two pairs is not rounded.
    """
    if not text.startswith("["):
        return (_power_of_two(text, "the number of divisions"),) * INTERVALS
    divisions = [0] * INTERVALS
    last = 0
    first = True
    for pair in text[1:-1].split(","):
        size, colon, count = pair.partition(":")
        if not colon:
            raise ValueError("each entry of the list must be size:divisions")
        value = 0 if count == "0" else _power_of_two(count, "the number of divisions")
        if size == ">":
            divisions[last + 1 :] = [value] * (INTERVALS - last - 1)
            continue
        last = min(_power_of_two(size, "a size").bit_length() - 1, INTERVALS - 1)
        if first:
            divisions[:last] = [value] * last
            first = False
        divisions[last] = value
    return tuple(divisions)


_READERS: dict[str, tuple[str, Callable[[str], Any]]] = {
    "max_split_size_mb": ("max_split_size_bytes", _mebibytes),
    "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _mebibytes),
    "roundup_power2_divisions": ("roundup_power2_divisions", _divisions),
    "garbage_collection_threshold": ("garbage_collection_threshold", _share),
    "expandable_segments": ("expandable_segments", _boolean),
    "large_segment_size_mb": ("large_segment_bytes", _mebibytes),
    "per_process_memory_fraction": ("memory_fraction", _share),
    "throw_on_cudamalloc_oom": ("refuse_early", _boolean),
}
