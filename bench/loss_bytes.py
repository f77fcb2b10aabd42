"""Bytes that the loss moves beside its matrix products and operators that it takes, plain and fused, as a rehearsal counts them.

    python bench/loss_bytes.py [--write bench/results/loss_bytes.md]

2,048 tokens in bf16, chunks of 64 MiB.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from oomless.memory.fake_mode import QuickFakeMode
from oomless.ops.linear_cross_entropy import linear_cross_entropy

TOKENS = 2048
HEADS: dict[str, tuple[int, int, float | None]] = {
    "Llama 3.2 1B": (128_256, 2048, None),
    "Gemma 2 2B, capped": (256_000, 2304, 30.0),
}


def counted(vocabulary: int, width: int, softcap: float | None, trains: bool, fused: bool) -> tuple[int, int]:
    """Return the bytes moved, and the operators."""
    with QuickFakeMode() as mode:
        hidden = torch.empty(TOKENS, width, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(vocabulary, width, dtype=torch.bfloat16, requires_grad=trains)
        targets = torch.empty(TOKENS, dtype=torch.int64)
        mode.work.on = True
        linear_cross_entropy(hidden, weight, targets, softcap=softcap, fused=fused)
        mode.work.on = False
        costs = mode.work.work().of_passes
    beside = [(moved, count) for (_, flops, moved), count in costs if not flops]
    return sum(moved * count for moved, count in beside), sum(count for _, count in beside)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    lines = ["| head | GB, plain | fused | operators, plain | fused |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, head in HEADS.items():
        for trains in (True, False):
            (plain, many), (fused, few) = (counted(*head, trains, fused) for fused in (False, True))
            label = f"{name}, {'trains' if trains else 'frozen'}"
            lines.append(f"| {label} | {plain / 1e9:.1f} | {fused / 1e9:.1f} | {many:,} | {few} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
