"""How well eight-bit codes keep Adam's moments: relative error of the update against fp32 moments.

    python bench/moment_codes.py [--write bench/results/moment_codes.md]

Gradients are normal noise, each element with a size of its own drawn from a log-normal distribution (its
sigma is the ``spread``), plus a small constant part. After 500 steps the error ‖u − u32‖ / ‖u32‖ of Adam's
update u (before the learning rate) is averaged over 100 more. The table of dynamic exponents is that of
bitsandbytes; "softsign and root" is FlashOptim's published companding, written anew here.
"""

from __future__ import annotations

import argparse
import platform
from collections.abc import Callable
from pathlib import Path

import torch
from bitsandbytes.functional import create_dynamic_map
from torch import Tensor

from oomless.optim.blockwise import decode_signed, decode_unsigned, encode_signed, encode_unsigned

COUNT, WARM_STEPS, MEASURED_STEPS = 1 << 14, 500, 100
BETA1, BETA2, EPSILON = 0.9, 0.999, 1e-8
RoundTrip = Callable[[Tensor], Tensor]


def by_block(code: RoundTrip, block: int) -> RoundTrip:
    def round_trip(values: Tensor) -> Tensor:
        rows = values.view(-1, block)
        scale = rows.abs().amax(1, keepdim=True).clamp(min=1e-38)
        return (code(rows / scale) * scale).view(-1)

    return round_trip


def table_code(signed: bool) -> RoundTrip:
    table = create_dynamic_map(signed).sort().values
    middles = (table[1:] + table[:-1]) / 2
    return lambda values: table[torch.bucketize(values, middles)]


def softsign_code(values: Tensor) -> Tensor:
    code = (2 * values / (1 + values.abs()) * 127).round() / 127
    return code / (2 - code.abs())


def root_code(values: Tensor) -> Tensor:
    return ((values.sqrt() * 255).round() / 255).square()


CODES: dict[str, tuple[RoundTrip, RoundTrip]] = {
    "oomless: square and fourth power, blocks of 256": (
        lambda values: decode_signed(*encode_signed(values)),
        lambda values: decode_unsigned(*encode_unsigned(values.clone())),
    ),
    "dynamic exponent table, blocks of 256": (
        by_block(table_code(True), 256),
        by_block(table_code(False), 256),
    ),
    "softsign and root, blocks of 32": (by_block(softsign_code, 32), by_block(root_code, 32)),
}


def errors(spread: float) -> dict[str, float]:
    generator = torch.Generator().manual_seed(0)
    size = torch.exp(spread * torch.randn(COUNT, generator=generator)) * 1e-4
    moments = {name: (torch.zeros(COUNT), torch.zeros(COUNT)) for name in [*CODES, "exact"]}
    total = dict.fromkeys(CODES, 0.0)
    for step in range(1, WARM_STEPS + MEASURED_STEPS + 1):
        gradient = (torch.randn(COUNT, generator=generator) + 0.05) * size
        updates = {}
        for name, (first, second) in moments.items():
            first = BETA1 * first + (1 - BETA1) * gradient
            second = BETA2 * second + (1 - BETA2) * gradient.square()
            updates[name] = first / (1 - BETA1**step) / ((second / (1 - BETA2**step)).sqrt() + EPSILON)
            if name in CODES:
                first, second = CODES[name][0](first), CODES[name][1](second)
            moments[name] = first, second
        if step > WARM_STEPS:
            exact = updates["exact"]
            for name in CODES:
                total[name] += ((updates[name] - exact).norm() / exact.norm()).item() / MEASURED_STEPS
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    spreads = (0.5, 1.0, 1.5)
    columns = [errors(spread) for spread in spreads]
    rows = [
        f"{COUNT:,} elements, torch {torch.__version__}, Python {platform.python_version()}",
        "",
        "| codes | " + " | ".join(f"spread {spread}" for spread in spreads) + " |",
        "| --- |" + " ---: |" * len(spreads),
        *(f"| {name} | " + " | ".join(f"{column[name]:.3f}" for column in columns) + " |" for name in CODES),
    ]
    text = "\n".join(rows) + "\n"
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
