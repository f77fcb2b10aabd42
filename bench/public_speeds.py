"""Predicted speeds beside those that others have published for the same work on the same GPU.

    python bench/public_speeds.py

The published ones are the seconds an iteration of LoRA and of all parameters (batch 1, accumulation 8, checkpointing, bf16) of
the Qwen models of 2023 on one A100-SXM4-80G, from the README of QwenLM/Qwen ("Profiling of Memory and Speed"): another program,
PyTorch 2.0, flash attention 2. Their shapes are those of a Llama, as which they are rehearsed here. So this says whether the
assumed range is sane; it is no measurement of oomless, and it calibrates nothing.
"""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

from oomless.config import TrainConfig
from oomless.models.spec import ModelSpec
from oomless.planning.plan import target_for
from oomless.planning.rehearse import rehearse, virtual_device
from oomless.planning.throughput import throughput
from provenance import RESULTS, write

SHAPES = {"1.8B": (2048, 24, 16, 5504), "7B": (4096, 32, 32, 11008), "14B": (5120, 40, 40, 13696)}
LORA = {"trainable": "lora", "lora_r": 64, "lora_target_modules": "q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj"}
PUBLISHED: dict[tuple[str, str], dict[int, float]] = {
    ("1.8B", "LoRA"): {256: 1.0, 512: 1.0, 1024: 1.1, 2048: 1.7, 4096: 3.3, 8192: 6.8},
    ("1.8B", "full"): {256: 2.1, 512: 2.2, 1024: 2.2, 2048: 2.3, 4096: 2.8, 8192: 5.6},
    ("7B", "LoRA"): {256: 1.2, 512: 1.5, 1024: 2.8, 2048: 5.2, 4096: 10.1, 8192: 21.3},
    ("14B", "LoRA"): {256: 1.6, 512: 2.4, 1024: 4.4, 2048: 8.4, 4096: 17.0, 8192: 36.0},
}


def predicted(size: str, method: str, length: int) -> tuple[float, float, float]:
    """Return the fewest, the expected and the most seconds of an iteration."""
    width, layers, heads, inner = SHAPES[size]
    shape = LlamaConfig(
        hidden_size=width,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        intermediate_size=inner,
        vocab_size=151936,
        max_position_embeddings=8192,
    )
    settings: dict[str, Any] = LORA if method == "LoRA" else {"trainable": "full"}
    config = TrainConfig.from_mapping(
        {
            "model": size,
            "data": "-",
            "output_dir": "-",
            "packing": "concatenate",
            "dtype": "bf16",
            "gradient_checkpointing": True,
            "max_seq_length": length,
            "gradient_accumulation_steps": 8,
            **settings,
        }
    )
    spec = ModelSpec(name=size, config=shape, folder=None)
    work = rehearse(spec, config, virtual_device(), kernel="flash", steps=1, whole=False).work
    assert work is not None
    speed = throughput(work, target_for("A100-80GB"), config)
    assert speed is not None
    tokens = config.blocks_per_step * length
    return (
        tokens / speed.tokens_per_second_high,
        tokens / speed.tokens_per_second,
        tokens / speed.tokens_per_second_low,
    )


def main() -> None:
    rows: list[dict[str, Any]] = []
    lines = ["| model | trains | length | published | predicted | within |", "| --- | --- | ---: | ---: | ---: | --- |"]
    for (size, method), seconds in PUBLISHED.items():
        for length, published in seconds.items():
            low, expected, high = predicted(size, method, length)
            inside = low <= published <= high
            rows.append(
                {
                    "model": size,
                    "method": method,
                    "length": length,
                    "published_seconds": published,
                    "predicted_seconds": [low, expected, high],
                }
            )
            lines.append(
                f"| {size} | {method} | {length:,} | {published:.1f} s | {low:.1f}-{high:.1f} s, {expected:.1f} expected | "
                f"{'yes' if inside else 'no'} |"
            )
            print(lines[-1], flush=True)
    (RESULTS / "public_speeds.md").write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"written to {write('public_speeds', {'rows': rows})}")


if __name__ == "__main__":
    main()
