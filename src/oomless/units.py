"""Whole bytes inside, binary units on screen; the only place where one becomes the other."""

from __future__ import annotations

import re

KiB = 1 << 10
MiB = 1 << 20
GiB = 1 << 30
TiB = 1 << 40

_UNITS = {"": 1, "b": 1, "kib": KiB, "mib": MiB, "gib": GiB, "tib": TiB}
_UNITS |= {"kb": 1000, "mb": 1000**2, "gb": 1000**3, "tb": 1000**4}
_COUNTS = {"": 1, "k": 10**3, "m": 10**6, "b": 10**9, "g": 10**9, "t": 10**12}
Gbit = 1e9 / 8
"""In bytes, of a network's rate."""

_RATES = {"mbit": Gbit / 1000, "gbit": Gbit, "tbit": 1000 * Gbit, "mb": 1e6, "gb": 1e9, "tb": 1e12}
_SIZE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*([a-zA-Z]*)\s*")
_RATE = re.compile(r"\s*(\d+(?:\.\d+)?)\s*(?:([MGT]bit)(?:/s)?|([MGT]B)/s)\s*", re.IGNORECASE)


def format_bytes(size_bytes: int) -> str:
    """Return ``size_bytes`` in the binary unit that suits it: ``"3.20 GiB"``, ``"512 B"``."""
    for unit, name in ((GiB, "GiB"), (MiB, "MiB"), (KiB, "KiB")):
        if abs(size_bytes) >= unit:
            return f"{size_bytes / unit:.2f} {name}"
    return f"{size_bytes} B"


def counted(number: int, noun: str) -> str:
    """Return ``"1 step"`` or ``"2,000 steps"``."""
    return f"{number:,} {noun}{'' if number == 1 else 's'}"


def short(number: float) -> str:
    """Return ``"100M"`` for 100,000,000: at most three digits and their unit."""
    for unit, name in ((10**12, "T"), (10**9, "B"), (10**6, "M"), (10**3, "k")):
        if number >= 0.9995 * unit:
            return f"{number / unit:.3g}{name}"
    return f"{number:.3g}"


def parse_count(text: str) -> int:
    """Return the whole number that ``"100M"``, ``"1.5B"`` or ``"32768"`` stands for.

    Raises:
        ValueError: ``text`` is no number followed by one of k, M, B (or G), T.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _COUNTS:
        raise ValueError(f"a number of tokens is a number and one of k, M, B, T, such as 100M; got {text!r}")
    return round(float(match[1]) * _COUNTS[match[2].lower()])


def parse_bytes(text: str) -> int:
    """Return the whole bytes that ``"14.7GiB"``, ``"256 MiB"`` or ``"1024"`` stands for.

    Raises:
        ValueError: ``text`` is no number followed by one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB.
    """
    match = _SIZE.fullmatch(text)
    if match is None or match[2].lower() not in _UNITS:
        raise ValueError(f"a size is a number and one of B, KiB, MiB, GiB, TiB, kB, MB, GB, TB; got {text!r}")
    return round(float(match[1]) * _UNITS[match[2].lower()])


def format_rate(bytes_per_s: float) -> str:
    """Return the rate of a network in the unit in which it is sold: ``"100 Gbit/s"``."""
    return f"{bytes_per_s / Gbit:,.4g} Gbit/s"


def parse_rate(text: str) -> float:
    """Return the bytes a second that ``"100Gbit"``, ``"100 Gbit/s"`` or ``"12.5GB/s"`` stands for.

    Raises:
        ValueError: ``text`` is no number, more than 0, followed by one of Mbit, Gbit, Tbit, MB/s, GB/s, TB/s.
    """
    match = _RATE.fullmatch(text)
    if match is None or not float(match[1]):
        raise ValueError(
            "a network's rate is a number, more than 0, and one of Mbit, Gbit, Tbit (a second), MB/s, GB/s, TB/s, such as 100Gbit; "
            f"got {text!r}"
        )
    return float(match[1]) * _RATES[(match[2] or match[3]).lower()]
