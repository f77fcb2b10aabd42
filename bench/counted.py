"""What the benches of counted work share: bytes and operators beside products, and a table for the screen or a file."""

from __future__ import annotations

import argparse
from collections.abc import Iterable
from pathlib import Path

from oomless.memory.work import Cost


def beside_products(costs: Iterable[tuple[Cost, int]]) -> tuple[int, int]:
    """Return the bytes moved by what is no matrix product and no attention, and its operators."""
    beside = [(moved, count) for (_, flops, moved), count in costs if not flops]
    return sum(moved * count for moved, count in beside), sum(count for _, count in beside)


def show(description: str | None, lines: list[str]) -> None:
    """Print the table of ``lines``, and write it where ``--write`` says."""
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    to = parser.parse_args().write
    text = "\n".join(lines) + "\n"
    print(text)
    if to is not None:
        to.write_text(text, encoding="utf-8")
