"""The cases that oomless began with, planned: what each needs on a T4, what stands there, and whether a batch could help.

    python bench/seed_cases.py            writes results/seed_cases.md

No GPU is needed: every row is a rehearsal. docs/memory.md shows the table, and a test compares the two.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from oomless.config import TrainConfig
from oomless.planning.plan import Plan, plan_training
from oomless.units import format_bytes
from provenance import RESULTS, provenance

LLAMA, GEMMA = "meta-llama/Llama-3.2-1B", "google/gemma-7b"
CASES: tuple[tuple[str, str, dict[str, Any]], ...] = (
    ("everything in fp32, AdamW: the plain recipe", LLAMA, {"dtype": "fp32"}),
    ("everything in fp16 with fp32 copies, AdamW", LLAMA, {}),
    ("everything in fp16 with fp32 copies, 8-bit Adam", LLAMA, {"optimizer": "adamw_8bit"}),
    (
        "LoRA, embeddings and head untied with fp32 copies, 8-bit Adam",
        LLAMA,
        {"trainable": "lora+lm_head+embed_tokens", "tied_weights": "untied", "optimizer": "adamw_8bit"},
    ),
    (
        "lm_head alone, untied from the embeddings, with its fp32 copy, 8-bit Adam",
        LLAMA,
        {"trainable": "lm_head", "tied_weights": "untied", "optimizer": "adamw_8bit"},
    ),
    (
        "everything in fp16 with 8 bits of correction, 8-bit Adam, checkpointing",
        LLAMA,
        {"optimizer": "adamw_8bit", "weight_precision": "correction", "gradient_checkpointing": True},
    ),
    ("everything in fp16 with fp32 copies, AdamW", GEMMA, {}),
    (
        "LoRA, embeddings and head untied with fp32 copies, 8-bit Adam, checkpointing",
        GEMMA,
        {
            "trainable": "lora+lm_head+embed_tokens",
            "tied_weights": "untied",
            "optimizer": "adamw_8bit",
            "gradient_checkpointing": True,
        },
    ),
    (
        "lm_head alone, untied from the embeddings, with its fp32 copy, 8-bit Adam",
        GEMMA,
        {"trainable": "lm_head", "tied_weights": "untied", "optimizer": "adamw_8bit"},
    ),
)
HEADER = (
    "| model | what its user asked for | needs | weights, gradients, optimizer state | on a T4 |\n|---|---|---|---|---|"
)


def planned(model: str, settings: dict[str, Any]) -> Plan:
    """Return the plan of one case on a T4: one block of 2,048 tokens at a time."""
    common = {"data": "-", "output_dir": "-", "gpu": "T4", "max_seq_length": 2048}
    return plan_training(TrainConfig.from_mapping({"model": model, **common, **settings}))


def row(what: str, model: str, answer: Plan) -> str:
    """Return one line of the table."""
    if answer.fits:
        verdict = f"fits, {format_bytes(answer.headroom_bytes)} left"
    elif answer.batch_cannot_help:
        verdict = f"does not fit; no batch size can help: the allocator has {format_bytes(answer.target.usable_bytes)}"
    else:
        verdict = "does not fit, though what does not depend on the batch would"
    return (
        f"| {model.split('/')[1]} | {what} | {format_bytes(answer.needed_bytes)} | {format_bytes(answer.fixed_bytes)} "
        f"| {verdict} |"
    )


def main() -> None:
    rows = []
    for what, model, settings in CASES:
        rows.append(row(what, model, planned(model, settings)))
        print(rows[-1], flush=True)
    facts = provenance()
    made = f"Rehearsed with torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}."
    path = Path(RESULTS) / "seed_cases.md"
    path.write_text(f"{HEADER}\n" + "\n".join(rows) + f"\n\n{made}\n", encoding="utf-8")
    print(f"written to {path}")


if __name__ == "__main__":
    main()
