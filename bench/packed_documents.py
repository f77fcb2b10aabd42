"""Launches of attention, operators and memory of a step over packed documents, in one launch and one by one, as a rehearsal counts them.

    python bench/packed_documents.py [--write bench/results/packed_documents.md]

Llama 3.2 1B, all of it trained by SGD in bf16, one block of 2,048 tokens; forward and backward, no checkpointing.
"""

from __future__ import annotations

import argparse
from collections import Counter
from pathlib import Path
from typing import Any
from unittest.mock import patch

from oomless.config import DataSource, TrainConfig
from oomless.memory.work import WorkCounter
from oomless.models import attention
from oomless.models.spec import resolve_for_plan
from oomless.ops.attention import Kernel
from oomless.planning.layout import Layout
from oomless.planning.rehearse import rehearse, virtual_device
from oomless.units import format_bytes
from provenance import provenance

MODEL, TOKENS = "meta-llama/Llama-3.2-1B", 2048
KERNELS: tuple[Kernel, ...] = ("flash", "efficient")
HEADER = (
    "| documents in a block | kernel | launches, one launch | one by one | operators | one by one | peak | one by one |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | ---: |"
)


def counted(documents: int, kernel: Kernel) -> tuple[int, int, int]:
    """Return the launches of attention, all operators of the passes, and the peak in bytes."""
    config = TrainConfig(
        model=MODEL,
        data=(DataSource(path="none"),),
        output_dir="none",
        max_seq_length=TOKENS,
        dtype="bf16",
        optimizer="sgd",
    )
    layout = Layout.uniform((TOKENS // documents,) * documents, config)
    calls: Counter[str] = Counter()
    count = WorkCounter.operator

    def operator(self: WorkCounter, key: Any, func: Any, *given: Any) -> None:
        calls["attention" in str(func)] += 1
        count(self, key, func, *given)

    device = virtual_device(1 << 44)
    with patch.object(WorkCounter, "operator", operator):
        found = rehearse(resolve_for_plan(MODEL), config, device, kernel=kernel, layout=layout, steps=1, whole=False)
    return calls[True], sum(times for _, times in found.work.of_passes), device.usage().peak_allocated_bytes


def main() -> None:
    """Print the table, or write it."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--write", type=Path)
    to = parser.parse_args().write
    rows = []
    for kernel in KERNELS:
        for documents in (1, 8, 64):
            one = counted(documents, kernel)
            with patch.object(attention, "attend_in_one_launch"):
                each = counted(documents, kernel)
            launches, operators, peaks = zip(one, each, strict=True)
            cells = [*map("{:,}".format, (*launches, *operators)), *map(format_bytes, peaks)]
            rows.append(f"| {documents} | {kernel} | {' | '.join(cells)} |")
            print(rows[-1], flush=True)
    made = provenance()
    text = (
        f"{HEADER}\n"
        + "\n".join(rows)
        + f"\n\nRehearsed with torch {made['versions']['torch']}, commit {made['commit']}.\n"
    )
    if to is not None:
        to.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
