"""Bytes that a layer moves beside its matrix products and attention and operators that it takes, plain and fused, as a rehearsal counts them.

    python bench/layer_bytes.py [--write bench/results/layer_bytes.md]

A forward and a backward pass of 2,048 tokens, two documents, in fp16 without checkpointing, everything trained: what one layer adds. Layers of
Gemma are counted in bf16, which needs no sums in fp32.
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path

from oomless.config import DataSource, TrainConfig
from oomless.models.spec import resolve_for_plan
from oomless.planning.rehearse import rehearse, virtual_device

MODELS = {
    "meta-llama/Llama-3.2-1B": "fp16",
    "mistralai/Mistral-7B-v0.3": "fp16",
    "Qwen/Qwen2.5-0.5B": "fp16",
    "Qwen/Qwen3-0.6B": "fp16",
    "google/gemma-2b": "bf16",
    "google/gemma-2-2b": "bf16",
    "google/gemma-3-1b-pt": "bf16",
}


def counted(model: str, dtype: str, kernels: str) -> tuple[int, int]:
    """Return the bytes moved by a layer, and its operators."""
    found = []
    for layers in (2, 3):
        spec = copy.deepcopy(resolve_for_plan(model))
        config = spec.config.get_text_config()
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = ["full_attention"] * layers
        run = TrainConfig(
            model=model,
            data=(DataSource(path="none"),),
            output_dir="none",
            max_seq_length=2048,
            optimizer="sgd",
            dtype=dtype,
            weight_precision="plain",
            kernels=kernels,
        )
        work = rehearse(spec, run, virtual_device(1 << 40), steps=1, whole=False).work
        beside = [(moved, count) for (_, flops, moved), count in work.of_passes if not flops]
        found.append((sum(moved * count for moved, count in beside), sum(count for _, count in beside)))
    (fewer_bytes, fewer), (more_bytes, more) = found
    return (more_bytes - fewer_bytes) // work.passes, (more - fewer) // work.passes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--write", type=Path)
    arguments = parser.parse_args()
    lines = ["| a layer of | GB, plain | fused | operators, plain | fused |", "| --- | ---: | ---: | ---: | ---: |"]
    for model, dtype in MODELS.items():
        (plain, many), (fused, few) = (counted(model, dtype, kernels) for kernels in ("plain", "fused"))
        name = model.partition("/")[2]
        lines.append(f"| {name}, {dtype} | {plain / 1e9:.2f} | {fused / 1e9:.2f} | {many} | {few} |")
    text = "\n".join(lines) + "\n"
    print(text)
    if arguments.write:
        arguments.write.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
