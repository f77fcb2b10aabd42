"""Bytes that one update moves and operators that it takes, plain and fused, as a rehearsal counts them.

    python bench/update_bytes.py [--write bench/results/update_bytes.md]

One matrix of 4,096 x 4,096 with its gradient scaled and checked for infinities, as in a run.
"""

from __future__ import annotations

import torch
from torch import nn

from counted import show
from oomless.memory.fake_mode import QuickFakeMode
from oomless.optim import build

SIDE = 4096
BF16, FP32 = torch.bfloat16, torch.float32
UPDATES: list[tuple[str, torch.dtype, str | None]] = [
    *(("adamw", FP32, None), ("adamw", BF16, "master"), ("adamw", BF16, "correction"), ("adamw", BF16, "stochastic")),
    *(("adamw_8bit", FP32, None), ("adamw_8bit", BF16, "master"), ("adamw_8bit", BF16, "correction")),
    *(
        ("adamw_8bit", BF16, "stochastic"),
        ("sgd", FP32, None),
        ("sgd", BF16, "correction"),
        ("sgd", BF16, "stochastic"),
    ),
    *(("adafactor", FP32, None), ("adafactor", BF16, "correction"), ("adafactor", BF16, "stochastic")),
    *(("apollo", FP32, None), ("apollo", BF16, "correction"), ("apollo", BF16, "stochastic")),
    *(("apollo_mini", FP32, None), ("apollo_mini", BF16, "correction"), ("apollo_mini", BF16, "stochastic")),
    *(("galore", FP32, None), ("galore", BF16, "correction"), ("galore", BF16, "stochastic")),
]


def counted(name: str, dtype: torch.dtype, way: str | None, fused: bool) -> tuple[float, int]:
    """Return the bytes moved for each parameter, and the operators."""
    with QuickFakeMode() as mode:
        weight = nn.Parameter(torch.empty(SIDE, SIDE, dtype=dtype))
        optimizer = build(name, [weight], lr=1e-3, weight_precision=way)
        optimizer.fused = fused
        weight.grad = torch.empty_like(weight)
        scale, found_inf = torch.ones(()), torch.zeros(())
        mode.work.on = True
        optimizer.step(gradient_scale=scale, found_inf=found_inf)
        mode.work.on = False
        costs = mode.work.work().of_passes
    return sum(cost[2] * count for cost, count in costs) / SIDE**2, sum(count for _, count in costs)


def main() -> None:
    lines = [
        "| update | bytes a parameter, plain | fused | operators, plain | fused |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    for name, dtype, way in UPDATES:
        (plain, many), (fused, few) = (counted(name, dtype, way, fused) for fused in (False, True))
        label = f"`{name}`, {'fp32' if way is None else f'bf16, {way}'}"
        lines.append(f"| {label} | {plain:.1f} | {fused:.1f} | {many} | {few} |")
    show(__doc__, lines)


if __name__ == "__main__":
    main()
