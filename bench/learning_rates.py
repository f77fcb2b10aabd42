"""Are the default rates good ones? The held-out loss at the default beside the best of a grid of five around it.

    python bench/learning_rates.py [--work folder]

Continued pretraining of ``learning.py``: its Llama of 4.2 M parameters, which fp32 AdamW taught Python's source code in 300 steps of
1,024 tokens, goes on to learn Python's reference manual, in fp32 on one CPU, in two lengths. For each thing that can train the
peak learning rates that oomless takes where none is given are multiplied by 1/9, 1/3, 1, 3 and 9; the warm-up and the weight decay are
the defaults. The default is good where its loss is at most 1 % above the best of the five.

The small model is far below the widths that the published rules are for. What of the rule was fitted on it stands with each row:
``predicted`` rows are only compared. What is already in ``--work`` is not run again, so that a change of the rule costs its own runs
alone.
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig

from learning import BLOCKS, SEQUENCE, Bench, Route
from oomless.config import TrainConfig
from oomless.training import rates
from provenance import write

START_STEPS = 300
LENGTHS = (20, 60)
FACTORS = (1 / 9, 1 / 3, 1.0, 3.0, 9.0)
ALLOWED = 0.01
BOTH = "embed_tokens+lm_head"
ROWS: dict[str, tuple[dict[str, Any], str]] = {
    "full": ({"trainable": "full"}, "the power of the width"),
    "lora": ({"trainable": "lora"}, "nothing: predicted"),
    "lora and embeddings": ({"trainable": f"lora+{BOTH}"}, "nothing: predicted"),
    "embeddings": ({"trainable": BOTH}, "the rate of embeddings and its power"),
    "1,024 rows": ({"trainable": BOTH, "trainable_rows": "256-1279"}, "nothing: as embeddings"),
}


def measure(bench: Bench, name: str, settings: dict[str, Any], steps: int) -> dict[str, Any]:
    """Return the losses of a row at one length by what the default rates are multiplied by."""
    config = TrainConfig.from_mapping({"model": "-", "data": "-", "output_dir": "-", **settings})
    usual = rates.resolved(config, AutoConfig.from_pretrained(bench.work / "model"), steps)
    assert usual.learning_rate is not None
    losses = {}
    for factor in FACTORS:
        own = {"warmup_ratio": usual.warmup_ratio, "weight_decay": usual.weight_decay}
        if usual.embedding_learning_rate is not None:
            own["embedding_learning_rate"] = usual.embedding_learning_rate * factor
        route = Route(f"rates {name}", settings | own, ())
        losses[f"{factor:.3g}"] = bench.continued_from(route, usual.learning_rate * factor, steps, START_STEPS)["loss"]
    best, default = min(losses.values()), losses["1"]
    mark = "" if default <= best * (1 + ALLOWED) else "  too far"
    print(
        f"{name:20} {steps:4} steps  {usual.learning_rate:g}  {default:.4f}  {default / best - 1:+.2%} of the best{mark}"
    )
    return {
        "learning_rate": usual.learning_rate,
        "embedding_learning_rate": usual.embedding_learning_rate,
        "warmup_ratio": usual.warmup_ratio,
        "weight_decay": usual.weight_decay,
        "losses": losses,
        "above_best": default / best - 1,
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, default=Path("runs/learning"))
    torch.manual_seed(0)
    bench = Bench(parser.parse_args().work, evaluations=1)
    bench.prepare()
    found = {
        name: {"fitted": fitted, "steps": {str(steps): measure(bench, name, settings, steps) for steps in LENGTHS}}
        for name, (settings, fitted) in ROWS.items()
    }
    write("learning_rates", {"tokens_per_step": SEQUENCE * BLOCKS, "start_steps": START_STEPS, "rows": found})


if __name__ == "__main__":
    main()
