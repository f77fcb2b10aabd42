"""Bytes that the loss moves beside its matrix products and operators that it takes, plain and fused, as a rehearsal counts them.

    python bench/loss_bytes.py [--write bench/results/loss_bytes.md]

2,048 tokens in bf16, chunks of 64 MiB.
"""

from __future__ import annotations

import torch

from counted import beside_products, show
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
    return beside_products(costs)


def main() -> None:
    lines = ["| head | GB, plain | fused | operators, plain | fused |", "| --- | ---: | ---: | ---: | ---: |"]
    for name, head in HEADS.items():
        for trains in (True, False):
            (plain, many), (fused, few) = (counted(*head, trains, fused) for fused in (False, True))
            label = f"{name}, {'trains' if trains else 'frozen'}"
            lines.append(f"| {label} | {plain / 1e9:.1f} | {fused / 1e9:.1f} | {many:,} | {few} |")
    show(__doc__, lines)


if __name__ == "__main__":
    main()
