"""A printed size is not a number of bytes but a range of them: all that would have been printed so."""

from __future__ import annotations

import re
from dataclasses import dataclass
from decimal import ROUND_CEILING, ROUND_FLOOR, Decimal
from typing import Any

from oomless.units import GiB, KiB, MiB

TiB = 1 << 40
NONSENSE_BYTES = 1 << 50
"""No device has this much; messages show it where a subtraction went below zero or no limit is set."""

_BINARY = {"kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
_EITHER = {"kb": (1000, KiB), "mb": (1000**2, MiB), "gb": (1000**3, GiB), "tb": (1000**4, TiB)}
NUMBER = re.compile(r"\d[\d,]*(?:\.\d+)?")


@dataclass(frozen=True, kw_only=True, slots=True)
class ByteRange:
    """Every whole number of bytes from ``low`` to ``high``, both included, and the ``text`` that says so."""

    low: int
    high: int
    text: str

    def __contains__(self, size_bytes: object) -> bool:
        return isinstance(size_bytes, int) and self.low <= size_bytes <= self.high

    @property
    def middle(self) -> int:
        """The whole number of bytes in the middle."""
        return (self.low + self.high) // 2

    def to_dict(self) -> dict[str, Any]:
        """Return plain values for JSON."""
        return {"low": self.low, "high": self.high, "text": self.text}


def printed_size(number: str, unit: str, *, always_binary: bool = False) -> ByteRange | None:
    """Return the bytes that are printed as ``number`` and ``unit``; ``None`` for a size that no device has.

    PyTorch prints two decimals and changes the unit above 1024, so that ``1.00 GiB`` is at least 2^30 + 1 bytes. ``GB``
    stands for 10^9 or 2^30, whoever prints it, unless ``always_binary``.

    Raises:
        ValueError: it is no number, or the unit is unknown.
    """
    if NUMBER.fullmatch(number) is None:
        raise ValueError(f"a printed size begins with a number; got {number!r}")
    text, folded, value = f"{number} {unit}", unit.lower(), Decimal(number.replace(",", ""))
    if folded in ("bytes", "byte", "b"):
        low = high = int(value)
    else:
        if folded in _BINARY:
            small = large = _BINARY[folded]
        elif folded in _EITHER:
            small, large = _EITHER[folded]
            small = large if always_binary else small
        else:
            raise ValueError(f"a size is printed in bytes, KiB, MiB, GiB or kB, MB, GB; got {unit!r}")
        exponent = value.as_tuple().exponent
        half = Decimal(5).scaleb(int(exponent) - 1)
        low = int(((value - half) * small).to_integral_value(ROUND_CEILING))
        high = int(((value + half) * large).to_integral_value(ROUND_FLOOR))
        if folded in _BINARY and int(exponent) == -2 and value >= 1:
            low, high = max(low, large + 1), min(high, 1024 * large)
        low = max(low, 0)
    return ByteRange(low=low, high=high, text=text) if high < NONSENSE_BYTES and low <= high else None
