"""Does the balanced pick learn as much as anything that fits, within the same time on the same GPU?

    python bench/equal_time.py [--work folder]

The Llama of 4.2 M parameters of bench/learning.py, which fp32 AdamW taught code, goes on to Python's reference manual on ten virtual
GPUs, from one that holds everything down to one where little fits. Each is a T4 with less memory and rates a thousand times lower, so
that what a small model takes of it is what a real one takes of a real one, but with 16-bit arithmetic in bf16. For each size the search
is asked for the balanced training of a text in so many hours, and for each strategy below it is asked, pinned, how fast it trains
there, if it fits. Every strategy that is asked for is trained once, at the learning rate that oomless gives it, which stays after a tenth of warm-up; what
it has learnt on a size is its held-out loss after the tokens that it reads there in the time, read off its curve. Writes
``results/equal_time.json`` and ``results/equal_time.md``, which docs/planner.md shows.
"""

from __future__ import annotations

import argparse
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from learning import BLOCKS, SEQUENCE, Bench, Route
from oomless.catalogue import gpu
from oomless.config import TrainConfig
from oomless.models.spec import resolve
from oomless.planning.plan import Target
from oomless.planning.search import search
from oomless.planning.strategies import Settings
from oomless.planning.wish import Wish
from oomless.training import rates
from provenance import RESULTS, write

MiB = 1 << 20
SIZES = (36, 40, 44, 48, 52, 56, 64, 76, 92, 112)
"""Of the GPUs, in MiB."""

SLOWER = 1000
STEP_TOKENS = SEQUENCE * BLOCKS
START_STEPS = 300
LONGEST = 200
STEPS = 160
"""Of full training with fp32 masters where everything fits, which sets the hours; none takes more than `LONGEST`."""

ALLOWED = 0.02
FULL = [
    ("adamw", "master"),
    ("adamw", "correction"),
    ("adamw_8bit", "correction"),
    ("apollo", "stochastic"),
    ("adafactor", "stochastic"),
]
LORA = [("lora+embed_tokens+lm_head", None), ("lora", None), ("lora", "int8"), ("lora", "nf4")]
STRATEGIES: list[Settings] = [
    {"trainable": "full", "quantization": None, "optimizer": optimizer, "weight_precision": precision}
    for optimizer, precision in FULL
] + [
    {"trainable": trainable, "quantization": bits, "optimizer": "adamw", "weight_precision": "master"}
    for trainable, bits in LORA
]


def target(size: int) -> Target:
    """Return a virtual GPU of ``size`` MiB."""
    known = gpu("T4")
    slow = replace(
        known,
        bandwidth_bytes_per_s=(known.bandwidth_bytes_per_s or 0) / SLOWER,
        pcie=(3, 16 / SLOWER),  # type: ignore[arg-type]
        peak_flops={"bf16" if name == "fp16" else name: rate / SLOWER for name, rate in known.peak_flops.items()},
    )
    return Target(
        name=f"{size} MiB",
        capacity_bytes=size * MiB,
        outside_bytes=0,
        workspace_bytes=0,
        compute_capability=(8, 0),
        gpu=slow,
        host_bytes=1 << 30,
    )


def asked(model: Path, size: int, pins: Settings, wish: Wish) -> tuple[Settings, float] | None:
    """Return the quality of the balanced training on ``size`` MiB that agrees with ``pins`` and its seconds a token; ``None`` where none fits."""
    given: Settings = {"model": str(model), "data": "-", "output_dir": "-", "dtype": "bf16", "max_seq_length": SEQUENCE}
    given["tokens_per_step"] = STEP_TOKENS
    row = search(resolve(str(model)), given | pins, target(size), processes=1, wish=wish).picked
    return None if row is None else (row.quality.settings() | {"clips": row.quality.clips}, row.seconds)


def name_of(strategy: Settings) -> str:
    """Return it in words."""
    words = [strategy["trainable"], strategy["quantization"], strategy["optimizer"], strategy["weight_precision"]]
    return " ".join([word for word in words if word] + ([] if strategy.get("clips", True) else ["unclipped"]))


def loss_after(curve: list[list[float]], tokens: float) -> float:
    """Return the held-out loss of ``curve`` after ``tokens``, between its points."""
    steps = tokens / STEP_TOKENS
    for (before, higher), (after, lower) in zip(curve, curve[1:], strict=False):
        if steps <= after:
            return higher + (lower - higher) * (steps - before) / (after - before)
    return curve[-1][1]


def learn(bench: Bench, strategy: Settings) -> list[list[float]]:
    """Return the curve of ``strategy``."""
    clips = strategy.get("clips", True)
    settings = {name: value for name, value in strategy.items() if value is not None and name != "clips"}
    settings |= {"dtype": "bf16", "lr_scheduler_type": "constant"} | ({} if clips else {"max_grad_norm": 0})
    run = TrainConfig.from_mapping({"model": str(bench.work / "model"), "data": "-", "output_dir": "-"} | settings)
    rate = rates.resolved(run, resolve(run.model).config).learning_rate
    assert rate is not None
    route = Route(f"equal time {name_of(strategy)}", settings, (rate,))
    curve: list[list[float]] = bench.continued_from(route, rate, LONGEST, START_STEPS)["curve"]
    return curve


def table(rows: dict[Any, Any]) -> str:
    """Return the rows for docs/planner.md, each with the loss of the pick and that of the best."""
    lines = [
        "| GPU, MiB | balanced pick | its loss | best of what fits | its loss | above |",
        "|---:|---|---:|---|---:|---:|",
    ]
    for size, row in rows.items():
        if row["pick"] is None:
            lines.append(f"| {size} | nothing fits | | | | |")
            continue
        cells = [f"{row[name]} | {row['losses'][row[name]]:.3f}" for name in ("pick", "best")]
        lines.append(f"| {size} | {cells[0]} | {cells[1]} | {row['above']:.1%} |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Ask, train, compare, and write the result."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    torch.manual_seed(0)
    bench = Bench(parser.parse_args().work, evaluations=20)
    bench.prepare()
    model = bench.work / "model"
    most = asked(model, 4 * SIZES[-1], STRATEGIES[0], Wish())
    assert most is not None
    seconds = STEPS * STEP_TOKENS * most[1]
    wish = Wish(tokens=LONGEST * STEP_TOKENS, hours=seconds / 3600)
    curves: dict[str, list[list[float]]] = {}
    rows: dict[int, Any] = {}
    for size in SIZES:
        pick = asked(model, size, {}, wish)
        fitting = [found for pins in STRATEGIES if (found := asked(model, size, pins, wish)) is not None]
        every = {name_of(one): (one, of_token) for one, of_token in [*fitting, *([pick] if pick else [])]}
        losses = {}
        for name, (strategy, of_token) in every.items():
            if name not in curves:
                curves[name] = learn(bench, strategy)
            losses[name] = loss_after(curves[name], min(seconds / of_token, LONGEST * STEP_TOKENS))
        best = min(losses, key=lambda name: losses[name]) if losses else None
        rows[size] = {"pick": name_of(pick[0]) if pick else None, "best": best, "losses": losses}
        rows[size]["above"] = losses[name_of(pick[0])] / losses[best] - 1 if pick and best else None
        print(size, json.dumps(rows[size]), flush=True)
    held = sum(row["above"] is not None and row["above"] <= ALLOWED for row in rows.values())
    (RESULTS / "equal_time.md").write_text(table(rows), encoding="utf-8")
    facts = {"seconds": seconds, "allowed": ALLOWED, "sizes_within": held, "sizes": len(SIZES)}
    print(
        f"{held} of {len(SIZES)} within {ALLOWED:.0%}; written to {write('equal_time', facts | {'rows': rows, 'curves': curves})}"
    )


if __name__ == "__main__":
    main()
