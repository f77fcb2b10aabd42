"""What the planner picks for common models on common GPUs, and how long its search takes.

    python bench/plan_table.py [MODEL ...]

Needs no GPU. Each search is made anew, with nothing kept from earlier ones. Writes ``results/plan_table.md``, which
docs/planner.md shows; for the models that are named, searches again and adds the times to those that stand there.
"""

from __future__ import annotations

import sys
import time

from oomless.models.spec import resolve_for_plan
from oomless.planning.plan import target_for
from oomless.planning.search import search
from oomless.planning.strategies import UNPLANNED, in_words
from oomless.report.choice import speed_in_words
from oomless.units import format_bytes
from provenance import RESULTS, provenance

LENGTH = 2048
PAIRS = [
    ("meta-llama/Llama-3.2-1B", "T4"),
    ("google/gemma-7b", "T4"),
    ("Qwen/Qwen2.5-0.5B", "T4"),
    ("meta-llama/Llama-3.2-1B", "RTX 3060 12GB"),
    ("Qwen/Qwen2.5-1.5B", "RTX 3060 12GB"),
    ("google/gemma-2-2b", "T4"),
    ("meta-llama/Llama-3.2-3B", "RTX 4090"),
    ("meta-llama/Llama-3.1-8B", "RTX 4090"),
    ("Qwen/Qwen2.5-7B", "RTX 4090"),
    ("meta-llama/Llama-3.1-8B", "A100-40G"),
    ("Qwen/Qwen2.5-3B", "L4"),
    ("google/gemma-7b", "L4"),
    ("meta-llama/Llama-3.2-3B", "T4"),
    ("mistralai/Mistral-7B-v0.1", "RTX 3060 12GB"),
]


def row(model: str, gpu: str, before: str | None = None) -> str:
    """Return the row of a search; its time follows those in the row ``before``."""
    began = time.perf_counter()
    given = {**UNPLANNED, "model": model, "max_seq_length": LENGTH}
    choice = search(resolve_for_plan(model), given, target_for(gpu))
    seconds = time.perf_counter() - began
    times = f"{before.split('|')[-2].strip()}, {seconds:.0f}" if before else f"{seconds:.0f}"
    picked = choice.picked
    if picked is None:
        return f"| {model.split('/')[1]} | {gpu} | nothing fits | | | | {choice.trials} | {times} |"
    headroom = format_bytes(choice.target.usable_bytes - picked.needed_bytes)
    return (
        f"| {model.split('/')[1]} | {gpu} | {picked.quality} | {in_words(picked.settings)} | "
        f"{format_bytes(picked.needed_bytes)} ({headroom} left) | {speed_in_words(picked)} | {choice.trials} | {times} |"
    )


def main() -> None:
    path, again = RESULTS / "plan_table.md", sys.argv[1:]
    lines = path.read_text(encoding="utf-8").splitlines() if again else []
    head = [
        f"One block of {LENGTH:,} tokens a step; tokens/s are predicted, not measured:",
        "",
        "| model | GPU | pick | how | needs | tokens/s | rehearsals | search, s |",
        "|---|---|---|---|---|---:|---:|---:|",
    ]
    facts = provenance()
    closing = (
        f"Rehearsed with torch {facts['versions']['torch']}, transformers {facts['versions']['transformers']}; searches with two "
        f"processes on {facts['device'].partition(',')[0]}, two cores. Several times are those of several searches: this machine "
        "is at times 1.8 times as slow as at others."
    )
    rows = []
    for model, gpu in PAIRS:
        name = model.split("/")[1]
        before = next((line for line in lines if line.startswith(f"| {name} | {gpu} |")), None)
        rows.append(before if before and name not in again else row(model, gpu, before))
        print(rows[-1], flush=True)
        if not again or len(rows) == len(PAIRS):
            path.write_text("\n".join([*head, *rows, "", closing]) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
