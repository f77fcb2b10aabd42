"""The rehearsal against a GPU: predicted and measured peaks over models, strategies and lengths.

    python bench/predicted_vs_measured.py          on a machine with a CUDA GPU
    python bench/predicted_vs_measured.py --tiny   anywhere: tiny models on a virtual GPU, to see that the script works

Each point runs in this process, one after the other: the very build, steps, evaluation and save that are rehearsed, with
weights as they are allocated (their values do not matter for memory). Without a GPU and without --tiny it says so and
measures nothing.
"""

from __future__ import annotations

import argparse
import statistics
from typing import Any

import torch

from oomless.calibration.points import measure, shrunk
from oomless.config import DataSource, TrainConfig
from oomless.memory.device import CudaDevice
from oomless.memory.virtual_gpu import VirtualGPU
from oomless.models.spec import resolve_for_plan
from oomless.planning.plan import Target, plan, target_for
from provenance import write

MODELS = ["SmolLM2-135M", "Qwen2.5-0.5B", "Llama-3.2-1B", "gemma-2-2b", "Llama-3.2-3B", "Llama-3.1-8B"]
STRATEGIES: list[dict[str, Any]] = [
    {"trainable": "full", "gradient_checkpointing": True},
    {"trainable": "lora", "gradient_checkpointing": False},
    {"trainable": "lora+lm_head+embed_tokens", "optimizer": "adamw_8bit", "gradient_checkpointing": True},
]


def points(tiny: bool) -> list[dict[str, Any]]:
    lengths = (32, 64) if tiny else (512, 2048)
    dtypes = ("fp32",) if tiny else ("bf16", "fp16")
    return [
        {"model": model, "max_seq_length": length, "dtype": dtypes[number % len(dtypes)], **strategy}
        for number, model in enumerate(MODELS[:2] if tiny else MODELS)
        for strategy in STRATEGIES
        for length in lengths
        # Full training of the largest needs more than any single card.
        if not (model == "Llama-3.1-8B" and strategy["trainable"] == "full" and not tiny)
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tiny", action="store_true")
    tiny = parser.parse_args().tiny
    if not tiny and not torch.cuda.is_available():
        print("no GPU here: nothing is measured (--tiny tries the script itself on a virtual GPU)")
        return
    rows = []
    for point in points(tiny):
        spec = resolve_for_plan(point["model"])
        spec = shrunk(spec) if tiny else spec
        config = TrainConfig(data=(DataSource(path="-"),), output_dir="-", **point)
        if tiny:
            target = Target(
                name="virtual",
                capacity_bytes=1 << 33,
                outside_bytes=0,
                workspace_bytes=0,
                compute_capability=(8, 0),
                kernel="auto",
            )
        else:
            target = target_for("auto")
        predicted = plan(spec, config, target).profile
        allocated, reserved = measure(spec, config, VirtualGPU(1 << 33) if tiny else CudaDevice())
        row = {
            **point,
            "predicted_allocated": predicted.peak_allocated_bytes,
            "measured_allocated": allocated,
            "predicted_reserved": predicted.peak_reserved_bytes,
            "measured_reserved": reserved,
            "error_allocated": predicted.peak_allocated_bytes / allocated - 1,
            "error_reserved": predicted.peak_reserved_bytes / reserved - 1,
        }
        rows.append(row)
        print(
            f"{point['model']} {point['trainable']} {point['dtype']} {point['max_seq_length']}: allocated "
            f"{row['error_allocated']:+.2%}, reserved {row['error_reserved']:+.2%}"
        )
    errors = [abs(row["error_allocated"]) for row in rows]
    reserved_errors = [abs(row["error_reserved"]) for row in rows]
    print(
        f"{len(rows)} points: allocated median {statistics.median(errors):.2%}, worst {max(errors):.2%}; "
        f"reserved median {statistics.median(reserved_errors):.2%}"
    )
    if not tiny:
        print(f"written to {write('predicted_vs_measured', {'rows': rows})}")


if __name__ == "__main__":
    main()
