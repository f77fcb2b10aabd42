"""Bytes that a layer moves beside its matrix products and attention and operators that it takes, plain and fused, as a rehearsal counts them.

    python bench/layer_bytes.py [--write bench/results/layer_bytes.md]

A forward and a backward pass of 2,048 tokens, two documents, in fp16 without checkpointing, everything trained: what one layer adds, and
last the whole pass of one model. Layers of Gemma are counted in bf16, which needs no sums in fp32.
"""

from __future__ import annotations

import copy

from counted import beside_products, show
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

WHOLE = "meta-llama/Llama-3.2-1B"


def counted(model: str, dtype: str, kernels: str, layers: int | None = None) -> tuple[int, int]:
    """Return the bytes moved by a pass, and its operators; of all layers, or of so many."""
    spec = copy.deepcopy(resolve_for_plan(model))
    config = spec.config.get_text_config()
    if layers is not None:
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
    moved_bytes, operators = beside_products(work.of_passes)
    return moved_bytes // work.passes, operators // work.passes


def of_a_layer(model: str, dtype: str, kernels: str) -> tuple[int, int]:
    """Return what one layer adds to a pass."""
    fewer, more = (counted(model, dtype, kernels, layers) for layers in (2, 3))
    return more[0] - fewer[0], more[1] - fewer[1]


def main() -> None:
    lines = ["| a layer of | GB, plain | fused | operators, plain | fused |", "| --- | ---: | ---: | ---: | ---: |"]
    for model, dtype in MODELS.items():
        (plain, many), (fused, few) = (of_a_layer(model, dtype, kernels) for kernels in ("plain", "fused"))
        name = model.partition("/")[2]
        lines.append(f"| {name}, {dtype} | {plain / 1e9:.2f} | {fused / 1e9:.2f} | {many} | {few} |")
    (plain, many), (fused, few) = (counted(WHOLE, MODELS[WHOLE], kernels) for kernels in ("plain", "fused"))
    lines.append(
        f"| all of {WHOLE.partition('/')[2]}, the loss included | {plain / 1e9:.1f} | {fused / 1e9:.1f} | {many:,} | {few:,} |"
    )
    show(__doc__, lines)


if __name__ == "__main__":
    main()
